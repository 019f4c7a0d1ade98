"""The margins and the numbers of a figure: what stands beside an axis has room, and no power needs a superscript."""

import re

import pytest

pytest.importorskip("matplotlib")

from vit_convert.report.drawing import draw


def texts(svg: str) -> dict[str, tuple[float, float]]:
    """Where each text stands, in points; of one at the left or slanted, its end."""
    found = re.findall(r'<text [^>]*?x="([\d.-]+)" y="([\d.-]+)"[^>]*>([^<]*)</text>', svg)
    found += re.findall(r"<text [^>]*?translate\(([\d.-]+) ([\d.-]+)\)[^>]*>([^<]*)</text>", svg)
    return {text: (float(x), float(y)) for x, y, text in found}


def height(svg: str) -> float:
    return float(re.search(r'viewBox="0 0 [\d.]+ ([\d.]+)"', svg)[1])


def test_long_names_at_the_left_have_room():
    name = "m" * 40

    def paint(axes):
        axes.plot([1.0], [0])
        axes.set_yticks([0], [name], fontsize=7)

    x, _ = texts(draw(paint, "title", "seconds", ""))[name]
    assert x >= 40 * 7 * 0.55  # the end of 40 letters of 7 points


def test_slanted_names_below_have_room():
    def paint(axes):
        axes.plot([0, 1], [1.0, 2.0])
        axes.set_xticks([0, 1], ["stage_3/block_17", "short"], rotation=30, ha="right")

    svg = draw(paint, "title", "block", "error")
    found = texts(svg)
    assert found["block"][1] <= height(svg) and found["stage_3/block_17"][1] < found["block"][1]


@pytest.mark.parametrize(
    "values, shown",
    [((1e-6, 1e-2), {"1e-06", "1e-05", "0.0001", "0.001", "0.01"}), ((3.0, 40.0), {"5", "10", "20"})],
)
def test_a_logarithmic_axis_names_its_powers_in_full(values, shown):
    def paint(axes):
        axes.semilogy([0, 1], values)

    found = texts(draw(paint, "title", "x", "y"))
    assert shown <= found.keys() and not any("$" in text for text in found)
