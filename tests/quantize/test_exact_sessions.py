"""What judges a quantized graph computes what TensorRT does, 32-bit sums of integer products, whatever processor runs
it.

onnxruntime's integer kernels add pairs of products in 16 bits where the processor has no VNNI: 127 · 255 twice is 64
770, and saturates.
"""

import ast
import pathlib

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from vit_convert.core import onnx_file
from vit_convert.core.onnx_file import open_session
from vit_convert.core.ort_options import session_options

ROOT = pathlib.Path(__file__).parents[2]
INNER, COLUMNS = 1024, 24
# Every operator that multiplies integers, or that onnxruntime fuses pairs into.
INTEGER = ("QLinear", "MatMulInteger", "QGemm", "ConvInteger", "DynamicQuantize", "QAttention", "MatMulNBits", "QMoE")


def write(path: pathlib.Path, kind: str, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray | None]:
    """A product between Q/DQ pairs whose scales are powers of two; returns its int8 weight, or None where both factors
    are activations."""
    sides = {"x": 0.5, "w": 0.25}
    weights = [helper.make_tensor(f"{name}/scale", TensorProto.FLOAT, [], [scale]) for name, scale in sides.items()]
    weights.append(helper.make_tensor("zero", TensorProto.INT8, [], [0]))
    # Nearly all of them at an end of the range, and mostly of one sign: any two neighbours overflow 16 bits.
    weight = np.where(rng.random((INNER, COLUMNS)) < 0.95, 127, rng.integers(-127, 128, (INNER, COLUMNS))).astype(
        np.int8
    )
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", INNER])]
    nodes = []
    for name in sides:
        pair = [f"{name}/scale", "zero"]
        if name == "w" and kind != "attention":
            stored = weight if kind == "matmul" else weight.T[:, :, None, None]
            weights.append(onnx.numpy_helper.from_array(np.ascontiguousarray(stored), "w/quantized"))
        else:
            nodes.append(helper.make_node("QuantizeLinear", [name, *pair], [f"{name}/quantized"]))
        nodes.append(helper.make_node("DequantizeLinear", [f"{name}/quantized", *pair], [f"{name}/dequantized"]))
    factors = ["x/dequantized", "w/dequantized"]
    if kind == "attention":
        inputs.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [INNER, COLUMNS]))
    if kind == "conv":
        weights.append(helper.make_tensor("square", TensorProto.INT64, [4], [-1, INNER, 1, 1]))
        nodes.append(helper.make_node("Reshape", ["x/dequantized", "square"], ["x/square"]))
        factors[0] = "x/square"
    nodes.append(helper.make_node("Conv" if kind == "conv" else "MatMul", factors, ["y"]))
    graph = helper.make_graph(
        nodes, kind, inputs, [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)], weights
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return weight, weight if kind == "attention" else None


@pytest.mark.parametrize("kind", ["matmul", "conv", "attention"])
@pytest.mark.parametrize("rows", [1, 33])  # onnxruntime has other kernels for a single row
def test_products_that_overflow_16_bits_are_those_of_int32(tmp_path, kind, rows):
    rng = np.random.default_rng(0)
    weight, fed = write(tmp_path / "model.onnx", kind, rng)
    x = np.where(rng.random((rows, INNER)) < 0.95, 127, rng.integers(-127, 128, (rows, INNER))).astype(np.int8)
    feed = {"x": x * np.float32(0.5)} | ({} if fed is None else {"w": fed * np.float32(0.25)})
    (got,) = open_session(tmp_path / "model.onnx").run(None, feed)
    expected = (x.astype(np.int32) @ weight.astype(np.int32)) * np.float32(0.125)
    # a saturating kernel gives half of it: 32 767 for each two products
    assert (expected > 1024 * 100 * 100 * 0.125).all()
    # Integers below 2^24 are exact in float32: 1024 · 127² = 2^23.98, so that any order of the sum gives the same bits.
    np.testing.assert_array_equal(got.reshape(expected.shape), expected)


