"""How every command line ends: a user error prints one clear message and sets its exit code, without a traceback."""

import sys
from collections.abc import Callable

from vit_convert.core.errors import INTERRUPTED, ConvertError
from vit_convert.core.interrupts import ending_as_interrupted
from vit_convert.core.streams import outliving_streams

_MORE = "Run it again with more memory, or with smaller calibration.batch_size and fewer images."


def exit_code(run: Callable[[], int], *, debug: bool, when_interrupted: str) -> int:
    """Runs a command and turns its end into an exit code.

    Args:
        run: the command; returns its exit code.
        debug: let a user error through as an exception, with its traceback.
        when_interrupted: what to say after Ctrl-C or SIGTERM.

    Returns:
        The exit code of the command or of the ConvertError, or INTERRUPTED, also if memory ran out.
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
