"""How all figures are drawn: as SVG, readable on a light and a dark page; a browser shows numbers on hovering."""

import io
import re
from collections.abc import Callable
from typing import Any

COLOURS = {"fp32": "#64748b", "fp16": "#2563eb", "bf16": "#0d9488", "int8": "#d97706", "fp8": "#be123c"}
_INK = "#010203"  # stands for the page's own text colour
_TIP = "tip:"  # begins the id of an element that has a tip
_STYLE: Any = {  # of matplotlib, whose stubs list every key
    "svg.fonttype": "none",
    "svg.hashsalt": "vit_convert",  # the same report gives the same file
    "font.family": "sans-serif",
    "font.size": 10,
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
        rows: makes room for so many bars.

    Returns:
        An SVG element.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(6.2, max(3.7, 0.24 * rows + 1.2)), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.subplots()
        axes.set(title=title, xlabel=x, ylabel=y)
        paint(axes)
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


def apart(svg: str, number: int) -> str:
    """The figure with ids of its own: those of one page share none."""
    return re.sub(r'(id="|href="#|url\(#)', rf"\g<1>f{number}-", svg)


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace('"', "&quot;")


def tip(artist: Any, text: str) -> None:
    """Lets a browser show a text where the pointer is over this."""
    artist.set_gid(_TIP + text)  # matplotlib escapes it
