"""Dense layers lose the Reshapes around their Gemm."""

import pytest
from export_graphs import declined, ops, rewrite

from vit_convert.export.rules.dense import DenseNoBiasToMatMul, DenseToMatMul, NoZeroBias

WEIGHTS = "float[4, 6] w = {1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24}, float[6] b = {1,2,3,4,5,6}"


def dense(rows: str, gemm: str, output: str, shape: str, x: str = "n, 3, 4") -> str:
    rank = len(shape.split(","))
    return f"""g (float[{x}] x) => (float[{output}] y) <{WEIGHTS}, int64[2] rows = {{{rows}}}, int64[{rank}] shape = {{{shape}}}> {{
        flat = Reshape (x, rows) product = Gemm {gemm} y = Reshape (product, shape) }}"""


@pytest.mark.parametrize("opset", [17, 20])
@pytest.mark.parametrize(
    ("x", "output", "shape", "expected"),
    [
        ("n, 3, 4", "n, 3, 6", "-1, 3, 6", ["MatMul", "Add"]),
        ("n, 3, 4", "n, 3, 2, 3", "-1, 3, 2, 3", ["MatMul", "Add", "Reshape"]),  # a projection to heads
        ("n, 3, 2, 2", "n, 3, 6", "-1, 3, 6", ["Reshape", "MatMul", "Add"]),  # and from heads
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
        s = Shape (x) lead = Slice (s, zero, two) shape = Concat <axis = 0> (lead, six) y = Reshape (product, shape) }}"""
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


@pytest.mark.parametrize(("attribute", "reason"), [("<alpha = 2.0>", "alpha=2.0"), ("<beta = 0.5>", "beta=0.5")])
def test_scaled_gemm_is_declined(attribute, reason):
    text = dense("-1, 4", "(flat, w, b)", "n, 3, 6", "-1, 3, 6").replace("Gemm", f"Gemm {attribute}")
    assert reason in declined(text, DenseToMatMul())


def test_transposed_kernel_is_declined():
    text = dense("-1, 6", "(flat, w, c)", "n, 3, 4", "-1, 3, 4", "n, 3, 6").replace("Gemm", "Gemm <transB = 1>")
    text = text.replace(WEIGHTS, f"{WEIGHTS}, float[4] c = {{1,2,3,4}}")
    assert declined(text, DenseToMatMul()) == "Gemm has transB=1, not 0"


def test_reshape_that_mixes_tokens_is_declined():
    text = dense("-1, 4", "(flat, w, b)", "n, 6, 3", "-1, 6, 3")
    assert declined(text, DenseToMatMul()) == "the output ('n', '6', '3') does not keep the input's leading axes ('n', '3')"


def biased(bias: str) -> str:
    return f"g (float[n, 3, 4] x) => (float[n, 3, 6] y) <{WEIGHTS}, {bias}> {{ p = MatMul (x, w) y = Add (p, z) }}"


def test_bias_of_zeros_goes_away():
    model, count = rewrite(biased("float[6] z = {0,0,0,0,0,0}"), NoZeroBias())
    assert count.applied == 1
    assert ops(model) == ["MatMul"]


def test_other_biases_stay():
    assert declined(biased("float[6] z = {0,0,0,0,0,1}"), NoZeroBias()) == ""
    assert declined(biased("float z = {0}"), NoZeroBias()) == "the bias is not a vector of the product's width"
