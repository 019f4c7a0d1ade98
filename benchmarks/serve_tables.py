"""Tables of the results of benchmarks/serve.py and benchmarks/serve_accidents.py."""

from collections.abc import Mapping
from typing import Any

from markdown_table import markdown


def serve_table(record: Mapping[str, Any]) -> str:
    """Throughput and latency of each way, by the number of callers."""
    rows = [
        [
            f"{row['way']}, {row['callers']} callers",
            f"{row['answers_per_second']:,.0f}",
            f"{row['p50_ms']:.1f} ms",
            f"{row['p99_ms']:.1f} ms",
            f"{row['max_abs_error']:.1e}",
        ]
        for row in record["rows"]
    ]
    return markdown(("way", "images/s", "P50", "P99", "max error to JAX"), rows)


def accidents_table(record: Mapping[str, Any]) -> str:
    """What the clients of each model saw while models were reloaded and an engine failed."""
    rows = [
        [
            f"`{name}`",
            f"{row['answers']:,}",
            str(len(row["wrong"])),
            str(len(row["lost"])),
            f"{row['p50_ms']:.0f} ms",
            f"{row['p99_ms']:.0f} ms",
            f"{row['max_abs_error']:.1e}",
        ]
        for name, row in record["rows"].items()
    ]
    return markdown(("model", "answers", "wrong", "lost", "P50", "P99", "max error to JAX"), rows)
