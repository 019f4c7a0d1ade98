"""Weights that are described while a graph changes, and the passes that rewrite them: on graphs of a few nodes, against
NumPy."""

import numpy as np
import onnx_ir as ir
import pytest
from export_graphs import computed, described, ops, run

from vit_convert.core.errors import ExportError
from vit_convert.core.stack import Stack
from vit_convert.export.passes.fold_attention_scale import fold_scale
from vit_convert.export.passes.patch_as_matmul import patch_to_matmul
from vit_convert.export.passes.unroll_blocks import between, unroll, unrolled_taps, unrolling
from vit_convert.export.weights import (
    Weight,
    add_constant,
    add_weight,
    bind,
    concatenate,
    convolution_kernel,
    fold_weights,
    replace_weight,
    weight_of,
)

RNG = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


# --- descriptions ---------------------------------------------------------------------------------------------------


def test_steps_are_taken_in_order():
    weight = Weight(("a",), (2, 3), lambda a: a + 1).then((3, 2), np.transpose).then((3, 2), lambda a: a * 10)
    a = normal(2, 3)
    assert weight.sources == ("a",) and weight.shape == (3, 2)
    np.testing.assert_array_equal(weight.compute(a), (a + 1).T * 10)


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_side_by_side(axis):
    """Of weights with one parameter and with two: each gets its own."""
    a, b, c = normal(2, 3), normal(2, 3), normal(2, 3)
    parts = [Weight(("a",), (2, 3), lambda x: x), Weight(("b", "c"), (2, 3), lambda x, y: x - y)]
    whole = concatenate(parts, axis)
    assert whole.sources == ("a", "b", "c")
    np.testing.assert_array_equal(whole.compute(a, b, c), np.concatenate([a, b - c], axis))
    assert whole.shape == whole.compute(a, b, c).shape
    assert parts[0].shape == (2, 3)


def test_kernel_of_a_convolution_by_one():
    matrix = normal(3, 5)
    kernel = convolution_kernel(Weight(("a",), (3, 5), lambda a: a))
    assert kernel.shape == (5, 3, 1, 1)
    np.testing.assert_array_equal(kernel.compute(matrix)[:, :, 0, 0], matrix.T)


PRODUCT = "g (float[n, 3] x, float[3, 4] w) => (float[n, 4] y) { y = MatMul (x, w) }"


def test_only_what_has_no_value_is_described():
    model = described(
        "g (float[n, 3] x, float[3, 4] w) => (float[n, 4] y) <float one = {1}> { z = MatMul (x, w) y = Add (z, one) }",
        "w",
    )
    assert weight_of(model.graph.initializers["w"]).sources == ("w",)
    assert (
        weight_of(model.graph.initializers["one"]) is None
        and weight_of(model.graph.inputs[0]) is None
        and weight_of(None) is None
    )


def test_names_that_are_taken_get_a_suffix():
    model = described(PRODUCT, "w")
    weight = Weight(("w",), (3, 4), lambda w: w)
    assert [add_weight(model.graph, "w", weight).name for _ in range(3)] == ["w.1", "w.2", "w.3"]
    assert [add_constant(model.graph, "c", [1]).name for _ in range(2)] == ["c", "c.1"]


def test_constants():
    model = described(PRODUCT, "w")
    shape, factors = (
        add_constant(model.graph, "s", [0, -1]),
        add_constant(model.graph, "f", np.array([[0.5]], np.float32)),
    )
    assert (
        shape.dtype == ir.DataType.INT64 and shape.const_value.numpy().tolist() == [0, -1] and list(shape.shape) == [2]
    )
    assert factors.dtype == ir.DataType.FLOAT and list(factors.shape) == [1, 1]


def test_the_name_goes_to_the_replacement_where_nobody_else_reads_the_weight():
    twice = "g (float[n, 3] x, float[3, 3] w) => (float[n, 3] y) { z = MatMul (x, w) y = MatMul (z, w) }"
    for text, names in ((PRODUCT, {"w"}), (twice, {"w", "w.1"})):
        model = described(text, "w")
        old = model.graph.initializers["w"]
        new = replace_weight(model.graph, old, weight_of(old).then(weight_of(old).shape, np.negative))
        assert new.name == max(names) and set(model.graph.initializers) == names


