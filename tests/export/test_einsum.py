"""Einsums that jax2onnx writes for `@` and jnp.einsum become MatMuls."""

import pytest
from export_graphs import declined, ops, rewrite

from vit_convert.export.rules.einsum import EinsumToMatMul, EinsumWithoutExpand


def einsum(equation: str, a: str, b: str, y: str) -> str:
    return f'g (float[{a}] a, float[{b}] b) => (float[{y}] y) {{ y = Einsum <equation = "{equation}"> (a, b) }}'


@pytest.mark.parametrize("opset", [17, 20])
@pytest.mark.parametrize(
    ("equation", "a", "b", "y", "expected"),
    [
        ("abc,cd->abd", "n, 3, 4", "4, 5", "n, 3, 5", ["MatMul"]),
        ("bqhd,bkhd->bhqk", "n, 3, 2, 4", "n, 5, 2, 4", "n, 2, 3, 5", ["Transpose", "Transpose", "MatMul"]),
        ("bhqd,bhkd->bhqk", "n, 2, 3, 4", "n, 2, 5, 4", "n, 2, 3, 5", ["Transpose", "MatMul"]),
        ("bhqk,bhkd->bhqd", "n, 2, 3, 5", "n, 2, 5, 4", "n, 2, 3, 4", ["MatMul"]),
        ("bhqk,bkhd->bqhd", "n, 2, 3, 5", "n, 5, 2, 4", "n, 3, 2, 4", ["Transpose", "MatMul", "Transpose"]),
        ("bsd,dhk->bshk", "n, 3, 6", "6, 2, 4", "n, 3, 2, 4", ["Reshape", "MatMul", "Reshape"]),
        ("bsd,dhk->bhsk", "n, 3, 6", "6, 2, 4", "n, 2, 3, 4", ["Reshape", "MatMul", "Reshape", "Transpose"]),
        ("bshk,hkd->bsd", "n, 3, 2, 4", "2, 4, 6", "n, 3, 6", ["Reshape", "Reshape", "MatMul"]),
    ],
)
def test_matrix_products(opset, equation, a, b, y, expected):
    model, count = rewrite(einsum(equation, a, b, y), EinsumToMatMul(), opset)
    assert count.applied == 1
    assert sorted(ops(model)) == sorted(expected)
    assert "Einsum" not in ops(model)


def test_weight_on_the_left_moves_to_the_right():
    text = 'g (float[n, 3, 2] x) => (float[n, 3, 4] y) <float[2, 4] w = {1,2,3,4,5,6,7,8}> { y = Einsum <equation = "df,bsd->bsf"> (w, x) }'
    model, count = rewrite(text, EinsumToMatMul())
    assert count.applied == 1
    assert ops(model) == ["MatMul"]
    assert model.graph[0].inputs[1].name == "w"  # where TensorRT recognises a linear layer


@pytest.mark.parametrize(
    ("equation", "a", "b", "y", "reason"),
    [
        ("ab,cd->abcd", "n, 3", "4, 5", "n, 3, 4, 5", "is not a matrix product"),
        ("abc,cd->ad", "n, 3, 4", "4, 5", "n, 5", "is not a matrix product"),
        ("abc,c->ab", "n, 3, 4", "4", "n, 3", "has more or fewer axes"),
        ("bijk,bkl->bijl", "n, 2, 3, 4", "n, 4, 5", "n, 2, 3, 5", "has more or fewer axes"),
        ("...k,kl->...l", "n, 3, 4", "4, 5", "n, 3, 5", "has an ellipsis"),
        ("aab,bc->ac", "3, 3, 4", "4, 5", "3, 5", "repeats a label"),
        ("abn,nab->a", "2, 3, n", "n, 2, 3", "2", "has more or fewer axes"),
    ],
)
def test_everything_else_is_declined(equation, a, b, y, reason):
    assert reason in declined(einsum(equation, a, b, y), EinsumToMatMul())


def test_sum_over_a_merged_dynamic_axis_is_declined():
    assert declined(einsum("snk,nkd->sd", "3, n, 2", "n, 2, 5", "3, 5"), EinsumToMatMul()) == "the merged axis n is dynamic"


EXPANDED = """g (float[n, 3, 4] x) => (float[n, 3, 2] y)
    <float[4, 2] w = {1,2,3,4,5,6,7,8}, int64[2] axes = {0, 1}, int64[4] shape = {1, 3, 4, 2}> {
    u = Unsqueeze (w, axes) e = Expand (u, shape) y = Einsum <equation = "EQUATION"> (x, e) }"""


@pytest.mark.parametrize("opset", [17, 20])
def test_weight_is_not_repeated_for_every_token(opset):
    model, count = rewrite(EXPANDED.replace("EQUATION", "...d,...df->...f"), EinsumWithoutExpand(), opset)
    assert count.applied == 1
    assert ops(model) == ["Einsum"]
    assert model.graph[0].attributes["equation"].as_string() == "abd,df->abf"


def test_equation_without_ellipsis_is_declined():
    assert "does not begin every term with an ellipsis" in declined(EXPANDED.replace("EQUATION", "bsd,asdf->bsf"), EinsumWithoutExpand())
