"""Attention: Einsums become MatMuls, and the scale goes where each TensorRT fuses it."""

import pytest
from export_graphs import declined, ops, rewrite

from vit_convert.export.rules import attention
from vit_convert.export.rules.softmax import ExpToSoftmax

SIGNATURE = """g (float[n, 5, 2, 4] q, float[n, 6, 2, 4] k, float[n, 6, 2, 4] v) => (float[n, 5, 2, 4] y)
    <float root = {2}, float scale = {0.5}>"""
NAMED = ("bqhd,bkhd->bhqk", "bhqk,bkhd->bqhd")
ELLIPSIS = ("...qhd,...khd->...hqk", "...hqk,...khd->...qhd")


def einsums(scores: str, mix: str, *, scaled: str = "Div (q, root)", axis: int = -1) -> str:
    return f"""{SIGNATURE} {{
        qs = {scaled} s = Einsum <equation = "{scores}"> (qs, k)
        w = Softmax <axis = {axis}> (s) y = Einsum <equation = "{mix}"> (w, v) }}"""


@pytest.mark.parametrize("opset", [17, 20])
@pytest.mark.parametrize("equations", [NAMED, ELLIPSIS])
def test_einsum_attention(opset, equations):
    model, count = rewrite(einsums(*equations), attention.EinsumAttention(), opset)
    assert count.applied == 1
    assert ops(model) == ["Mul", "Transpose", "Transpose", "Transpose", "MatMul", "Softmax", "MatMul", "Transpose"]


def test_another_equation_is_declined():
    text = einsums("bqhd,bqhd->bhqd", NAMED[1]).replace("float[n, 6, 2, 4]", "float[n, 5, 2, 4]").replace("bhqk,bkhd", "bhqk,bqhk")
    assert "the scores Einsum is 'bqhd,bqhd->bhqd'" in declined(text, attention.EinsumAttention())


def test_softmax_over_the_queries_is_declined():
    assert declined(einsums(*NAMED, axis=2), attention.EinsumAttention()) == "the softmax is over axis 2, not the keys"


def test_scale_that_is_computed_is_declined():
    assert declined(einsums(*NAMED, scaled="Div (q, q)"), attention.EinsumAttention()) == "the scale is not a constant"


MATMULS = "g (float[n, 2, 5, 4] q, float[n, 2, 4, 6] k) => (float[n, 2, 5, 6] y) <float root = {2}, float scale = {0.5}>"


@pytest.mark.parametrize("opset", [17, 20])
@pytest.mark.parametrize("scaled", ["Mul (s, scale)", "Mul (scale, s)", "Div (s, root)"])
def test_scale_moves_to_the_query(opset, scaled):
    text = f"{MATMULS} {{ s = MatMul (q, k) t = {scaled} y = Softmax <axis = 3> (t) }}"
    model, count = rewrite(text, attention.ScaleOnQuery(), opset)
    assert count.applied == 1
    assert ops(model) == ["Mul", "MatMul", "Softmax"]
    assert model.graph[2].attributes["axis"].as_int() == 3


def test_bias_on_the_scores_does_not_match():
    assert declined(f"{MATMULS} {{ s = MatMul (q, k) t = Add (s, scale) y = Softmax <axis = 3> (t) }}", attention.ScaleOnQuery()) == ""


def test_temperature_that_is_computed_is_declined():
    text = f"{MATMULS} {{ s = MatMul (q, k) t = Mul (s, s) y = Softmax <axis = 3> (t) }}"
    assert declined(text, attention.ScaleOnQuery()) == "the scale is not a constant"


def softmax(axis: str = "1", floor: str = "least") -> str:
    return f"""g (float[n, 3] x) => (float[n, 3] y)
        <float least = {{-inf}}, float zero = {{0}}, int64[1] axes = {{{axis}}}, int64[2] shape = {{0, 1}}> {{
        m = ReduceMax <axes = [{axis}], keepdims = 0> (x) f = Max ({floor}, m) k = Reshape (f, shape) d = Sub (x, k) e = Exp (d)
        s = ReduceSum <keepdims = 0> (e, axes) t = Reshape (s, shape) y = Div (e, t) }}"""


def test_softmax_spelt_out():
    model, count = rewrite(softmax(), ExpToSoftmax(), 17)
    assert count.applied == 1
    assert ops(model) == ["Softmax"]


def test_softmax_with_another_floor_is_declined():
    assert declined(softmax(floor="zero"), ExpToSoftmax(), 17) == "the maximum has the floor 0.0, not minus infinity"


def test_softmax_over_the_first_axis_is_declined():
    text = softmax("0").replace("float[n, 3]", "float[3, 3]")
    assert declined(text, ExpToSoftmax(), 17) == "the maximum is over axes [0], not the last one of 2"
