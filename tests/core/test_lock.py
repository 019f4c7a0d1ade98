"""One conversion at a time works on a bundle, and a dead one holds nobody up."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading

import pytest

from vit_convert.core import lock
from vit_convert.core.bundle import Bundle
from vit_convert.core.errors import UsageError
from vit_convert.core.lock import DEAD_AFTER_S, hold, me, started

HOLD = """
import sys
from vit_convert.core.bundle import Bundle
from vit_convert.core.lock import hold
with hold(Bundle(sys.argv[1]), "the first one"):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def bundle(tmp_path):
    return Bundle(tmp_path)


@pytest.fixture
def other(tmp_path):
    """Another process that holds the lock."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def refused(bundle):
    with pytest.raises(UsageError) as caught, hold(bundle, "the second one"):
        raise AssertionError("it is held")
    assert caught.value.exit_code == 2
    return f"{caught.value} {caught.value.fix}"


def test_the_second_one_is_told_who_holds_it(bundle, other):
    message = refused(bundle)
    assert f"process {other.pid} on {os.uname().nodename}" in message and "the first one" in message
    other.send_signal(signal.SIGSTOP)  # it lives, though it does nothing
    assert f"process {other.pid}" in refused(bundle)
    other.send_signal(signal.SIGCONT)
    other.communicate()
    with hold(bundle, "the second one"):
        pass
    assert list(bundle.root.iterdir()) == []  # a finished conversion leaves nothing of it


def test_a_killed_holder_holds_nobody_up(bundle, other):
    other.kill()
    other.wait()
    assert bundle.lock.exists()
    with hold(bundle, "the second one"):
        assert json.loads(bundle.lock.read_text())["pid"] == os.getpid()


def test_not_twice_in_one_process(bundle):
    with hold(bundle, "the first one"):
        found = []
        thread = threading.Thread(target=lambda: found.append(refused(bundle)))
        thread.start()
        thread.join()
        assert "the first one" in found[0]
        assert "the first one" in json.loads(bundle.lock.read_text())["command"]  # the refused one left the file as it was


def claim(bundle, **changes):
    bundle.lock.write_text(json.dumps({**me(), "command": "x", "since": "y", **changes}))


def test_a_record_cut_short_is_nobodys(bundle):
    bundle.lock.write_text('{"host": "a", "pi')
    with hold(bundle, "x"):
        pass


@pytest.mark.parametrize(("silence_s", "dead"), [(DEAD_AFTER_S / 2, False), (DEAD_AFTER_S + 60, True)])
def test_a_holder_on_another_machine_is_dead_when_it_says_nothing_for_long(bundle, silence_s, dead):
    """Some shared file systems keep flock to one machine: it was given to us, and proves nothing."""
    claim(bundle, host="other", boot="another kernel")
    now = bundle.lock.stat().st_mtime
    os.utime(bundle.lock, (now - silence_s, now - silence_s))
    if dead:
        with hold(bundle, "x"):
            pass
    else:
        assert "on other" in (message := refused(bundle)) and "its lock ends" in message


def test_a_holder_gives_signs_of_life(bundle, monkeypatch):
    monkeypatch.setattr(lock, "BEAT_S", 0.01)
    with hold(bundle, "x"):
        os.utime(bundle.lock, (1, 1))
        for _ in range(1000):
            if bundle.lock.stat().st_mtime > 1:
                break
            threading.Event().wait(0.01)
        assert bundle.lock.stat().st_mtime > 1


@pytest.fixture
def without_flock(monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)


def test_without_flock_the_process_is_looked_for(bundle, without_flock, other):
    assert f"process {other.pid}" in refused(bundle)
    other.kill()
    other.wait()
    with hold(bundle, "x"):
        pass


@pytest.mark.parametrize("pid", [None, "x", "12", [1]])
def test_a_record_without_a_process_is_believed_until_it_is_old(bundle, without_flock, pid):
    claim(bundle, pid=pid)
    assert "another conversion works on this bundle" in refused(bundle)
    os.utime(bundle.lock, (1, 1))
    with hold(bundle, "x"):
        pass


def test_the_number_of_a_process_comes_back(bundle, without_flock):
    """Another process got the number of the holder: it started at another time."""
    claim(bundle, pid=os.getppid(), started=started(os.getppid()))
    assert f"process {os.getppid()}" in refused(bundle)
    claim(bundle, pid=os.getppid(), started="1")
    with hold(bundle, "x"):
        pass


def test_a_full_disk_is_said_and_leaves_no_lock(bundle, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(UsageError, match="no space left on the disk"), hold(bundle, "x"):
        pass
    assert not bundle.lock.exists()


def test_when_a_process_started():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert int(started(child.pid)) >= int(started(os.getpid())) > 0
    child.communicate()
    assert started(child.pid) == ""