# --- values ---------------------------------------------------------------------------------------------------------


def test_values_are_computed_as_they_are_read():
    read = []

    class Parameters(dict):
        def __getitem__(self, name):
            read.append(name)
            return super().__getitem__(name)

    params, x = Parameters(w=normal(3, 4).astype(np.float64)), normal(2, 3)
    model = described(PRODUCT, "w")
    bind(model, params)
    before = len(read)  # shapes were asked for
    assert model.graph.initializers["w"].const_value.shape == ir.Shape((3, 4)) and len(read) == before
    value = model.graph.initializers["w"].const_value.numpy()
    assert value.dtype == np.float32 and len(read) == before + 1
    np.testing.assert_allclose(run(model, {"x": x})[0], x @ params["w"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({}, "w: traced, but not among the 0 parameters"),
        ({"w": np.zeros((3, 5), np.float32)}, r"w: traced with shape \(3, 4\), the checkpoint has w \(3, 5\)"),
        ({"w": np.zeros((3, 3), np.float32)}, r"w: traced with shape \(3, 4\), the checkpoint has w \(3, 3\)"),
    ],
)
def test_parameters_that_do_not_suit(params, message):
    with pytest.raises(ExportError, match=message):
        bind(described(PRODUCT, "w"), params)


def test_a_parameter_of_the_same_size_and_another_shape():
    model = described(PRODUCT, "w")
    bind(model, {"w": np.zeros((4, 3), np.float32)})
    with pytest.raises(ExportError, match=r"w: traced with shape \(3, 4\), the parameters \('w',\) give \(4, 3\)"):
        model.graph.initializers["w"].const_value.numpy()


def test_parameters_that_are_more_than_the_weight():
    """Two that are added: twice as many numbers are read as there are in it."""
    model = described(PRODUCT, "w")
    old = model.graph.initializers["w"]
    total = Weight(("a", "b"), (3, 4), np.add, num_read=24)
    model.graph[0].replace_input_with(1, replace_weight(model.graph, old, total))
    a, b, x = normal(3, 4), normal(3, 4), normal(2, 3)
    np.testing.assert_allclose(computed(model, {"a": a, "b": b}, x)[0], x @ (a + b), rtol=1e-5, atol=1e-6)
    with pytest.raises(ExportError, match=r"traced with shape \(3, 4\), the checkpoint has a \(3, 4\), b \(1, 4\)"):
        bind(model, {"a": a, "b": b[:1]})


# --- passes ---------------------------------------------------------------------------------------------------------


def test_reshapes_and_transposes_of_weights_are_folded_in():
    text = """g (float[n, 3] x, float[2, 6] w) => (float[n, 4] y) <int64[2] to = {-1, 3}> {
        z = Neg (x) r = Reshape (z, to) t = Reshape (w, to) u = Transpose <perm = [1, 0]> (t) y = MatMul (r, u) }"""
    model, w, x = described(text, "w"), normal(2, 6), normal(5, 3)
    assert (
        fold_weights(model) == 2
        and ops(model) == ["Neg", "Reshape", "MatMul"]
        and set(model.graph.initializers) >= {"w"}
    )
    np.testing.assert_allclose(computed(model, {"w": w}, x)[0], -x @ w.reshape(4, 3).T, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("text", "left"),
    [
        (
            "g (float[n, 6] x, float[2, 6] w) => (float[m, 3] y) <int64[2] to = {-1, 3}> { y = Reshape (x, to) }",
            ["Reshape"],
        ),
        ("g (int64[2] to, float[2, 6] w) => (float[p, q] y) { y = Reshape (w, to) }", ["Reshape"]),
        ("g (float[n, 6] x, float[2, 6] w) => (float[2, 6] y) { y = Neg (w) }", ["Neg"]),
    ],
)
def test_what_is_not_folded(text, left):
    model = described(text, "w")
    assert fold_weights(model) == 0 and ops(model) == left


