"""Slices get constant ends."""

import re

import pytest
from export_graphs import declined, ops, rewrite

from vit_convert.export.rules.slices import ConstantSlice


def sliced(starts, end, output, *, x="n, 5, 4", steps="1, 1, 1"):
    """Of all three axes; the first one's end is read from the input, the second one's is given."""
    return f"""g (float[{x}] x) => (float[{output}] y)
        <int64[3] starts = {{{starts}}}, int64[1] end = {{{end}}}, int64[1] width = {{4}}, int64[1] zero = {{0}},
        int64[3] axes = {{0, 1, 2}}, int64[3] steps = {{{steps}}}> {{
        s = Shape (x) batch = Gather (s, zero) ends = Concat <axis = 0> (batch, end, width) y = Slice (x, starts,
        ends, axes, steps) }}"""


@pytest.mark.parametrize("opset", [17, 20])
@pytest.mark.parametrize(
    ("starts", "end", "output"),
    [
        ("0, 2, 0", "5", "n, 3, 4"),
        ("0, 0, 0", "3", "n, 3, 4"),
        ("0, -2, 0", "9", "n, 2, 4"),
        ("0, 1, 2", "-1", "n, 3, 2"),
        ("0, -9, 0", "3", "n, 3, 4"),
    ],
)
def test_ends_become_constant(opset, starts, end, output):
    model, count = rewrite(sliced(starts, end, output), ConstantSlice(), opset)
    assert count.applied == 1
    assert ops(model) == ["Slice"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (sliced("0, 0, 0", "5", "n, 3, 4", steps="1, 2, 1"), "not every step is 1"),
        (sliced("0, 1, 0", "3", "n, k, 4", x="n, m, 4"), "axis 1 goes from m to k, which are not both known"),
        (sliced("0, 0, 0", "5", "n, 5, 4"), "no axis gets shorter"),
        (sliced("1, 0, 0", "5", "k, 5, 4"), "axis 0 goes from n to k, which are not both known"),
    ],
)
def test_what_is_left_alone(text, reason):
    assert declined(text, ConstantSlice()) == reason


@pytest.mark.parametrize("computed", ["starts", "axes", "steps"])
def test_starts_axes_or_steps_that_are_said_at_run_time_are_declined(computed):
    text = re.sub(rf"int64\[3\] {computed} = {{[^}}]*}},? ?", "", sliced("0, 0, 0", "3", "n, 3, 4")).replace(", >", ">")
    text = text.replace("x) =>", f"x, int64[3] {computed}) =>")
    assert declined(text, ConstantSlice()) == "starts, axes or steps are not constant"


def test_constant_ends_are_nothing_to_report():
    text = """g (float[n, 5, 4] x) => (float[n, 3, 4] y)
        <int64[1] starts = {2}, int64[1] ends = {5}, int64[1] axes = {1}, int64[1] steps = {1}> {
        y = Slice (x, starts, ends, axes, steps) }"""
    _, count = rewrite(text, ConstantSlice())
    assert (count.applied, count.declined) == (0, {})
