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


def margins(paint, x="", y=""):
    """(left, bottom, right, top) of the axes, in inches, and the figure's height."""
    found = []

    def painted(axes):
        paint(axes)
        found.append(axes)

    draw(painted, "title", x, y)
    figure = found[0].figure
    (width, height), place = figure.get_size_inches(), found[0].get_position()
    return place.x0 * width, place.y0 * height, (1 - place.x1) * width, (1 - place.y1) * height


def test_margins_are_as_wide_as_what_stands_in_them():
    def bare(axes):
        axes.set_yticks([])
        axes.set_xticks([])

    def named(axes):
        axes.set_yticks([0, 1], ["n" * 10, "m" * 20], fontsize=7.2)
        axes.set_xticks([0], ["n" * 20], rotation=30, fontsize=7.2)

    # a quarter of an inch beside an axis without a label, half of one beside a label
    assert margins(bare) == pytest.approx((0.25, 0.55, 0.15, 0.35))
    assert margins(bare, y="error") == pytest.approx((0.5, 0.55, 0.15, 0.35))
    left, below, *rest = margins(named)
    letter = (left - 0.25) / 20  # of 7.2 points, a tenth of an inch
    assert 0.05 <= letter <= 0.08 and rest == pytest.approx([0.15, 0.35])
    assert below == pytest.approx(0.55 + 20 * letter / 2)  # the sine of 30 degrees is a half


def test_a_name_at_the_left_leaves_room_for_the_figure():
    def paint(axes):
        axes.set_yticks([0], ["m" * 500])

    svg = draw(paint, "title", "", "")
    width = float(re.search(r'viewBox="0 0 ([\d.]+)', svg)[1]) / 72
    assert margins(paint)[0] == pytest.approx(0.6 * width)


def test_the_figure_is_called_by_its_title_for_those_who_cannot_see_it():
    def paint(axes):
        axes.set_title("a title of its own")

    svg = draw(paint, 'a "title" <&', "", "")
    assert svg.startswith('<svg role="img" aria-label="a &quot;title&quot; &lt;&amp;"') and svg.count("<svg") == 1
    assert not re.match("<svg[^>]* (width|height)=", svg)