SCALED = """g (float[n, 4, 8] x, float[8, 8] w, float[8] b) => (float[n, 4, 2, 4] z)
    <float scale = {0.5}, float[4] scales = {1, 2, 3, 4}, int64[4] split = {0, 4, 2, 4}> {
    h = MatMul (x, w) s = Add (h, b) q = Reshape (s, split) y = Mul (q, scale) z = Neg (y) }"""


def test_the_scale_goes_into_the_query():
    model, w, b, x = described(SCALED, "w", "b"), normal(8, 8), normal(8), normal(3, 4, 8)
    assert fold_scale(model) == 1 and ops(model) == ["MatMul", "Add", "Reshape", "Neg"]
    expected = -0.5 * (x @ w + b).reshape(3, 4, 2, 4)
    np.testing.assert_allclose(computed(model, {"w": w, "b": b}, x)[0], expected, rtol=1e-5, atol=1e-6)


def test_other_products_before_the_query_do_not_keep_the_scale_from_it():
    """Of a scalar that is not behind a Dense layer, and of a vector."""
    text = SCALED.replace("h = MatMul (x, w)", "u = Mul (x, scale) v = Mul (u, wide) h = MatMul (v, w)")
    text = text.replace("float scale = {0.5}", "float scale = {0.5}, float[8] wide = {1, 2, 3, 4, 5, 6, 7, 8}")
    model = described(text, "w", "b")
    assert fold_scale(model) == 1 and ops(model) == ["Mul", "Mul", "MatMul", "Add", "Reshape", "Neg"]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("Mul (q, scale)", "Mul (q, scales)"),  # one for each channel
        ("Mul (q, scale)", "Add (q, scale)"),
        ("q = Reshape (s, split) y = Mul (q, scale)", "r = Relu (s) q = Reshape (r, split) y = Mul (q, scale)"),
        ("s = Add (h, b) q = Reshape (s, split)", "s = Sub (h, b) q = Reshape (s, split)"),
        ("h = MatMul (x, w)", "h = Mul (x, b)"),
        ("s = Add (h, b)", "s = Add (h, h)"),
        ("y = Mul (q, scale)", "y = Mul (q, q)"),
    ],
)
def test_what_no_scale_is_folded_into(old, new):
    model = described(SCALED.replace(old, new), "w", "b")
    before = ops(model)
    assert fold_scale(model) == 0 and ops(model) == before


EMBEDDING = """g (float[n, 4, 6, 3] x, float[5, 3, 2, 2] k, float[5] b, float[1, 6, 5] t) => (float[n, 6, 5] z)
    <int64[3] flat = {0, 6, 5}> {
    p = Transpose <perm = [0, 3, 1, 2]> (x) c = Conv <strides = [2, 2]> (p, k, b) q = Transpose <perm = [0, 2, 3,
    1]> (c)
    r = Reshape (q, flat) y = Add (r, t) z = Neg (y) }"""


def test_patches_as_a_product():
    model = described(EMBEDDING, "k", "b", "t")
    k, b, t, x = normal(5, 3, 2, 2), normal(5), normal(1, 6, 5), normal(2, 4, 6, 3)
    assert patch_to_matmul(model) == 1
    assert ops(model) == ["Reshape", "Transpose", "Reshape", "MatMul", "Add", "Neg"]
    expected = np.zeros((2, 6, 5), np.float64)
    for i, row, column in np.ndindex(2, 2, 3):  # each patch by itself
        patch = x[i, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].astype(np.float64)  # [2, 2, 3]
        expected[i, 3 * row + column] = (
            np.einsum("hwc,nchw->n", patch, k.astype(np.float64)) + b + t[0, 3 * row + column]
        )
    np.testing.assert_allclose(computed(model, {"k": k, "b": b, "t": t}, x)[0], -expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("float[5, 3, 2, 2] k", "float[5, 3, 2, 1] k"),  # pixels between the patches, that none reads
        ("perm = [0, 3, 1, 2]", "perm = [0, 3, 2, 1]"),
        ("(p, k, b)", "(p, k)"),
        ("r = Reshape (q, flat)", "rr = Relu (q) r = Reshape (rr, flat)"),
        ("y = Add (r, t)", "y = Mul (r, t)"),
        ("y = Add (r, t)", "y = Add (r, r)"),
        ("p = Transpose <perm = [0, 3, 1, 2]> (x)", "p = Reshape (x, nchw)"),
    ],
)
def test_what_is_no_patch_embedding(old, new):
    text = EMBEDDING.replace(old, new).replace("int64[3] flat", "int64[4] nchw = {0, 3, 4, 6}, int64[3] flat")
    model = described(text, "k", "b", "t")
    before = ops(model)
    assert patch_to_matmul(model) == 0 and ops(model) == before


