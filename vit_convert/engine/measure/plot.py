"""Latency against throughput, as a picture."""

import os
from collections.abc import Sequence

from vit_convert.core.benchmark_results import BenchmarkRow
from vit_convert.core.bundle import atomic
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
    try:
        import matplotlib
    except ImportError:
        return "matplotlib is not installed"
    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines: dict[str, list[BenchmarkRow]] = {}
    for row in sorted(rows, key=lambda row: row.batch):
        copied = "" if row.transfers == RESIDENT else ", with transfers"
        lines.setdefault(
            f"{row.precision}, {row.streams} streams{copied}{'' if row.cuda_graph else ', no graph'}", []
        ).append(row)
    figure, axes = pyplot.subplots(figsize=(8, 5))
    for label, points in lines.items():
        axes.plot([row.images_per_second for row in points], [row.p50_ms for row in points], marker="o", label=label)
        for row in points:
            axes.annotate(
                str(row.batch),
                (row.images_per_second, row.p50_ms),
                textcoords="offset points",
                xytext=(4, 4),
                fontsize=7,
            )
    axes.set(
        xlabel="images/s (runs queued ahead)",
        ylabel="median latency in ms (one run at a time)",
        title=title,
        yscale="log",
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.tight_layout()
    with atomic(path) as temporary:
        figure.savefig(temporary, format=os.path.splitext(path)[1][1:], dpi=120)
    pyplot.close(figure)
    return ""
