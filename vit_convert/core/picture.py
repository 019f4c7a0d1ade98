"""Draws pictures with matplotlib, if it is installed."""

import os
from collections.abc import Callable
from typing import Any

from vit_convert.core.bundle import atomic


def draw(path: str | os.PathLike[str], size: tuple[float, float], paint: Callable[[Any], None]) -> str:
    """Draws one picture.

    Args:
        path: the `.png` or `.svg` to write.
        size: (width, height) in inches.
        paint: given matplotlib's Axes, draws on them.

    Returns:
        "", or why nothing was drawn.
    """
    try:
        import matplotlib
    except ImportError:
        return "matplotlib is not installed"
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=size)
    paint(axes)
    axes.legend(fontsize=7)
    figure.tight_layout()
    with atomic(path) as temporary:
        figure.savefig(temporary, format=os.path.splitext(path)[1][1:], dpi=120)
    pyplot.close(figure)
    return ""
