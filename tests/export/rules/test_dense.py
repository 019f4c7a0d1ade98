"""Dense layers lose the Reshapes around their Gemm."""

import pytest
from export_graphs import declined, ops, rewrite

from vit_convert.export.rules.dense import DenseNoBiasToMatMul, DenseToMatMul, NoZeroBias

WEIGHTS = "float[4, 6] w = {1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24}, float[6] b = {1,2,3,4,5,6}"


def dense(rows: str, gemm: str, output: str, shape: str, x: str = "n, 3, 4") -> str:
    rank = len(shape.split(","))
    return f"""g (float[{x}] x) => (float[{output}] y) <{WEIGHTS}, int64[2] rows = {{{rows}}},
    int64[{rank}] shape = {{{shape}}}> {{
        flat = Reshape (x, rows) product = Gemm {gemm} y = Reshape (product, shape) }}"""


@pytest.mark.parametrize("opset", [17, 20])
@pytest.mark.parametrize(
    ("x", "output", "shape", "expected"),
    [
        ("n, 3, 4", "n, 3, 6", "-1, 3, 6", ["MatMul", "Add"]),
        ("n, 3, 4", "n, 3, 2, 3", "-1, 3, 2, 3", ["MatMul", "Add", "Reshape"]),  # a projection to heads
        ("n, 3, 2, 2", "n, 3, 6", "-1, 3, 6", ["Reshape", "MatMul", "Add"]),  # and from heads
        ("n, 4", "n, 6", "-1, 6", ["MatMul", "Add"]),  # one token
    ],
)
def test_dense(opset, x, output, shape, expected):
    model, count = rewrite(dense("-1, 4", "(flat, w, b)", output, shape, x), DenseToMatMul(), opset)
    assert count.applied == 1
    assert ops(model) == expected


def test_shape_computed_at_run_time():
    """What jax2onnx writes: the leading axes are read from the input."""
    text = f"""g (float[n, 3, 4] x) => (float[n, 3, 6] y)
        <{WEIGHTS}, int64[2] rows = {{-1, 4}}, int64[1] zero = {{0}}, int64[1] two = {{2}}, int64[1] six = {{6}}> {{
        flat = Reshape (x, rows) product = Gemm (flat, w, b)
        s = Shape (x) lead = Slice (s, zero, two) shape = Concat <axis = 0> (lead, six) y = Reshape (product, shape)
        }}"""
    model, count = rewrite(text, DenseToMatMul())
    assert count.applied == 1
    assert ops(model) == ["MatMul", "Add"]


@pytest.mark.parametrize("beta", ["", "<beta = 0.0>"])
def test_dense_without_bias(beta):
    # jax2onnx writes beta = 0, which means nothing without a bias.
    text = dense("-1, 4", "(flat, w)", "n, 3, 6", "-1, 3, 6").replace("Gemm", f"Gemm {beta}")
    model, count = rewrite(text, DenseNoBiasToMatMul())
    assert count.applied == 1
    assert ops(model) == ["MatMul"]


def test_one_reshape_shared_by_three_layers():
    text = f"""g (float[n, 3, 4] x) => (float[n, 3, 6] y, float[n, 3, 6] z)
        <{WEIGHTS}, int64[2] rows = {{-1, 4}}, int64[3] shape = {{-1, 3, 6}}> {{
        flat = Reshape (x, rows) p = Gemm (flat, w, b) q = Gemm <beta = 0.5> (flat, w, b)
        y = Reshape (p, shape) z = Reshape (q, shape) }}"""
    model, count = rewrite(text, DenseToMatMul())
    assert count.applied == 1
    assert count.declined == {"Gemm has beta=0.5, not 1.0": 1}
    assert sorted(ops(model)) == ["Add", "Gemm", "MatMul", "Reshape", "Reshape"]


def test_two_dynamic_axes_are_kept():
    """Merging the heads copies both: of a constant shape, one alone could be left to be found."""
    text = dense("-1, 4", "(flat, w, b)", "n, m, 6", "0, 0, 6", "n, m, 2, 2").replace(
        "y = Reshape (product, shape)",
        "s = Shape <start = 0, end = 2> (x) wide = Concat <axis = 0> (s, six) y = Reshape (product, wide)",
    )
    model, count = rewrite(text.replace("int64[2] rows", "int64[1] six = {6}, int64[2] rows"), DenseToMatMul())
    assert count.applied == 1
    assert ops(model) == ["Reshape", "MatMul", "Add"]
    assert model.graph[0].inputs[1].const_value.numpy().tolist() == [0, 0, 4]


def test_a_kernel_of_hundreds_of_rows():
    text = """g (float[n, 3, 300] x, float[300, 6] w, float[6] b) => (float[n, 3, 6] y)
        <int64[2] rows = {-1, 300}, int64[3] shape = {-1, 3, 6}> {
        flat = Reshape (x, rows) product = Gemm (flat, w, b) y = Reshape (product, shape) }"""
    model, count = rewrite(text, DenseToMatMul())
    assert count.applied == 1 and ops(model) == ["MatMul", "Add"]