def test_pixels_that_no_patches_fill_or_whose_number_is_not_known():
    for shape, tokens in (("float[n, 5, 6, 3]", 6), ("float[n, h, 6, 3]", 6)):
        model = described(EMBEDDING.replace("float[n, 4, 6, 3]", shape), "k", "b", "t")
        assert patch_to_matmul(model) == 0, tokens
    model = described(EMBEDDING, "k", "b", "t")
    model.graph.inputs[0].shape = None
    assert patch_to_matmul(model) == 0


# --- depth ----------------------------------------------------------------------------------------------------------

BLOCKS = """g (float[n, 4] x, float[4, 4] w0, float[4, 4] w1, float[4, 4] h) => (float[n, 4] y) <float half = {0.5}> {
    a = MatMul (x, w0) block_00 = Add (a, x)
    c = MatMul (block_00, w1) d = Mul (c, half) block_01 = Add (d, block_00)
    y = MatMul (block_01, h) }"""
NAMES = {"w0": "Transformer/encoderblock_0/kernel", "w1": "Transformer/encoderblock_1/kernel", "h": "head/kernel"}


@pytest.mark.parametrize("depth", [2, 3, 5])
def test_blocks_are_repeated_with_weights_of_their_own(depth):
    model = described(BLOCKS, "w0", "w1", "h", names=NAMES)
    unroll(model, Stack("Transformer/encoderblock_{}/", depth))
    params = {f"Transformer/encoderblock_{i}/kernel": normal(4, 4) for i in range(depth)} | {
        "head/kernel": normal(4, 4)
    }
    assert {name for name in model.graph.initializers if "kernel" in name} == set(params)
    assert [value.name for node in model.graph for value in node.outputs if str(value.name).startswith("block_")] == [
        f"block_{i:02d}" for i in range(depth)
    ]
    x = normal(3, 4)
    stream = (x @ params["Transformer/encoderblock_0/kernel"] + x).astype(np.float64)
    for i in range(1, depth):
        stream = 0.5 * (stream @ params[f"Transformer/encoderblock_{i}/kernel"]) + stream
    np.testing.assert_allclose(computed(model, params, x)[0], stream @ params["head/kernel"], rtol=1e-4, atol=1e-5)


def test_what_lies_between_two_values():
    model = described(BLOCKS, "w0", "w1", "h", names=NAMES)
    values = {value.name: value for node in model.graph for value in node.outputs}
    found = between(values["block_00"], values["block_01"], model.graph)
    # in the graph's order, and nothing of the first block
    assert [node.op_type for node in found] == ["MatMul", "Mul", "Add"]
    # nothing stops it on the way
    assert between(values["block_01"], values["block_01"], model.graph)[0].op_type == "MatMul"


def test_a_weight_that_blocks_would_share_is_refused():
    """Sharing it in silence gave every block what the second one has."""
    text = BLOCKS.replace("MatMul (block_00, w1)", "MatMul (block_00, w0)")
    for name in ("shared/kernel", "Transformer/encoderblock_0/kernel", "Transformer/encoderblock_10/kernel"):
        model = described(text, "w0", "w1", "h", names={**NAMES, "w0": name})
        model.graph.initializers.pop(NAMES["w1"])
        with pytest.raises(
            ExportError, match=f"{name}: read within a block that is repeated, and not one of its parameters"
        ):
            unroll(model, Stack("Transformer/encoderblock_{}/", 4))


