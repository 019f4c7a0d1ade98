"""The counters that ncu.py asks Nsight Compute for, and what it makes of them."""

import collections
import csv
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# https://docs.nvidia.com/nsight-compute/ProfilingGuide/index.html#metrics-reference; shares are of what the unit could do at its clock.
DURATION = "gpu__time_duration.sum"
_SHARES = {
    "tensor_percent": "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed",
    "sm_percent": "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "l2_percent": "lts__throughput.avg.pct_of_peak_sustained_elapsed",
    "dram_percent": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
}
_BYTES = ("dram__bytes_read.sum", "dram__bytes_write.sum")
METRICS = (DURATION, *_SHARES.values(), *_BYTES)
_NAME, _GRID = "Kernel Name", "Grid Size"


def read_csv(text: str) -> list[dict[str, Any]]:
    """Reads the launches in what `ncu --csv --page=raw --print-units=base` prints, behind whatever else is printed.

    Args:
        text: its standard output.

    Returns:
        In order, of each launch its name, its grid, and the counters by name; a counter that this GPU does not have is missing.
    """
    lines = [line for line in text.splitlines() if line.startswith('"')]
    rows = [row for row in csv.DictReader(lines) if row["ID"]]  # the row below the header has units
    return [
        {
            _NAME: row[_NAME],
            _GRID: row[_GRID],
            **{key: float(row[key].replace(",", "")) for key in METRICS if row.get(key, "n/a") != "n/a"},
        }
        for row in rows
    ]


def by_kernel(launches: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Puts the launches of the same kernel with the same grid together: the same layer of every block.

    Args:
        launches: from `read_csv`.

    Returns:
        Of each, the longest in sum first: name, grid, launches, mean_us, share_percent of the sum of all durations, the shares of peak
        (tensor_percent of the tensor cores' cycles, sm_percent, l2_percent, dram_percent; weighted by duration) and dram_mib, read and
        written by one launch.
    """
    groups = collections.defaultdict(list)
    for launch in launches:
        groups[launch[_NAME], launch[_GRID]].append(launch)
    total = sum(launch[DURATION] for launch in launches)
    rows = []
    for (name, grid), group in groups.items():
        spent = [launch[DURATION] for launch in group]
        shares = {
            key: round(float(np.average([launch[metric] for launch in group], weights=spent)), 1)
            for key, metric in _SHARES.items()
            if metric in group[0]
        }
        moved = sum(launch.get(metric, 0.0) for launch in group for metric in _BYTES) / len(group)
        rows.append(
            {
                "name": name,
                "grid": grid,
                "launches": len(group),
                "mean_us": round(float(np.mean(spent)) / 1e3, 1),
                "share_percent": round(100 * sum(spent) / total, 1),
                **shares,
                "dram_mib": round(moved / 2**20, 1),
            }
        )
    return sorted(rows, key=lambda row: -row["share_percent"])
