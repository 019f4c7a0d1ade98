"""What can go wrong, one class for each exit code, so that a script can tell a bad checkpoint from a failed check."""

import difflib
from collections.abc import Iterable

from vit_convert.core.record import StageResult


class ConvertError(Exception):
    """A user-facing failure: printed without a traceback, and its exit code ends the process.

    Args:
        message: what is wrong, where, and both values ("…/kernel: checkpoint (768, 3072), variant needs (1024, 4096)").
            It may quote
            foreign bytes: control characters, and what a report could not encode, are escaped as Python does ("\\x1b",
                "\\udc80").
        fix: what to do about it, one sentence; printed on its own line.
        result: what a stage found before it failed, for the report.

    Example:
        >>> import vit_convert
        >>> try:
        ...     vit_convert.published_config("B/33")
        ... except vit_convert.ConvertError as e:
        ...     print(e.exit_code, e)
        2 variant 'B/33': no public checkpoint is known. Did you mean B/32, B/8, S/32?
    """

    exit_code = 1

    def __init__(self, message: str, *, fix: str = "", result: StageResult | None = None):
        super().__init__(_printable(message))
        self.fix = _printable(fix)
        self.result = result


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


class UsageError(ConvertError):
    """A flag or config value that cannot be honoured."""

    exit_code = 2


class CheckpointError(ConvertError):
    """A checkpoint that cannot be read or does not hold the model it should."""

    exit_code = 3


class PassingError(ConvertError):
    """Base of errors that a later attempt may not meet: a network that is down, a bundle that another command holds."""


class HeldError(PassingError, UsageError):
    """Another command is using the bundle."""

    exit_code = UsageError.exit_code


class NetworkError(PassingError, CheckpointError):
    """A checkpoint could not be downloaded, or not completely."""

    exit_code = CheckpointError.exit_code


class ExportError(ConvertError):
    """The model could not be traced, rewritten or saved as ONNX."""

    exit_code = 4


class CheckError(ConvertError):
    """A numeric check missed its tolerance."""

    exit_code = 5


class CalibrationError(ConvertError):
    """Calibration or evaluation images are missing, unreadable or unusable."""

    exit_code = 6


class BuildError(ConvertError):
    """TensorRT could not parse a graph, build or load an engine, or honour the requested precision."""

    exit_code = 7


class UnbuildableError(BuildError):
    """TensorRT read a graph but cannot build an engine from it; another lowering of the model may work."""


class BenchmarkError(ConvertError):
    """An engine could not be run, verified or measured."""

    exit_code = 8


class BatchError(ConvertError):
    """A batch ended, and some of its jobs failed."""

    exit_code = 9


INTERRUPTED = 130  # 128 + SIGINT, as in shells; finished stages are kept, so a rerun continues


class Terminated(KeyboardInterrupt):
    """SIGTERM (`docker stop`, Slurm) or SIGHUP asked the process to end; it ends as after Ctrl-C, with INTERRUPTED."""


def nearest(word: str, valid: Iterable[str]) -> str:
    """A hint for a mistyped name.

    Args:
        word: what was given.
        valid: what would have been accepted.

    Returns:
        " Did you mean X, Y?" for the closest names, or "" when none is close.
    """
    close = difflib.get_close_matches(word, list(valid), n=3, cutoff=0.5)
    return f" Did you mean {', '.join(close)}?" if close else ""