def test_a_stack_that_is_there_whole_is_left_alone():
    model = described(BLOCKS, "w0", "w1", "h", names={**NAMES, "w1": "shared/kernel"})
    before = ir.to_proto(model).SerializeToString()
    unroll(model, Stack("Transformer/encoderblock_{}/", 2))
    assert ir.to_proto(model).SerializeToString() == before


@pytest.mark.parametrize("depth", [2, 3, 4, 7])
def test_the_contract_of_repeating_blocks(depth):
    """Both traced blocks are there before, and all of them afterwards."""
    unrolls = unrolling(Stack("Transformer/encoderblock_{}/", depth))
    model = described(BLOCKS, "w0", "w1", "h", names=NAMES)
    unrolls(model)
    assert [value.name for node in model.graph for value in node.outputs if str(value.name).startswith("block_")] == [
        f"block_{i:02d}" for i in range(depth)
    ]
    unrolls(model)  # which is whole now
    for lost in ("block_00", "block_01"):
        model = described(BLOCKS.replace(lost, "other"), "w0", "w1", "h", names=NAMES)
        what = "after" if depth == 2 and lost == "block_00" else "before"  # whole by its last block
        error = ir.passes.PostconditionError if what == "after" else ir.passes.PreconditionError
        with pytest.raises(error, match=f"unroll: {what} it no value is {lost}, the stream"):
            unrolls(model)


@pytest.mark.parametrize("depth", [1, 2, 3, 6])
def test_taps_of_a_stack_that_was_traced_whole(depth):
    taps = ["embedded", *(f"block_{i:02d}" for i in range(depth)), "norm"]
    assert unrolled_taps(Stack("Transformer/encoderblock_{}/", depth), taps) == taps


PERIODS = """g (float[n, 4] x, float[4, 4] w0, float[4, 4] w1, float[4, 4] w2, float[4, 4] w3) => (float[n, 4] y) {
    stage_1__block_00 = MatMul (x, w0) b = MatMul (stage_1__block_00, w1) stage_1__block_01 = Neg (b)
    stage_1__block_02 = MatMul (stage_1__block_01, w2) d = MatMul (stage_1__block_02, w3) stage_1__block_03 = Neg (d)
    y = Exp (stage_1__block_03) }"""


def test_every_other_block_is_of_another_kind():
    """Two blocks are repeated, with what is tapped within them."""
    stack = Stack("stage_1/block_{}/", 6, "stage_1/block_{:02d}", period=2)
    model = described(PERIODS, "w0", "w1", "w2", "w3", names={f"w{i}": f"stage_1/block_{i}/kernel" for i in range(4)})
    for node in model.graph:
        name = str(node.outputs[0].name)
        node.outputs[0].name = "stage_1/block_03/inner" if name == "d" else name.replace("__", "/")
    unroll(model, stack)
    # of about the length 1: an exponential's relative error is its argument's absolute one
    params = {f"stage_1/block_{i}/kernel": normal(4, 4) / 2 for i in range(6)}
    assert set(model.graph.initializers) == set(params)
    taps = ["stage_1/block_00", "stage_1/block_01", "stage_1/block_02", "stage_1/block_03/inner", "stage_1/block_03"]
    repeated = ["stage_1/block_04", "stage_1/block_05/inner", "stage_1/block_05"]
    assert unrolled_taps(stack, [*taps, "norm"]) == [*taps, *repeated, "norm"]
    assert {*taps, *repeated} <= {value.name for node in model.graph for value in node.outputs}
    expected = x = normal(3, 4)
    for i in range(6):
        expected = (expected @ params[f"stage_1/block_{i}/kernel"].astype(np.float64)) * (-1 if i % 2 else 1)
    np.testing.assert_allclose(computed(model, params, x)[0], np.exp(expected), rtol=1e-4)