@pytest.mark.parametrize("kind", ["matmul", "conv", "attention"])
def test_no_pair_is_fused_into_an_integer_kernel(tmp_path, monkeypatch, kind):
    """The right numbers above prove nothing on a processor with VNNI; that nothing is fused holds on all of them."""
    write(tmp_path / "model.onnx", kind, np.random.default_rng(0))

    def spied(module):
        options = session_options(module)
        options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
        return options

    monkeypatch.setattr(onnx_file, "session_options", spied)
    open_session(tmp_path / "model.onnx")
    found = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert found.count("Conv" if kind == "conv" else "MatMul") + found.count("FusedMatMul") == 1
    assert not [op for op in found if op.startswith(INTEGER)], found
    # and left to itself onnxruntime does fuse the first, or this test looks for the wrong names
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "fused.onnx")
    onnxruntime.InferenceSession(tmp_path / "model.onnx", options, providers=["CPUExecutionProvider"])
    fused = [node.op_type for node in onnx.load(tmp_path / "fused.onnx").graph.node]
    assert kind == "conv" or any(op.startswith(INTEGER) for op in fused), fused


def test_every_session_of_the_package_starts_from_those_options():
    """One place makes options; all that make sessions give them the options."""
    made = []
    for path in sorted((ROOT / "vit_convert").rglob("*.py")):
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        for name, arguments in ((getattr(call.func, "attr", ""), call.args) for call in calls):
            if name in ("InferenceSession", "SessionOptions"):
                made.append((str(path.relative_to(ROOT / "vit_convert")), name, len(arguments)))
    assert sorted(made) == [
        ("core/onnx_file.py", "InferenceSession", 2),
        ("core/ort_options.py", "SessionOptions", 0),
        ("engine/foreign.py", "InferenceSession", 2),
        ("serve/session.py", "InferenceSession", 2),
        ("serve/triton/models/onnx_standin.py", "InferenceSession", 2),
    ]


def test_scripts_that_open_sessions_of_their_own_see_no_quantized_graph():
    """What measures or judges one goes through the package, or starts from the same options."""
    own = set()
    for path in [*(ROOT / "benchmarks").rglob("*.py"), *(ROOT / "checkpoints").glob("*.py")]:
        source = path.read_text()
        if "InferenceSession(" in source and "session_options(onnxruntime)" not in source:
            own.add(path.name)
            assert not any(word in source.lower() for word in ("int8", "fp8", "quantiz")), path
    assert own == {"judge.py", "plain.py", "plain_tower.py", "timm_export.py"}


@pytest.mark.parametrize("dtype", [TensorProto.INT8, TensorProto.FLOAT8E4M3FN])
@pytest.mark.parametrize("op", ["Relu", "Clip"])
def test_what_cuts_off_negative_values_stays_before_a_pair(op, dtype):
    """onnxruntime drops it where the zero point is the type's smallest value, which it takes FP8's zero for."""
    constants = [helper.make_tensor("scale", TensorProto.FLOAT, [], [0.5]), helper.make_tensor("zero", dtype, [], [0])]
    inputs = ["x"]
    if op == "Clip":
        constants += [
            helper.make_tensor(name, TensorProto.FLOAT, [], [value]) for name, value in (("low", 0.0), ("high", 9.0))
        ]
        inputs += ["low", "high"]
    nodes = [
        helper.make_node(op, inputs, ["cut"]),
        helper.make_node("QuantizeLinear", ["cut", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"]),
    ]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in "xy")
    model = helper.make_model(
        helper.make_graph(nodes, op, [x], [y], constants), opset_imports=[helper.make_opsetid("", 20)], ir_version=9
    )
    session = onnx_file.open_proto(model, ".")
    np.testing.assert_array_equal(
        session.run(None, {"x": np.float32([-2, -0.5, 0, 1.5])})[0], np.float32([0, 0, 0, 1.5])
    )