@pytest.mark.parametrize(
    ("rule", "operands", "beta"), [(DenseToMatMul(), "(flat, w, b)", 1.0), (DenseNoBiasToMatMul(), "(flat, w)", 0.5)]
)
def test_attributes_that_say_what_they_mean_anyway(rule, operands, beta):
    text = dense("-1, 4", operands, "n, 3, 6", "-1, 3, 6")
    _, count = rewrite(text.replace("Gemm", f"Gemm <alpha = 1.0, beta = {beta}, transA = 0, transB = 0>"), rule)
    assert count.applied == 1


@pytest.mark.parametrize(
    ("attribute", "reason"), [("<alpha = 2.0>", "alpha=2.0, not 1.0"), ("<beta = 0.5>", "beta=0.5, not 1.0")]
)
def test_scaled_gemm_is_declined(attribute, reason):
    text = dense("-1, 4", "(flat, w, b)", "n, 3, 6", "-1, 3, 6").replace("Gemm", f"Gemm {attribute}")
    assert declined(text, DenseToMatMul()) == f"Gemm has {reason}"
    if "alpha" in attribute:
        assert declined(text.replace("(flat, w, b)", "(flat, w)"), DenseNoBiasToMatMul()) == f"Gemm has {reason}"


@pytest.mark.parametrize("attribute", ["transA", "transB"])
@pytest.mark.parametrize(
    ("rule", "operands"), [(DenseToMatMul(), "(flat, s, c)"), (DenseNoBiasToMatMul(), "(flat, s)")]
)
def test_transposed_operand_is_declined(rule, operands, attribute):
    """Of four rows and a square kernel, whose shapes tell nothing."""
    text = dense("-1, 4", operands, "1, 4, 4", "-1, 4, 4", "1, 4, 4").replace("Gemm", f"Gemm <{attribute} = 1>")
    square = ", ".join(map(str, range(16)))
    text = text.replace(WEIGHTS, f"float[4, 4] s = {{{square}}}, float[4] c = {{1,2,3,4}}")
    assert declined(text, rule) == f"Gemm has {attribute}=1, not 0"


@pytest.mark.parametrize(
    ("x", "said"),
    [
        ("n, 3, 8", "('n', '3', '8')"),  # a kernel for half a token
        ("3, 2, m", "('3', '2', 'm')"),  # 4 · 3 / 2 rows are known when it runs alone
        ("2, 2", "('2', '2')"),  # no axis is left for the rows of the product
    ],
)
def test_input_that_does_not_end_in_the_kernels_rows_is_declined(x, said):
    rows, output = ("1", "1, 1, 6") if x == "2, 2" else ("6", "p, 6, 6")
    text = dense("-1, 4", "(flat, w, b)", output, f"-1, {rows}, 6", x)
    assert declined(text, DenseToMatMul()) == f"the input {said} does not end in the kernel's 4 rows"


def test_reshape_that_mixes_tokens_is_declined():
    text = dense("-1, 4", "(flat, w, b)", "n, 6, 3", "-1, 6, 3")
    assert (
        declined(text, DenseToMatMul())
        == "the output ('n', '6', '3') does not keep the input's leading axes ('n', '3')"
    )


def biased(bias: str) -> str:
    return f"g (float[n, 3, 4] x) => (float[n, 3, 6] y) <{WEIGHTS}, {bias}> {{ p = MatMul (x, w) y = Add (p, z) }}"


def test_bias_of_zeros_goes_away():
    model, count = rewrite(biased("float[6] z = {0,0,0,0,0,0}"), NoZeroBias())
    assert count.applied == 1
    assert ops(model) == ["MatMul"]


def test_other_biases_stay():
    assert declined(biased("float[6] z = {0,0,0,0,0,1}"), NoZeroBias()) == ""
    assert (
        declined(
            biased("float z = {0}").replace(") =>", ", float[6] z) =>").replace(", float z = {0}", ""), NoZeroBias()
        )
        == ""
    )
    for bias in (
        "float z = {0}",
        "float[1] z = {0}",
        "float[3, 1] z = {0, 0, 0}",
        f"float[3, 6] z = {{{', '.join('0' * 18)}}}",
    ):
        assert declined(biased(bias), NoZeroBias()) == "the bias is not a vector of the product's width"


@pytest.mark.parametrize(
    ("x", "output", "shape", "applied"),
    [
        ("n, 4", "m, 6", "-1, 6", 1),
        ("n, 3, 4", "m, 3, 6", "-1, 3, 6", 1),
        ("n, 3, 5, 4", "m, 3, 5, 6", "-1, 3, 5, 6", 1),
        ("n, l, 4", "m, l, 6", "-1, 3, 6", 0),  # l may be another number of each
        ("n, 3, 4", "3, m, 6", "3, -1, 6", 0),
    ],
)
def test_an_axis_that_lost_its_name(x, output, shape, applied):
    """Of the leading axes one is unknown on both sides, under two names: as many elements, so it is as long."""
    model, count = rewrite(dense("-1, 4", "(flat, w, b)", output, shape, x), DenseToMatMul())
    assert count.applied == applied
    assert not applied or ops(model) == ["MatMul", "Add"]


def test_two_axes_that_lost_their_names_stay():
    text = dense("-1, 4", "(flat, w, b)", "m, k, 6", "-1, 3, 6").replace("float[n, 3, 4] x", "float[n, l, 4] x")
    _, count = rewrite(text, DenseToMatMul())
    assert count.applied == 0
