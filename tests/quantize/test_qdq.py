"""Q/DQ graphs: their form per target, and their numbers under onnxruntime."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from tiny_vit import TinyViT, normalize, run

from vit_convert.core.compare import compare
from vit_convert.core.errors import CalibrationError, UsageError
from vit_convert.quantize.calibrate import Calibration, calibrate
from vit_convert.quantize.placement import Site, place
from vit_convert.quantize.qdq import quantize, round_up_to_fp16, weight_scales


def quantized(tmp_path, images, target, attention=False, **options):
    """The fp32 file, the quantized model and the quantized file."""
    path = TinyViT(**options).save(tmp_path / "model.onnx")
    model = ir.load(path)
    placement = place(model, attention=attention)
    result = quantize(model, calibrate(path, images, normalize, placement.tensors()), placement.sites, target=target)
    saved = tmp_path / "model.int8.onnx"
    ir.save(result, saved, external_data="model.int8.onnx.data")
    onnx.checker.check_model(saved, full_check=True)
    return path, result, saved


def ops(model, op_type):
    return [node for node in model.graph if node.op_type == op_type]


@pytest.mark.parametrize(
    ("target", "attention", "options"),
    [
        ("trt10", False, {}),
        ("rtx", True, {}),
        ("trt11", False, {"fused_qkv": False}),
        ("trt8", False, {"opset": 17}),
        ("trt8", True, {"opset": 17, "layernorm": "two_pass"}),
    ],
)
def test_int8_is_close_to_fp32(tmp_path, images, target, attention, options):
    path, _, saved = quantized(tmp_path, images, target, attention, **options)
    x = normalize(images)
    result = compare(run(path, x)[0], run(saved, x)[0])
    # A GEMM of 8-bit inputs has a relative error of about 1 %; eight of them in a row, in quadrature, make 3 %, which
    # is a cosine of 1 - 0.03²/2 = 0.9995 on average; the worst of 24 images and the attention's ten more roundings stay
    # above 0.998.
    assert result.cosine > 0.998
    assert result.max_rel < 0.06
    assert result.max_abs > 0  # it is quantized


def test_modern_form(tmp_path, images):
    _, model, saved = quantized(tmp_path, images, "trt10", fused_qkv=False)
    # one pair for LayerNorm_0's output serves three MatMuls: 4 pairs a block; 6 weights a block
    assert len(ops(model, "QuantizeLinear")) == 2 * 4
    assert len(ops(model, "DequantizeLinear")) == 2 * (4 + 6)
    weights = [node for node in ops(model, "DequantizeLinear") if node.inputs[0].is_initializer()]
    assert len(weights) == 12
    for node in weights:
        integers, scale, zero_point = (value.const_value.numpy() for value in node.inputs)
        assert integers.dtype == zero_point.dtype == np.int8 and not zero_point.any()
        assert scale.shape == (integers.shape[1],) and node.attributes["axis"].as_int() == 1
        assert integers.min() >= -127
        # the scale is rounded up by at most 2**-10, which takes 127 to no less than 126.87
        assert (np.abs(integers.astype(int)).max(axis=0) == 127).all()
        np.testing.assert_array_equal(scale, scale.astype(np.float16))
    kernels = [v for v in model.graph.initializers if v.endswith("/kernel")]
    assert sorted(kernels) == ["embedding/kernel", "head/kernel"]
    for node in ops(model, "QuantizeLinear"):
        assert node.inputs[2].dtype == ir.DataType.INT8
    # only the four linears of each block read quantized tensors; the residual stream does not
    for node in ops(model, "Add"):
        assert not any(value.name.endswith("/dequantized") for value in node.inputs)
    data = saved.with_name("model.int8.onnx.data")
    assert data.stat().st_size < 0.5 * (tmp_path / "model.onnx.data").stat().st_size


def test_trt8_form(tmp_path, images):
    _, model, _ = quantized(tmp_path, images, "trt8", opset=17)
    assert model.opset_imports[""] <= 17
    weights = [node for node in ops(model, "QuantizeLinear") if node.inputs[0].is_initializer()]
    assert len(weights) == 8
    assert len(ops(model, "QuantizeLinear")) == len(ops(model, "DequantizeLinear")) == 16
    for node in weights:
        assert node.inputs[0].dtype == ir.DataType.FLOAT and node.attributes["axis"].as_int() == 1
    for node in [*ops(model, "QuantizeLinear"), *ops(model, "DequantizeLinear")]:
        assert node.inputs[1].dtype == ir.DataType.FLOAT
        assert node.inputs[2].dtype == ir.DataType.INT8 and not node.inputs[2].const_value.numpy().any()


def test_every_dequantized_weight_feeds_its_matmul_directly(tmp_path, images):
    _, model, _ = quantized(tmp_path, images, "rtx", attention=True)
    for node in ops(model, "DequantizeLinear"):
        if node.inputs[0].is_initializer():
            assert [(use.node.op_type, use.idx) for use in node.outputs[0].uses()] == [("MatMul", 1)]
    for node in ops(model, "MatMul"):
        if node.outputs[0].name.endswith(("scores", "attended")):
            assert [value.producer().op_type for value in node.inputs] == ["DequantizeLinear"] * 2


def test_the_given_model_is_left_alone(tmp_path, images):
    path = TinyViT().save(tmp_path / "model.onnx")
    model = ir.load(path)
    before = ir.to_proto(model).SerializeToString()
    placement = place(model)
    quantize(model, calibrate(path, images, normalize), placement.sites, target="trt10")
    assert ir.to_proto(model).SerializeToString() == before


def test_scales():
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(50, 20)).astype(np.float32)
    weight[:, 3] = 0
    scales = weight_scales(weight)
    expected = [max(abs(float(x)) for x in column) / 127 or 1.0 for column in weight.T]
    np.testing.assert_allclose(scales, expected, rtol=1e-7)  # float32
    rounded = round_up_to_fp16(scales)
    assert (rounded >= scales).all() and (rounded <= scales * (1 + 2**-10)).all()
    np.testing.assert_array_equal(rounded, rounded.astype(np.float16))


def test_errors(tmp_path, images):
    path = TinyViT().save(tmp_path / "model.onnx")
    model = ir.load(path)
    sites = place(model).sites
    with pytest.raises(UsageError, match="opset 17 at most, the graph has 20"):
        quantize(model, calibrate(path, images, normalize), sites, target="trt8")
    partial = calibrate(path, images, normalize, [sites[0].tensor])
    with pytest.raises(
        CalibrationError,
        match="block_00/out: no range for Transformer/encoderblock_0/MultiHeadDotProductAttention_0/merged",
    ):
        quantize(model, partial, sites, target="trt10")


LINEARS = """<ir_version: 8, opset_import: ["" : OPSET]> g (float[n, 4] x, float[n, 4] z) => (float[n, 3] y,
    float[n, 3] w)
    <float[4, 3] kernel = {VALUES}> { y = MatMul (x, kernel) w = MatMul (z, kernel) }"""
KERNEL = np.array([[1, -2, 0.5], [0.25, 4, -1], [-8, 1, 0], [0, 0.5, 0.125]], np.float32)
RANGES = {"x": 2.0, "z": 0.5}


def linears(opset=20):
    """Two products of graph inputs with one weight, as where an embedding is tied, and where the model begins with a
    linear."""
    values = ", ".join(map(str, KERNEL.reshape(-1).tolist()))
    model = ir.from_onnx_text(LINEARS.replace("OPSET", str(opset)).replace("VALUES", values))
    return model, [Site("b", "in", "x", "y", "kernel"), Site("b", "out", "z", "w", "kernel")]


def rounded(values, scale):
    """Quantized and dequantized as ONNX defines it: halves go to even."""
    return np.clip(np.rint(values / scale), -128, 127) * scale


@pytest.mark.parametrize(("target", "opset"), [("trt10", 13), ("trt10", 20), ("rtx", 20), ("trt8", 13), ("trt8", 17)])
def test_sites_at_graph_inputs_that_share_a_weight(target, opset):
    model, sites = linears(opset)
    result = quantize(model, Calibration(RANGES, RANGES, "minmax", 1, {}), sites, target=target)
    assert len(ops(result, "QuantizeLinear")) == (3 if target == "trt8" else 2)
    assert len(ops(result, "DequantizeLinear")) == 3  # one for each input, and one weight for both
    rng = np.random.default_rng(0)
    feeds = {"x": rng.uniform(-2.5, 2.5, (5, 4)).astype(np.float32), "z": rng.uniform(-1, 1, (5, 4)).astype(np.float32)}
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL  # every operator as it stands
    session = ort.InferenceSession(ir.to_proto(result).SerializeToString(), options, providers=["CPUExecutionProvider"])
    spell = (lambda scale: np.float32(scale)) if target == "trt8" else (lambda scale: round_up(np.float32(scale)))
    weight = KERNEL.copy()
    for column in range(3):
        weight[:, column] = rounded(KERNEL[:, column], spell(np.abs(KERNEL[:, column]).max() / 127))
    for name, got in zip(("x", "z"), session.run(None, feeds)):
        expected = rounded(feeds[name], spell(RANGES[name] / 127)).astype(np.float64) @ weight.astype(np.float64)
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-5)  # four float32 products of up to 20 are added


def round_up(scale):
    """The next float16 that is not below a float32."""
    half = np.float16(scale)
    return np.float32(half if np.float32(half) >= scale else np.nextafter(half, np.float16(np.inf)))


@pytest.mark.parametrize(("precision", "least"), [("int8", 13), ("fp8", 19)])
def test_the_opset_that_knows_a_type(precision, least):
    calibration = Calibration(RANGES, RANGES, "minmax", 1, {})
    model, sites = linears(least)
    assert ops(quantize(model, calibration, sites, target="trt10", precision=precision), "DequantizeLinear")
    model, sites = linears(least - 1)
    with pytest.raises(UsageError, match=f"{precision} needs opset {least}, the graph has {least - 1}"):
        quantize(model, calibration, sites, target="trt10", precision=precision)


def test_a_tensor_that_was_always_zero_has_a_scale():
    model, sites = linears()
    result = quantize(model, Calibration({"x": 0.0, "z": 1.0}, {}, "minmax", 1, {}), sites, target="trt10")
    node = next(node for node in ops(result, "QuantizeLinear") if node.inputs[0].name == "x")
    assert node.inputs[1].const_value.numpy() == round_up(np.float32(1 / 127))


def test_a_precision_that_is_none():
    model, sites = linears()
    with pytest.raises(UsageError, match=r"'int9' is not quantized\. Did you mean int8\?"):
        quantize(model, Calibration(RANGES, RANGES, "minmax", 1, {}), sites, target="trt10", precision="int9")
    with pytest.raises(UsageError, match="target trt8 reads no fp8 graph"):
        quantize(linears(17)[0], Calibration(RANGES, RANGES, "minmax", 1, {}), sites, target="trt8", precision="fp8")


@pytest.mark.parametrize("shape", [(4, 6), (6, 4, 1), (6, 4, 1, 1), (6, 4, 3, 2), (6, 2, 1, 1, 2)])
@pytest.mark.parametrize(("precision", "target"), [("int8", "trt8"), ("int8", "trt10"), ("fp8", "trt10")])
def test_weights_of_every_rank_have_a_scale_for_each_output(shape, precision, target):
    """The last axis of a product's weight, the first of a convolution's."""
    op, sides = ("MatMul", "n, 4") if len(shape) == 2 else ("Conv", ", ".join(map(str, ("n", shape[1], *shape[2:]))))
    model = ir.from_onnx_text(
        f'<ir_version: 8, opset_import: ["" : {17 if target == "trt8" else 20}]> g (float[{sides}] x) => (float[] y)'
        f" <float[{', '.join(map(str, shape))}] w> {{ y = {op} (x, w) }}"
    )
    weight = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    value = next(value for node in model.graph for value in node.inputs if value.name == "w")
    value.const_value, value.shape = ir.tensor(weight, name="w"), ir.Shape(shape)
    model.graph.register_initializer(value)
    calibration = Calibration({"x": 1.0}, {"x": 1.0}, "minmax", 1, {})
    given = "".join([*precision])  # equal to the name and not the same object, as a part of a config's text is
    result = quantize(model, calibration, [Site("b", "fc", "x", "y", "w")], target=target, precision=given)
    node = next(node for node in ops(result, "DequantizeLinear") if node.outputs[0].name == "w/dequantized")
    axis, stored = node.attributes["axis"].as_int(), node.inputs[0].const_value
    assert shape[axis] == 6 and (stored is None) == (target == "trt8")
    rows = np.moveaxis(weight, axis, 0).reshape(6, -1)
    scales = np.abs(rows).max(1) / (127 if precision == "int8" else 448)
    scales = scales if target == "trt8" else np.array([round_up(scale) for scale in scales])
    np.testing.assert_allclose(node.inputs[1].const_value.numpy(), scales, rtol=1e-7)
    assert node.inputs[2].const_value.shape == (6,)
    if stored is not None:
        assert stored.shape == shape
        found = np.moveaxis(stored.numpy().astype(np.float32), axis, 0).reshape(6, -1) * scales[:, None]
        # half a step of whole numbers; of E4M3, whose mantissa has three bits, a sixteenth of the value
        most = 0.5 * scales[:, None] if precision == "int8" else np.maximum(np.abs(rows) / 16, 2**-10 * scales[:, None])
        assert (np.abs(found - rows) <= most * 1.0001).all()
