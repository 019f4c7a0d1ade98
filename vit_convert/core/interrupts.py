"""When a signal may end a command: neither inside an import nor inside a step that must not be left half done."""

import _thread
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

from vit_convert.core.errors import Terminated

_ENDING = {signal.SIGTERM: signal.SIG_DFL, signal.SIGHUP: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
_AGAIN_S = 0.05  # after which a destructor has returned, and many an import
_IMPORT_S = 5.0  # a config that runs for ever is an import too
_IMPORTING = "<frozen importlib._bootstrap>"


class _Undisturbed:
    """Blocks of the main thread that no signal may interrupt, and the signal that waits for their end."""

    depth = 0
    waiting: int | None = None


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Keeps back what would end the command until the block is done; works inside `ending_as_interrupted`.

    Example:
        >>> with undisturbed():
        ...     pass  # take a lock and note that it is ours
    """
    if threading.current_thread() is not threading.main_thread():  # signals interrupt the main thread alone
        yield
        return
    _Undisturbed.depth += 1
    try:
        yield
    finally:
        _Undisturbed.depth -= 1
        if not _Undisturbed.depth and (number := _Undisturbed.waiting) is not None:
            _Undisturbed.waiting = None
            if callable(handler := signal.getsignal(number)):
                handler(number, None)


@contextlib.contextmanager
def ending_as_interrupted() -> Iterator[None]:
    """Makes SIGTERM and SIGHUP end the block as Ctrl-C does: unfinished files are removed, and the lock is released.

    All three wait for the end of an import: an exception that is raised in the middle of one can crash an extension
    module that is being loaded (JAX's and onnxruntime's are), and the process then ends without cleaning up.

    Raises:
        KeyboardInterrupt: after SIGINT, in the block.
        Terminated: after SIGTERM or SIGHUP, in the block.
    """
    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's
        yield
        return
    ending = _Ending()
    # What ignores a signal (nohup) or has its own way with it keeps it.
    replaced = {number: before for number, before in _ENDING.items() if signal.getsignal(number) == before}
    shown, sys.unraisablehook = sys.unraisablehook, ending.swallowed
    ending.shown = shown
    for number in replaced:
        signal.signal(number, ending.end)
    try:
        yield
    except Exception as e:
        if ending.raised is not None:  # it came inside a library that made an error of its own of it
            raise _exception(ending.raised) from e
        raise
    finally:
        ending.close()
        sys.unraisablehook = shown
        for number, before in replaced.items():
            signal.signal(number, before)


class _Ending:
    """The handler of the signals that end a block.

    Attributes:
        raised: the signal that an exception was raised for; None for none yet.
        shown: the hook for unraisable exceptions that is not ours.
    """

    def __init__(self) -> None:
        self.raised: int | None = None
        self.shown: Any = sys.__unraisablehook__
        self._open, self._asking, self._importing_since = True, 0, 0.0

    def end(self, number: int, frame: FrameType | None) -> None:
        """Raises, or asks once more later."""
        if _Undisturbed.depth:
            _Undisturbed.waiting = number
            return
        if _is_importing(frame):
            self._importing_since = self._importing_since or time.monotonic()
            if time.monotonic() - self._importing_since < _IMPORT_S:
                self._ask_again(number)
                return
        self.raised = number
        raise _exception(number)

    def swallowed(self, unraisable: Any) -> None:
        """Python drops what is raised in a destructor or a callback of its garbage collector: asks once more."""
        if isinstance(unraisable.exc_value, KeyboardInterrupt):
            self._ask_again(signal.SIGINT if self.raised is None else self.raised)
        else:
            self.shown(unraisable)

    def close(self) -> None:
        """Waits for who would send a signal that is nobody's any more."""
        self._open = False
        while self._asking:
            time.sleep(_AGAIN_S / 10)

    def _ask_again(self, number: int) -> None:
        self._asking += 1
        _thread.start_new_thread(self._ask, (number,))  # threading's locks may be held by what the signal interrupted

    def _ask(self, number: int) -> None:
        time.sleep(_AGAIN_S)
        if self._open:
            os.kill(os.getpid(), number)
        self._asking -= 1


def _exception(number: int) -> KeyboardInterrupt:
    return KeyboardInterrupt() if number == signal.SIGINT else Terminated(f"ended by {signal.Signals(number).name}")


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == _IMPORTING:
            return True
        frame = frame.f_back
    return False
