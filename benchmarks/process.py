"""Runs one command in a fresh process and measures it."""

import contextlib
import dataclasses
import os
import pathlib
import subprocess
import threading
import time
from collections.abc import Sequence

_POLL_SECONDS = 0.02


@dataclasses.dataclass(frozen=True)
class Taken:
    """The resources that a process used, including its children.

    Attributes:
        wall_seconds: from starting it to its end.
        cpu_seconds: user and system time.
        peak_rss_mib: largest resident memory. The kernel's high-water mark of the largest single process, or the
            largest sum over the process and its children that was seen by looking every 20 ms, whichever is more.
        load_before: load average of the machine over the minute before.
        output: standard output.
        exit_code: 0 for success.
    """

    wall_seconds: float
    cpu_seconds: float
    peak_rss_mib: float
    load_before: float
    output: str
    exit_code: int


def run(
    command: Sequence[str], *, cwd: str | os.PathLike[str] | None = None, errors: str | os.PathLike[str] = os.devnull
) -> Taken:
    """Runs a command to its end.

    Args:
        command: program and arguments.
        cwd: folder to run in.
        errors: file that gets standard error.

    Returns:
        What it took.
    """
    load = os.getloadavg()[0]
    with open(errors, "w") as error_file:
        started = time.perf_counter()
        process = subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=error_file, text=True)
        lines: list[str] = []
        assert process.stdout is not None
        reader = threading.Thread(target=lines.extend, args=(process.stdout,))
        reader.start()
        ended, sampled = threading.Event(), [0]
        sampler = threading.Thread(target=_sample, args=(process.pid, ended, sampled))
        sampler.start()
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        ended.set()
        sampler.join()
        reader.join()
    peak = max(usage.ru_maxrss * 1024, sampled[0])
    return Taken(
        round(wall, 3),
        round(usage.ru_utime + usage.ru_stime, 3),
        round(peak / 2**20, 1),
        round(load, 2),
        "".join(lines),
        process.returncode,
    )


def _sample(pid: int, ended: threading.Event, largest: list[int]) -> None:
    page = os.sysconf("SC_PAGE_SIZE")
    while not ended.wait(_POLL_SECONDS):
        largest[0] = max(largest[0], sum(_resident_pages(each) for each in _family(pid)) * page)


def _family(pid: int) -> list[int]:
    found = [pid]
    with contextlib.suppress(OSError):  # it may end meanwhile
        for task in pathlib.Path(f"/proc/{pid}/task").glob("*/children"):
            found += [member for child in task.read_text().split() for member in _family(int(child))]
    return found


def _resident_pages(pid: int) -> int:
    try:
        return int(pathlib.Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0
