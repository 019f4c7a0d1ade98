"""What machine this is, and how many cores there are to use."""

import contextlib
import ctypes
import gc
import os
import pathlib
import platform


def cpu_model() -> str:
    """The vendor's name of the processor, or what Python reports if Linux does not say."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def num_cores() -> int:
    """Cores that this process may use.

    Example:
        >>> num_cores() >= 1
        True
    """
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def give_memory_back(*, collect: bool = True) -> None:
    """Returns freed memory that the C library holds back to the system.

    Args:
        collect: run Python's garbage collector first, which takes tens of milliseconds.
    """
    if collect:
        gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # not the GNU C library
        ctypes.CDLL(None).malloc_trim(0)
