"""Plots latency against throughput."""

import os
from collections.abc import Sequence
from typing import Any

from vit_convert.core.benchmark_results import BenchmarkRow
from vit_convert.core.picture import draw
from vit_convert.core.recommend import RESIDENT


def plot_rows(rows: Sequence[BenchmarkRow], path: str | os.PathLike[str], *, title: str) -> str:
    """Draws the benchmark's rows: a line for each precision, number of streams and kind of transfer, a point for each
    batch.

    Args:
        rows: of the benchmark.
        path: the `.png` or `.svg` to write.
        title: above the picture.

    Returns:
        "", or why nothing was drawn.
    """
    lines: dict[str, list[BenchmarkRow]] = {}
    for row in sorted(rows, key=lambda row: row.batch):
        copied = "" if row.transfers == RESIDENT else ", with transfers"
        lines.setdefault(
            f"{row.precision}, {row.streams} streams{copied}{'' if row.cuda_graph else ', no graph'}", []
        ).append(row)

    def paint(axes: Any) -> None:
        for label, points in lines.items():
            places = [(row.images_per_second, row.p50_ms) for row in points]
            axes.plot(*zip(*places), marker="o", label=label)
            for row, place in zip(points, places):
                axes.annotate(str(row.batch), place, textcoords="offset points", xytext=(4, 4), fontsize=7)
        axes.set(
            xlabel="images/s (runs queued ahead)",
            ylabel="median latency in ms (one run at a time)",
            title=title,
            yscale="log",
        )
        axes.grid(alpha=0.3)

    return draw(path, (8, 5), paint)
