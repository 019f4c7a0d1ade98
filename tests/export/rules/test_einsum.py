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


def test_a_product_is_one_whatever_its_labels_are_called():
    model, count = rewrite(einsum("b s d , d f -> b s f", "n, 3, 4", "4, 5", "n, 3, 5"), EinsumToMatMul())
    assert count.applied == 1 and ops(model) == ["MatMul"]


def test_two_dynamic_axes_that_a_reshape_copies():
    model, count = rewrite(einsum("bshk,hkd->bsd", "n, m, 2, 4", "2, 4, 6", "n, m, 6"), EinsumToMatMul())
    assert count.applied == 1
    shapes = [node.inputs[1].const_value.numpy().tolist() for node in model.graph if node.op_type == "Reshape"]
    assert sorted(shapes) == [[0, 0, 8], [8, 6]]


@pytest.mark.parametrize("swapped", [False, True])
def test_a_weight_on_the_right_stays_there(swapped):
    weights = "<float[2, 4] w = {1,2,3,4,5,6,7,8}, float[3, 2] v = {1,2,3,4,5,6}>"
    operands, result = ("v, w", "float[3, 4] y") if not swapped else ("w, v", "float[4, 3] y")
    equation = "sd,df->sf" if not swapped else "df,sd->fs"
    text = (
        f'g (float[n] x) => ({result}, float[n] z) {weights} {{ y = Einsum <equation = "{equation}"> '
        f"({operands}) z = Neg (x) }}"
    )
    model, count = rewrite(text, EinsumToMatMul())
    product = next(node for node in model.graph if node.op_type == "MatMul")
    assert count.applied == 1
    # of two weights none is the layer's: they stay in their order
    sources = [value.producer().inputs[0] if value.producer() else value for value in product.inputs]
    assert [value.name for value in sources] == (["w", "v"] if swapped else ["v", "w"])


def test_weight_on_the_left_moves_to_the_right():
    text = (
        "g (float[n, 3, 2] x) => (float[n, 3, 4] y) <float[2, 4] w = {1,2,3,4,5,6,7,8}> { y = Einsum <equation = "
        '"df,bsd->bsf"> (w, x) }'
    )
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
        ("bqd,bd->bq", "n, 3, 4", "n, 4", "n, 3", "has more or fewer axes"),  # no columns
        ("bd,bdk->bk", "n, 4", "n, 4, 5", "n, 5", "has more or fewer axes"),  # no rows
        ("bqd,bdkl->bqkl", "n, 3, 4", "n, 4, 5, 2", "n, 3, 5, 2", "has more or fewer axes"),  # two axes of columns
        ("abc,dc->ad", "n, 3, 4", "5, 4", "n, 5", "is not a matrix product"),  # b is summed by itself
        ("ac,cde->ad", "n, 4", "4, 5, 6", "n, 5", "is not a matrix product"),  # and here e
        ("ab,bcc->ac", "n, 4", "4, 5, 5", "n, 5", "repeats a label"),
        # what is summed is left to be found
        ("ab,bc", "n, 4", "4, 5", "n, 5", "does not spell two operands and a result"),
    ],
)
def test_everything_else_is_declined(equation, a, b, y, reason):
    assert reason in declined(einsum(equation, a, b, y), EinsumToMatMul())


def test_sum_over_a_merged_dynamic_axis_is_declined():
    assert (
        declined(einsum("snk,nkd->sd", "3, n, 2", "n, 2, 5", "3, 5"), EinsumToMatMul())
        == "the merged axis n is dynamic"
    )


EXPANDED = """g (float[n, 3, 4] x) => (float[n, 3, 2] y)
    <float[4, 2] w = {1,2,3,4,5,6,7,8}, int64[2] axes = {0, 1}, int64[4] shape = {1, 3, 4, 2}> {
    u = Unsqueeze (w, axes) e = Expand (u, shape) y = Einsum <equation = "EQUATION"> (x, e) }"""


@pytest.mark.parametrize("opset", [17, 20])
def test_weight_is_not_repeated_for_every_token(opset):
    model, count = rewrite(EXPANDED.replace("EQUATION", "...d,...df->...f"), EinsumWithoutExpand(), opset)
    assert count.applied == 1
    assert ops(model) == ["Einsum"]
    assert model.graph[0].attributes["equation"].as_string() == "abd,df->abf"


def test_axes_of_the_ellipsis_get_letters_that_are_free():
    """Two axes before, and one, of an equation that uses the first letters itself."""
    text = EXPANDED.replace("EQUATION", "...a,...ac->...c")
    model, count = rewrite(text, EinsumWithoutExpand())
    assert count.applied == 1 and model.graph[0].attributes["equation"].as_string() == "bda,ac->bdc"
    text = text.replace("float[n, 3, 4] x", "float[n, 4] x").replace("float[n, 3, 2] y", "float[n, 2] y")
    text = text.replace("int64[4] shape = {1, 3, 4, 2}", "int64[3] shape = {1, 4, 2}").replace(
        "int64[2] axes = {0, 1}", "int64[1] axes = {0}"
    )
    model, count = rewrite(text, EinsumWithoutExpand())
    assert count.applied == 1 and model.graph[0].attributes["equation"].as_string() == "ba,ac->bc"


@pytest.mark.parametrize("equation", ["bsd,asdf->bsf", "...d,asdf->...f", "bsd,...df->bsf", "...d,...df->bf"])
def test_equation_without_ellipsis_is_declined(equation):
    text = EXPANDED.replace("EQUATION", equation)
    text = text.replace("float[n, 3, 2] y", "float[n, 2] y") if equation.endswith("->bf") else text
    assert "does not begin every term with an ellipsis" in declined(text, EinsumWithoutExpand())


def test_weight_whose_axis_the_ellipsis_takes_is_declined():
    """A kernel of its own for each token is no kernel that was repeated."""
    text = EXPANDED.replace("EQUATION", "...d,...df->...f").replace(
        "float[4, 2] w = {1,2,3,4,5,6,7,8}", "float[3, 4, 2] w"
    )
    text = (
        text.replace("int64[2] axes = {0, 1}", "int64[1] axes = {0}")
        .replace(") =>", ", float[3, 4, 2] w) =>")
        .replace("<float[3, 4, 2] w, ", "<")
    )
    assert declined(text, EinsumWithoutExpand()) == "the weight has 3 axes, its term 'df' has 2"
