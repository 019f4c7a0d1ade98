"""Which nodes of a typed graph stay float32, and why, on graphs of a few nodes."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from vit_convert.core.onnx_file import open_proto
from vit_convert.quantize.half_precision import to_bf16, to_fp16

HEAD = '<ir_version: 9, opset_import: ["" : {opset}]>\ng ({inputs}) => (float[N, 3] logits)\n'
WEIGHTS = "<float[4, 3] w, float[4] scale = {1, 2, 3, 4}, float[4] offset = {1, 1, 1, 1}, int64[1] last = {-1}>"


def graph(*nodes, inputs="float[N, 4] images", opset=20):
    text = HEAD.format(opset=opset, inputs=inputs) + WEIGHTS + " {\n" + "\n".join(nodes) + "\n}"
    model = onnx.parser.parse_model(text)
    weight = np.arange(12, dtype=np.float32).reshape(4, 3) / 8
    model.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    return ir.from_proto(onnx.shape_inference.infer_shapes(model))


PIXELS = ("f = Cast <to = 1> (images)", "s = Mul (f, scale)", "o = Add (s, offset)")


def test_pixels_are_normalised_in_float32():
    found = to_fp16(graph(*PIXELS, "logits = MatMul (o, w)", inputs="uint8[N, 4] images"))
    assert found.islands == dict.fromkeys(("f", "s", "o"), "normalises pixels")
    types = {node.outputs[0].name: node.outputs[0].dtype for node in found.model.graph}
    assert types["o"] == ir.DataType.FLOAT and types["logits/inner"] == ir.DataType.FLOAT16
    assert {value.name for value in found.model.graph.initializers.values() if value.dtype == ir.DataType.FLOAT} == {
        "scale",
        "offset",
    }


@pytest.mark.parametrize(
    "nodes",
    [
        # of values that are floats already
        ("s = Mul (images, scale)", "o = Add (s, offset)", "logits = MatMul (o, w)"),
        # a Cast within
        ("n = Cast <to = 7> (images)", "f = Cast <to = 1> (n)", "s = Mul (f, scale)", "logits = MatMul (s, w)"),
        ("s = Sub (images, offset)", "logits = MatMul (s, w)"),
    ],
)
def test_what_normalises_no_pixels(nodes):
    assert to_fp16(graph(*nodes)).islands == {}


def test_another_operation_on_pixels_is_no_normalization():
    found = to_fp16(
        graph(
            "f = Cast <to = 1> (images)", "s = Sub (f, offset)", "logits = MatMul (s, w)", inputs="uint8[N, 4] images"
        )
    )
    assert found.islands == {}
    found = to_fp16(graph(*PIXELS[:2], "o = Sub (s, offset)", "logits = MatMul (o, w)", inputs="uint8[N, 4] images"))
    assert found.islands == dict.fromkeys(("f", "s"), "normalises pixels")


@pytest.mark.parametrize(
    ("square", "statistics"),
    [
        ("q = Mul (c, c)", {"m", "c", "q", "v", "d", "n", "t"}),
        ("q = Pow (c, scale)", {"m", "c", "q", "v", "d", "n", "t"}),
        ("q = Mul (images, images)", {"m", "c", "q", "v", "d", "n", "t"}),
        ("q = Mul (images, scale)", {"m", "c", "v", "d", "n", "t"}),  # no square
        ("q = Exp (images)", {"m", "c", "v", "d", "n", "t"}),
    ],
)
def test_statistics_reach_from_the_squares_to_the_first_product(square, statistics):
    nodes = (
        "m = ReduceMean <keepdims = 1> (images, last)",
        "c = Sub (images, m)",
        square,
        "v = ReduceMean <keepdims = 1> (q, last)",
        "d = Sqrt (v)",
        "n = Div (c, d)",
        "t = Mul (n, scale)",
        "logits = MatMul (t, w)",
    )
    assert to_fp16(graph(*nodes)).islands == dict.fromkeys(statistics, "statistics")


def test_what_only_moves_values_to_float32_is_float32():
    nodes = (
        "r = Identity (images)",
        "a = Identity (r)",
        "b = Identity (a)",
        "l = MatMul (b, w)",
        "logits = Identity (l)",
    )
    kept = to_fp16(graph(*nodes), keep_fp32=["l"]).islands
    assert kept == {"r": "feeds only float32", "a": "feeds only float32", "b": "feeds only float32", "l": "keep_fp32"}
    shared = ("a = Identity (images)", "b = Relu (a)", "k = MatMul (a, w)", "e = MatMul (b, w)", "logits = Add (k, e)")
    assert to_fp16(graph(*shared), keep_fp32=["k"]).islands == {"k": "keep_fp32"}  # half reads it as well


def test_ranges_and_weights_that_do_not_fit_name_the_first():
    nodes = ("s = Mul (images, scale)", "k = MatMul (s, w)", "logits = Relu (k)")
    found = to_fp16(graph(*nodes), amax={"s": 40_000.0, "k": 33_000.0, "logits": 10.0}).islands
    assert found == {"s": "s reaches 4e+04", "k": "s reaches 4e+04", "logits": "k reaches 3.3e+04"}
    big = graph(*nodes)
    big.graph.initializers["w"].const_value = ir.tensor(np.full((4, 3), 65_505, np.float32), name="w")
    typed = to_fp16(big)
    assert typed.islands == {"k": "w reaches 6.55e+04"} and typed.overflowing == {"w": 65_505.0}
    big.graph.initializers["w"].const_value = ir.tensor(np.full((4, 3), 65_504, np.float32), name="w")
    assert to_fp16(big).islands == {} and to_bf16(big).overflowing == {}


def test_weights_that_lose_digits_are_counted():
    model = graph("logits = MatMul (images, w)")
    smallest = 2.0**-14  # of fp16's normal numbers
    weight = np.zeros((4, 3), np.float32)
    weight.ravel()[:5] = smallest, -smallest, smallest * 0.999, -1e-7, 0
    model.graph.initializers["w"].const_value = ir.tensor(weight, name="w")
    assert to_fp16(model).num_subnormal == 2 and to_bf16(model).num_subnormal == 0


def test_operators_that_an_opset_lacks_for_a_type():
    model = graph("c = Relu (images)", "logits = MatMul (c, w)", opset=12)
    assert to_bf16(model).islands == {
        "c": "Relu has no BFLOAT16 in opset 12",
        "logits": "MatMul has no BFLOAT16 in opset 12",
    }
    assert to_fp16(model).islands == {}
    assert to_bf16(graph("c = Relu (images)", "logits = MatMul (c, w)", opset=14)).islands == {}


BRANCHES = """y = If (yes) <
    then_branch = t () => (float[N, 3] p) { a = Mul (h, h) p = Mul (a, scale3) },
    else_branch = e () => (float[N, 3] q) { q = Identity (h) }>"""
LOOP = """y, all = Loop (count, yes, h) <
    body = b (int64 i, bool go, float[N, 3] z) => (bool on, float[N, 3] r, float[N, 3] s) {
    on = Identity (go) c = Add (z, h) r = Mul (c, scale3) s = Identity (r) }>"""


@pytest.mark.parametrize("inner, op", [(BRANCHES, "If"), (LOOP, "Loop")])
@pytest.mark.parametrize("typed", [to_fp16, to_bf16])
@pytest.mark.parametrize("keep", [(), ("y",)])
def test_graphs_within_nodes_stay_float32(inner, op, typed, keep):
    """With what they read of the graph around them: a value in half precision, and a weight that both read."""
    text = HEAD.format(opset=20, inputs="float[N, 4] images") + WEIGHTS.replace(
        "<", "<float[3] scale3 = {0.5, 0.25, 2}, int64 count = {3}, bool yes = {1}, ", 1
    )
    text += " {\nh = MatMul (images, w)\n" + inner + "\ng = Mul (y, scale3)\nlogits = Tanh (g)\n}"
    model = onnx.parser.parse_model(text)
    weight = np.arange(12, dtype=np.float32).reshape(4, 3) / 8
    model.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    plain = ir.from_proto(model)
    for node in plain.graph:
        node.name = node.outputs[0].name
    plain = ir.from_proto(onnx.shape_inference.infer_shapes(ir.to_proto(plain), data_prop=True))
    found = typed(plain, keep_fp32=keep)
    assert found.islands == {"y": "keep_fp32" if keep else f"{op} has a graph of its own"}
    proto = ir.to_proto(found.model)
    onnx.checker.check_model(proto, full_check=True)
    images = np.random.default_rng(0).uniform(-1, 1, (2, 4)).astype(np.float32)
    h, scale = images.astype(np.float64) @ weight, np.array([0.5, 0.25, 2])
    y = h * h * scale
    if op == "Loop":
        y = h
        for _ in range(3):
            y = (y + h) * scale
    half = next(node for node in found.model.graph if node.op_type == "Tanh").outputs[0].dtype
    assert half == (ir.DataType.FLOAT16 if typed is to_fp16 else ir.DataType.BFLOAT16)
    if typed is to_fp16:  # onnxruntime has few kernels for bf16
        (got,) = open_proto(proto, ".").run(None, {"images": images})
        np.testing.assert_allclose(got, np.tanh(y * scale), rtol=0, atol=5e-3)  # roundings of 2^-11, times up to 15
