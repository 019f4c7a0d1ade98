"""Standard output and error that outlive their readers: work continues after `head` has read enough, and no character
makes it fail."""

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO, cast


class _Outliving:
    """A text stream that goes silent once nobody reads it any more."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:  # a closed pipe, or a log on a full disk
            self._silence()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._silence()

    def _silence(self) -> None:
        # At the level of the descriptor, so that buffered text and what Python flushes at exit goes there too.
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def outliving_streams() -> Iterator[None]:
    """While the block runs, a closed pipe, a closed descriptor or an ASCII terminal does not make it fail."""
    _fill_descriptors()
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (cast(TextIO, _Outliving(_writable(stream))) for stream in before)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before


def _fill_descriptors() -> None:
    """Opens those of descriptors 0, 1 and 2 that are closed; otherwise the next file opened gets the number, and C
    libraries write their messages into it."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)


def _writable(stream: TextIO | None) -> TextIO:
    if stream is None:  # its descriptor was closed when Python started
        return io.StringIO()
    if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
        stream.reconfigure(errors="replace")  # in a locale without ×, such as LANG=C without UTF-8
    return stream
