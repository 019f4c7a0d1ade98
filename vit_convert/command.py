"""How both command lines end: a user's mistake is one clear message and its exit code, never a traceback."""

import sys
from collections.abc import Callable

from vit_convert.errors import INTERRUPTED, ConvertError
from vit_convert.streams import outliving_streams


def exit_code(run: Callable[[], int], *, debug: bool, when_interrupted: str) -> int:
    """Runs a command and turns how it ends into an exit code.

    Args:
        run: the command; returns its exit code.
        debug: let a user's mistake through as an exception, with its traceback.
        when_interrupted: what to say after Ctrl-C.

    Returns:
        The exit code of the command, of the ConvertError, or INTERRUPTED.
    """
    with outliving_streams():
        try:
            return run()
        except ConvertError as e:
            if debug:
                raise
            print(f"error: {e}" + (f"\n  {e.fix}" if e.fix else ""), file=sys.stderr)
            return e.exit_code
        except KeyboardInterrupt:
            print(f"\ninterrupted: {when_interrupted}", file=sys.stderr)
            return INTERRUPTED
