"""Attention: Einsums become MatMuls, and the scale goes where each TensorRT fuses it."""

import re

import pytest
from export_graphs import declined, ops, rewrite

from vit_convert.export.rules import attention
from vit_convert.export.rules.softmax import ExpToSoftmax

SIGNATURE = """g (float[n, 5, 2, 4] q, float[n, 6, 2, 4] k, float[n, 6, 2, 4] v) => (float[n, 5, 2, 4] y)
    <float root = {2}, float scale = {0.5}>"""
NAMED = ("bqhd,bkhd->bhqk", "bhqk,bkhd->bqhd")
ELLIPSIS = ("...qhd,...khd->...hqk", "...hqk,...khd->...qhd")


def einsums(scores: str, mix: str, *, scaled: str = "Div (q, root)", axis: str = "") -> str:
    return f"""{SIGNATURE} {{
        qs = {scaled} s = Einsum <equation = "{scores}"> (qs, k)
        w = Softmax {axis} (s) y = Einsum <equation = "{mix}"> (w, v) }}"""


AXES = ["<axis = -1>", "<axis = 3>", ""]  # of the keys: the last of four, which is also what an absent attribute means


@pytest.mark.parametrize("opset", [17, 20])
@pytest.mark.parametrize("equations", [NAMED, ELLIPSIS])
@pytest.mark.parametrize("axis", AXES)
def test_einsum_attention(opset, equations, axis):
    model, count = rewrite(einsums(*equations, axis=axis), attention.EinsumAttention(), opset)
    assert count.applied == 1
    assert ops(model) == ["Mul", "Transpose", "Transpose", "Transpose", "MatMul", "Softmax", "MatMul", "Transpose"]


def test_another_equation_is_declined():
    text = (
        einsums("bqhd,bqhd->bhqd", NAMED[1])
        .replace("float[n, 6, 2, 4]", "float[n, 5, 2, 4]")
        .replace("bhqk,bkhd", "bhqk,bqhk")
    )
    assert "the scores Einsum is 'bqhd,bqhd->bhqd'" in declined(text, attention.EinsumAttention())


def test_another_mix_is_declined():
    text = einsums(NAMED[0], "bhqk,bkhd->bhqd").replace("float[n, 5, 2, 4] y", "float[n, 2, 5, 4] y")
    assert declined(text, attention.EinsumAttention()) == "the mix Einsum is 'bhqk,bkhd->bhqd'"


def test_attention_with_an_axis_more_is_declined():
    """Windows beside the batch: an ellipsis takes them, the permutations of four axes do not."""
    text = einsums(*ELLIPSIS)
    for value in ("q", "k", "v", "y"):
        text = re.sub(rf"float\[n, (\d), 2, 4\] {value}\b", rf"float[n, 3, \1, 2, 4] {value}", text)
    assert declined(text, attention.EinsumAttention()) == "the query is not [batch, tokens, heads, size]"


def test_softmax_over_the_queries_is_declined():
    assert (
        declined(einsums(*NAMED, axis="<axis = 2>"), attention.EinsumAttention())
        == "the softmax is over axis 2, not the keys"
    )


@pytest.mark.parametrize("scaled", ["Div (q, q)", "Div (q, roots)"])
def test_scale_that_is_computed_or_no_single_number_is_declined(scaled):
    text = einsums(*NAMED, scaled=scaled).replace("float root", "float[4] roots = {1, 2, 3, 4}, float root")
    assert declined(text, attention.EinsumAttention()) == "the scale is not a constant"


MATMULS = (
    "g (float[n, 2, 5, 4] q, float[n, 2, 4, 6] k) => (float[n, 2, 5, 6] y) <float root = {3}, float scale = "
    "{0.3}, float[1] one = {0.7}>"
)


