"""The table of `benchmarks/batch.py`."""

from collections.abc import Mapping
from typing import Any

from markdown_table import markdown

_MODELS = {
    "mu": "mu/16 at 32",
    "s16": "S/16 at 224",
    "mixed": "Ti/16, S/32, B/32, B/16, L/16, R26+S/32, Mixer-B/32, Swin-T",
}


def batch_table(record: Mapping[str, Any]) -> str:
    """One row per zoo: the time per file in a loop of single conversions, and in the batch."""
    header = [
        "zoo",
        "files",
        "loop, a file",
        "batch, a file",
        "faster",
        "CPU, loop / batch",
        "peak of the batch",
        "again",
    ]
    rows = [
        [
            _MODELS[row["zoo"]],
            str(row["files"]),
            f"{row['loop_seconds_a_file']:.1f} s",
            f"{row['batch_seconds_a_file']:.2f} s",
            f"{row['speedup']:.1f}×",
            f"{row['loop_cpu_seconds_a_file']:.1f} / {row['batch_cpu_seconds_a_file']:.2f} s",
            f"{row['batch_peak_rss_mib'] / 1024:.1f} of {row['memory_gib']:.0f} GiB",
            f"{row['again_seconds']:.1f} s",
        ]
        for row in record["rows"]
    ]
    return markdown(header, rows)
