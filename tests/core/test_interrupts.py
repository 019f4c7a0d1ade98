"""A signal ends a command between two steps, and never inside an import or a step that must be whole."""

import os
import signal
import sys
import threading
import time

import pytest

from vit_convert.core import interrupts
from vit_convert.core.bundle import Bundle
from vit_convert.core.errors import Terminated
from vit_convert.core.interrupts import ending_as_interrupted, undisturbed
from vit_convert.core.leftovers import tidy
from vit_convert.core.lock import hold

ENDS = {signal.SIGTERM: Terminated, signal.SIGHUP: Terminated, signal.SIGINT: KeyboardInterrupt}


@pytest.fixture(autouse=True)
def as_in_a_shell():
    """Handlers as a program has them that a person started; a test runner's own come back afterwards."""
    before = {number: signal.getsignal(number) for number in ENDS}
    for number in ENDS:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module; returns its name."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(text, name="interrupted_import"):
        (tmp_path / f"{name}.py").write_text(f"import os, signal, time\n{text}\nwhole = True\n")
        monkeypatch.delitem(sys.modules, name, raising=False)
        return name

    return write


def send(number):
    os.kill(os.getpid(), number)


def interrupt_next(monkeypatch, call):
    """Lets SIGTERM come in the midst of the next call of a function of `os`."""
    real = getattr(os, call)

    def interrupted(*args):
        monkeypatch.setattr(os, call, real)
        send(signal.SIGTERM)
        return real(*args)

    monkeypatch.setattr(os, call, interrupted)


@pytest.mark.parametrize("number", ENDS)
def test_an_import_is_finished_first(module, number):
    name = module(f"os.kill(os.getpid(), {int(number)}); time.sleep(0.2)")
    with pytest.raises(ENDS[number]), ending_as_interrupted():
        __import__(name)
        time.sleep(20)
    assert sys.modules[name].whole and signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)


def test_an_import_inside_an_import_is_one(module):
    module("os.kill(os.getpid(), signal.SIGTERM); time.sleep(0.2)", "inner_import")
    name = module("import inner_import; time.sleep(0.2)")
    with pytest.raises(Terminated), ending_as_interrupted():
        __import__(name)
        time.sleep(20)
    assert sys.modules[name].whole


def test_an_import_that_does_not_end_is_ended(module, monkeypatch):
    monkeypatch.setattr(interrupts, "_IMPORT_S", 0.2)
    name = module("os.kill(os.getpid(), signal.SIGTERM); time.sleep(20)")
    with pytest.raises(Terminated), ending_as_interrupted():
        __import__(name)
    assert name not in sys.modules


def test_a_signal_that_waits_for_an_import_does_not_outlive_the_command(module):
    """Its default would end the process: here, this test's."""
    with ending_as_interrupted():
        __import__(module("os.kill(os.getpid(), signal.SIGTERM)"))
    time.sleep(0.1)


@pytest.mark.parametrize("number", ENDS)
def test_a_step_that_must_be_whole_is(number):
    done = []
    with pytest.raises(ENDS[number]), ending_as_interrupted(), undisturbed():
        with undisturbed():
            send(number)
            done.append("inner")
        done.append("outer")
    assert done == ["inner", "outer"]
    with ending_as_interrupted(), undisturbed():
        pass  # and the signal is used up


def test_a_step_of_another_thread_holds_nothing_back():
    """Signals interrupt the main thread, which has no such step here."""
    at_work, done = threading.Event(), threading.Event()

    def step():
        with undisturbed():
            at_work.set()
            done.wait(20)

    thread = threading.Thread(target=step)
    thread.start()
    at_work.wait(20)
    with pytest.raises(Terminated), ending_as_interrupted():
        send(signal.SIGTERM)
        time.sleep(20)
    done.set()
    thread.join()


@pytest.mark.parametrize("step", ["fsync", "ftruncate", "fstat"])
def test_a_lock_that_was_being_taken_is_released(tmp_path, monkeypatch, step):
    """Before, between and after the writing of the holder's name."""
    interrupt_next(monkeypatch, step)
    with pytest.raises(Terminated), ending_as_interrupted(), hold(Bundle(tmp_path), "a conversion"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_lock_is_released_though_a_second_signal_comes(tmp_path, monkeypatch):
    with pytest.raises(Terminated), ending_as_interrupted(), hold(Bundle(tmp_path), "a conversion"):
        interrupt_next(monkeypatch, "fstat")
        send(signal.SIGTERM)
        time.sleep(20)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_tidied_up(tmp_path):
    """Also in a pair's towers; what is whole stays, and what another process holds is left to it."""
    parts = [tmp_path / "pair", tmp_path / "pair" / "image", tmp_path / "pair" / "text"]
    for part in parts:
        part.mkdir()
        (part / ".lock").write_text("")
        (part / ".model.onnx.abcdefgh.tmp").write_text("half")
        (part / "model.onnx").write_text("whole")
    with hold(Bundle(parts[1]), "another conversion"):
        tidy(Bundle(parts[0]))
        left = {part.name: sorted(path.name for path in part.iterdir() if path.is_file()) for part in parts}
    held = [".lock", ".model.onnx.abcdefgh.tmp", "model.onnx"]
    assert left == {"pair": ["model.onnx"], "image": held, "text": ["model.onnx"]}
    tidy(Bundle(tmp_path / "none"))
    assert not (tmp_path / "none").exists()
