"""How every command line ends: a user's mistake prints one clear message and sets its exit code, without a
traceback."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from vit_convert.core.errors import INTERRUPTED, ConvertError, Terminated
from vit_convert.core.streams import outliving_streams

_ENDING = (signal.SIGTERM, signal.SIGHUP)
_AGAIN_S = 0.05  # after which a destructor has returned
_MORE = "Run it again with more memory, or with smaller calibration.batch_size and fewer images."


def exit_code(run: Callable[[], int], *, debug: bool, when_interrupted: str) -> int:
    """Runs a command and turns how it ends into an exit code.

    Args:
        run: the command; returns its exit code.
        debug: let a user's mistake through as an exception, with its traceback.
        when_interrupted: what to say after Ctrl-C or SIGTERM.

    Returns:
        The exit code of the command, of the ConvertError, or INTERRUPTED, also where memory ran out.
    """
    with outliving_streams():
        try:
            with ending_as_interrupted():
                return run()
        except ConvertError as e:
            if debug:
                raise
            print(f"error: {e}" + (f"\n  {e.fix}" if e.fix else ""), file=sys.stderr)
            return e.exit_code
        except KeyboardInterrupt as e:
            print(f"\n{str(e) or 'interrupted'}: {when_interrupted}", file=sys.stderr)
            return INTERRUPTED
        except MemoryError as e:
            if debug:
                raise
            print(f"error: out of memory{f' ({e})' if str(e) else ''}: {when_interrupted}\n  {_MORE}", file=sys.stderr)
            return INTERRUPTED


@contextlib.contextmanager
def ending_as_interrupted() -> Iterator[None]:
    """Makes SIGTERM and SIGHUP end the block as Ctrl-C does: unfinished files are removed, and the lock is released."""
    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's
        yield
        return

    seen: list[int] = []
    again: list[threading.Timer] = []

    def end(number: int, frame: FrameType | None) -> None:
        seen.append(number)
        raise Terminated(f"ended by {signal.Signals(number).name}")

    def swallowed(unraisable: Any) -> None:
        """Python drops what is raised in a destructor or a callback of its garbage collector: asks once more."""
        if isinstance(unraisable.exc_value, KeyboardInterrupt):
            number = seen[-1] if isinstance(unraisable.exc_value, Terminated) and seen else signal.SIGINT
            again.append(threading.Timer(_AGAIN_S, os.kill, (os.getpid(), number)))
            again[-1].start()
        else:
            shown(unraisable)

    # What ignores a signal (nohup) or has its own way with it keeps it.
    replaced = [number for number in _ENDING if signal.getsignal(number) == signal.SIG_DFL]
    shown, sys.unraisablehook = sys.unraisablehook, swallowed
    for number in replaced:
        signal.signal(number, end)
    try:
        yield
    except Exception as e:
        if seen:  # it came inside a library that made an error of its own of it
            raise Terminated(f"ended by {signal.Signals(seen[0]).name}") from e
        raise
    finally:
        sys.unraisablehook = shown
        for timer in again:
            timer.cancel()
        for number in replaced:
            signal.signal(number, signal.SIG_DFL)
