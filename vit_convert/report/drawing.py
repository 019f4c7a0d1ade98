"""How all figures are drawn: as SVG, readable on a light and a dark page; a browser shows numbers on hovering."""

import io
import math
import re
from collections.abc import Callable
from typing import Any

COLOURS = {"fp32": "#64748b", "fp16": "#2563eb", "bf16": "#0d9488", "int8": "#d97706", "fp8": "#be123c"}
_INK = "#010203"  # placeholder for the page's own text colour
_TIP = "tip:"  # begins the id of an element that has a tip
_SIZE = 6.2, 3.7  # of a figure, in inches
_CHARACTER = 0.6  # width of a letter over its height, on average, in the fonts of browsers
_STYLE: Any = {  # matplotlib settings, whose stubs list every key
    "svg.fonttype": "none",
    "svg.hashsalt": "vit_convert",  # the same report gives the same file
    "font.family": "sans-serif",
    "font.size": 10,
    "text.parse_math": False,  # half of the time of a figure, for the superscripts of powers of ten
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "legend.frameon": False,
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor"), _INK),
}


def draw(paint: Callable[[Any], None], title: str, x: str, y: str, rows: int = 0) -> str:
    """Paints one figure.

    Args:
        paint: fills the axes.
        title: above them.
        x, y: what the axes measure.
        rows: makes room for this many bars.

    Returns:
        An SVG element.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_SIZE[0], max(_SIZE[1], 0.24 * rows + 1.2)))
        FigureCanvasSVG(figure)
        axes = figure.subplots()
        axes.set(title=title, xlabel=x, ylabel=y)
        paint(axes)
        _name_powers(axes)
        _leave_room(figure, axes)
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    svg = re.sub(
        r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :].replace(_INK, "currentColor"), flags=re.DOTALL
    )
    svg = re.sub(
        r'(<svg[^>]*?) height="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1), count=1
    )
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{_escaped(title)}"', 1)
    return re.sub(rf'<g id="{_TIP}([^"]*)">', lambda found: f"<g><title>{found[1]}</title>", svg)


def _name_powers(axes: Any) -> None:
    """Writes 1e-05 beside logarithmic axes, and 2 and 5 between where there are few powers."""
    from matplotlib import ticker

    for axis in (axes.xaxis, axes.yaxis):
        if axis.get_scale() == "log":
            low, high = sorted(axis.get_view_interval())
            axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5) if high < 1e3 * low else (1,)))
            if isinstance(axis.get_major_formatter(), ticker.LogFormatter):
                axis.set_major_formatter(ticker.FormatStrFormatter("%g"))
            axis.set_minor_locator(ticker.NullLocator())


def _leave_room(figure: Any, axes: Any) -> None:
    """Sets the margins by the length of what stands in them: matplotlib's own layout draws every figure thrice."""
    width, height = figure.get_size_inches()
    left = max(map(_inches, axes.get_yticklabels()), default=0.0) + (0.5 if axes.get_ylabel() else 0.25)
    slanted = [_inches(label) * math.sin(math.radians(label.get_rotation())) for label in axes.get_xticklabels()]
    below = 0.55 + max(slanted, default=0.0)
    figure.subplots_adjust(min(left / width, 0.6), below / height, 1 - 0.15 / width, 1 - 0.35 / height)


def _inches(label: Any) -> float:
    """About the length of a text."""
    return float(len(label.get_text()) * _CHARACTER * label.get_fontsize() / 72)  # 72 points an inch


def apart(svg: str, number: int) -> str:
    """The figure with unique ids, because figures on one page must not share any."""
    return re.sub(r'(id="|href="#|url\(#)', rf"\g<1>f{number}-", svg)


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace('"', "&quot;")


def tip(artist: Any, text: str) -> None:
    """Lets a browser show a text while the pointer is over this element."""
    artist.set_gid(_TIP + text)  # matplotlib escapes it
