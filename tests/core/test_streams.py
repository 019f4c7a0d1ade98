"""Standard output that nobody reads any more, that is closed, or that cannot spell a letter is no reason to fail."""

import io
import os
import sys
import types

import pytest

from vit_convert.core import streams
from vit_convert.core.streams import outliving_streams


@pytest.fixture
def pipe():
    """A text stream into a pipe, and the end to read from."""
    read, write = os.pipe()
    stream = open(write, "w", encoding="utf-8")  # noqa: SIM115
    reader = open(read, "rb", buffering=0)  # noqa: SIM115
    yield stream, reader
    reader.close()
    stream.close()


def in_child(work) -> int:
    """The exit code of a function in a fork of this process, whose descriptors it may spoil."""
    child = os.fork()
    if child == 0:
        code = 111
        try:
            code = work()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_text_goes_through_as_it_is(pipe, monkeypatch):
    stream, reader = pipe
    monkeypatch.setattr(sys, "stdout", stream)
    with outliving_streams():
        assert sys.stdout is not stream and sys.stdout.encoding == "utf-8" and sys.stdout.fileno() == stream.fileno()
        assert sys.stdout.write("a×b\n") == 4
        print("second", flush=True)
        assert reader.read(100) == "a×b\nsecond\n".encode()
        print("third")  # flushed when the block ends
    assert reader.read(100) == b"third\n"
    assert sys.stdout is stream


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_reader_that_has_gone_ends_nothing(pipe, monkeypatch, name):
    stream, reader = pipe
    monkeypatch.setattr(sys, name, stream)
    with outliving_streams():
        wrapped = getattr(sys, name)
        reader.close()
        wrapped.write("x" * 10)
        wrapped.flush()  # nobody reads it
        assert wrapped.write("y" * 100_000) == 100_000  # more than the buffer holds
        wrapped.flush()
        assert os.readlink(f"/proc/self/fd/{stream.fileno()}") == os.devnull
    stream.flush()  # as Python does when it exits
    assert getattr(sys, name) is stream


def test_a_flush_alone_meets_the_closed_pipe(pipe, monkeypatch):
    """What was written fits the buffer; Python would flush it again when it exits."""
    stream, reader = pipe
    monkeypatch.setattr(sys, "stdout", stream)
    with outliving_streams():
        reader.close()
        sys.stdout.write("x")
        sys.stdout.flush()
        assert os.readlink(f"/proc/self/fd/{stream.fileno()}") == os.devnull


def test_a_write_that_fails_by_itself(pipe, monkeypatch):
    """More than a buffer at once, so that not only the flush meets the closed pipe."""
    stream, reader = pipe
    monkeypatch.setattr(sys, "stdout", stream)
    with outliving_streams():
        reader.close()
        assert sys.stdout.write("y" * 1_000_000) == 1_000_000
        assert os.readlink(f"/proc/self/fd/{stream.fileno()}") == os.devnull


def test_what_fails_inside_is_told_and_the_streams_are_put_back(pipe, monkeypatch):
    stream, reader = pipe
    monkeypatch.setattr(sys, "stderr", stream)
    before = sys.stdout
    with pytest.raises(ZeroDivisionError), outliving_streams():
        print("begun", file=sys.stderr)
        raise ZeroDivisionError
    assert sys.stderr is stream and sys.stdout is before and reader.read(10) == b"begun\n"


@pytest.mark.parametrize(
    ("encoding", "errors", "text"),
    [
        ("ascii", "strict", b"2 ? 3\n"),
        ("ascii", "backslashreplace", b"2 \\xd7 3\n"),
        ("utf-8", "strict", "2 × 3\n".encode()),
    ],
)
def test_a_terminal_without_the_letter_gets_another(monkeypatch, encoding, errors, text):
    content = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(content, encoding=encoding, errors=errors))
    with outliving_streams():
        print("2 × 3")
    assert content.getvalue() == text


def test_a_stream_of_another_kind_is_taken_as_it_is(monkeypatch):
    text = io.StringIO()
    monkeypatch.setattr(sys, "stdout", text)
    with outliving_streams():
        print("2 × 3")
    assert text.getvalue() == "2 × 3\n"


def test_a_stream_that_was_closed_when_python_started(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    with outliving_streams():
        print("somewhere")
        print("somewhere", file=sys.stderr, flush=True)
    assert sys.stdout is None and sys.stderr is None


@pytest.mark.parametrize("closed", [(), (0,), (1, 2), (0, 2), (0, 1, 2)])
def test_closed_descriptors_are_no_files(closed):
    """The next file that is opened must not become 0, 1 or 2, nor more be left open than were missing."""

    def opened():
        return [descriptor for descriptor in range(3, 256) if os.path.exists(f"/proc/self/fd/{descriptor}")]

    def work():
        for descriptor in closed:
            os.close(descriptor)
        before = opened()
        streams._fill_descriptors()
        after = opened()
        links = [os.readlink(f"/proc/self/fd/{descriptor}") for descriptor in closed]
        usable = all(os.write(descriptor, b"x") == 1 and os.read(descriptor, 1) == b"" for descriptor in closed)
        return 0 if links == [os.devnull] * len(closed) and usable and before == after else 1

    assert in_child(work) == 0


@pytest.mark.parametrize("opened", [{0, 1, 2}, {0, 1, 2, 3, 5}, {1, 2}, {0, 1}, {2}, {1, 4}, set()])
def test_the_first_three_are_filled_and_no_other_is_left_open(monkeypatch, opened):
    """On a system of the test's own, which gives the lowest number that is free, as POSIX has it."""
    now = set(opened)

    def open_lowest(path, flags):
        assert (path, flags) == (os.devnull, os.O_RDWR)
        lowest = next(number for number in range(100) if number not in now)
        now.add(lowest)
        return lowest

    system = types.SimpleNamespace(open=open_lowest, close=now.remove, devnull=os.devnull, O_RDWR=os.O_RDWR)
    monkeypatch.setattr(streams, "os", system)
    streams._fill_descriptors()
    assert now == opened | {0, 1, 2}


def test_descriptors_are_filled_before_anything_runs(monkeypatch):
    order = []
    monkeypatch.setattr(streams, "_fill_descriptors", lambda: order.append("filled"))
    monkeypatch.setattr(streams, "_writable", lambda stream: order.append("wrapped") or stream)
    with outliving_streams():
        order.append("runs")
    assert order == ["filled", "wrapped", "wrapped", "runs"]
