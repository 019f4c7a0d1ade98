"""How much memory this machine has, and how much of it a process holds; little is known outside Linux."""

import os
import pathlib

GIB = 1 << 30
_KEPT = 0.9  # of free memory: the system and the parent process need some too
_UNKNOWN_GIB = 8.0


def free_memory_gib() -> float:
    """Memory that a batch may take, in GiB: nine tenths of what is free, within the container's limit."""
    free = _meminfo_bytes("MemAvailable")
    limits = [value for value in (free, _cgroup_bytes()) if value is not None]
    return _KEPT * min(limits) / GIB if limits else _UNKNOWN_GIB


def rss_mib(pid: int) -> float:
    """Memory that a process holds now, in MiB; 0 if it has ended."""
    try:
        pages = int(pathlib.Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / (1 << 20)


def _meminfo_bytes(key: str) -> int | None:
    try:
        lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), None)


def _cgroup_bytes() -> int | None:
    """The memory left under a container's limit; None without a limit."""
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            left = int(pathlib.Path(limit).read_text()) - int(pathlib.Path(used).read_text())
        except (OSError, ValueError):  # "max" is no number
            continue
        return max(left, 0)
    return None