@pytest.mark.parametrize("opset", [17, 20])
@pytest.mark.parametrize(
    "scaled", ["Mul (s, scale)", "Mul (scale, s)", "Div (s, root)", "Mul (s, one)", "Div (s, one)"]
)
@pytest.mark.parametrize(("axis", "meant"), [("<axis = 3>", 3), ("<axis = -1>", -1), ("<axis = 2>", 2), ("", -1)])
def test_scale_moves_to_the_query(opset, scaled, axis, meant):
    """Whatever the softmax goes over."""
    text = f"{MATMULS} {{ s = MatMul (q, k) t = {scaled} y = Softmax {axis} (t) }}"
    model, count = rewrite(text, attention.ScaleOnQuery(), opset)
    assert count.applied == 1
    assert ops(model) == ["Mul", "MatMul", "Softmax"]
    assert model.graph[2].attributes["axis"].as_int() == meant


def test_bias_on_the_scores_does_not_match():
    assert (
        declined(
            f"{MATMULS} {{ s = MatMul (q, k) t = Add (s, scale) y = Softmax <axis = 3> (t) }}", attention.ScaleOnQuery()
        )
        == ""
    )


def test_temperature_that_is_computed_is_declined():
    text = f"{MATMULS} {{ s = MatMul (q, k) t = Mul (s, s) y = Softmax <axis = 3> (t) }}"
    assert declined(text, attention.ScaleOnQuery()) == "the scale is not a constant"


def softmax(
    axis: str = "1", floor: str = "least", total: str = "1", shapes: tuple[str, str] = ("0, 1", "0, 1"), opset: int = 17
) -> str:
    peak = f"<axes = [{axis}], keepdims = 0> (x)" if opset < 18 else "<keepdims = 0> (x, axes)"
    return f"""g (float[n, 3] x) => (float[n, 3] y)
        <float least = {{-inf}}, float zero = {{0}}, int64[1] axes = {{{axis}}}, int64[1] over = {{{total}}},
        int64[2] first = {{{shapes[0]}}}, int64[2] second = {{{shapes[1]}}}> {{
        m = ReduceMax {peak} f = Max ({floor}, m) k = Reshape (f, first) d = Sub (x, k) e = Exp (d)
        s = ReduceSum <keepdims = 0> (e, over) t = Reshape (s, second) y = Div (e, t) }}"""


@pytest.mark.parametrize("opset", [17, 20])
@pytest.mark.parametrize(("axis", "total"), [("1", "1"), ("-1", "-1"), ("1", "-1")])
def test_softmax_spelt_out(opset, axis, total):
    model, count = rewrite(softmax(axis, total=total, opset=opset), ExpToSoftmax(), opset)
    assert count.applied == 1
    assert ops(model) == ["Softmax"]


def test_softmax_spelt_out_over_the_last_of_three_axes():
    text = softmax("2", total="2", shapes=("0, 2, 1", "0, 2, 1")).replace("float[n, 3]", "float[n, 2, 3]")
    model, count = rewrite(text.replace("int64[2]", "int64[3]"), ExpToSoftmax(), 17)
    assert (count.applied, ops(model)) == (1, ["Softmax"])


@pytest.mark.parametrize(("floor", "said"), [("zero", "0.0"), ("high", "None")])
def test_softmax_with_another_floor_is_declined(floor, said):
    text = softmax(floor=floor).replace("(float[n, 3] x)", "(float[n, 3] x, float high)")
    assert declined(text, ExpToSoftmax(), 17) == f"the maximum has the floor {said}, not minus infinity"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"axis": "0"}, "the maximum is over axes [0], not the last one of 2"),
        ({"total": "0"}, "the sum is over axes [0], not the last one of 2"),
        ({"shapes": ("1, 3", "0, 1")}, "a reduction is given the shape ('1', '3')"),
        ({"shapes": ("0, 1", "1, 3")}, "a reduction is given the shape ('1', '3')"),
    ],
)
def test_softmax_over_something_else_is_declined(changes, reason):
    """On a square, where each of these is a sound graph."""
    assert declined(softmax(**changes).replace("float[n, 3]", "float[3, 3]"), ExpToSoftmax(), 17) == reason
