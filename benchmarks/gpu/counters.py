"""The counters that ncu.py requests from Nsight Compute, and their evaluation."""

import collections
import csv
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# https://docs.nvidia.com/nsight-compute/ProfilingGuide/index.html#metrics-reference; shares are of what the unit could
# do at its clock.
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
        In order, of each launch its name, its grid, and those counters by name that could be read.
    """
    lines = [line for line in text.splitlines() if line.startswith('"')]
    rows = [row for row in csv.DictReader(lines) if row["ID"]]  # the row below the header has units
    # A counter that could not be read is "n/a", and one that the GPU does not have has no column.
    return [
        {
            _NAME: row[_NAME],
            _GRID: row[_GRID],
            **{key: float(row[key].replace(",", "")) for key in METRICS if row.get(key, "n/a") != "n/a"},
        }
        for row in rows
    ]


def by_kernel(launches: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Groups the launches of the same kernel with the same grid, which are the same layer of every block.

    Args:
        launches: from `read_csv`, each with its duration.

    Returns:
        Of each, the longest in sum first: name, grid, launches, mean_us, share_percent of the sum of all durations, the
            shares of peak
        (tensor_percent of the tensor cores' cycles, sm_percent, l2_percent, dram_percent; weighted by duration) and
        dram_mib, read and written by one launch; the last two as far as they could be read.
    """
    groups = collections.defaultdict(list)
    for launch in launches:
        groups[launch[_NAME], launch[_GRID]].append(launch)
    total = sum(launch[DURATION] for launch in launches)
    rows: list[dict[str, Any]] = []
    for (name, grid), group in groups.items():
        spent = sum(launch[DURATION] for launch in group)
        row = {"name": name, "grid": grid, "launches": len(group), "mean_us": round(spent / len(group) / 1e3, 1)}
        row["share_percent"] = round(100 * spent / total, 1)
        for key, metric in _SHARES.items():
            if read := [launch for launch in group if metric in launch]:
                row[key] = round(
                    float(
                        np.average([launch[metric] for launch in read], weights=[launch[DURATION] for launch in read])
                    ),
                    1,
                )
        if read := [launch for launch in group if launch.keys() >= {*_BYTES}]:
            row["dram_mib"] = round(sum(launch[metric] for launch in read for metric in _BYTES) / len(read) / 2**20, 1)
        rows.append(row)
    return sorted(rows, key=lambda row: -row["share_percent"])
