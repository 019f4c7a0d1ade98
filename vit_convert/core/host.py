"""What machine this is, for the record of a measurement."""

import pathlib
import platform


def cpu_model() -> str:
    """The vendor's name of the processor, or what Python knows of it where Linux does not tell."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
