"""FP8 (E4M3) graphs: their form, and their numbers against ml_dtypes' float8."""

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from outliers import CHECKPOINTS, DIGITS
from tiny_vit import TinyViT, normalize, run

from vit_convert.convert import convert
from vit_convert.core.compare import compare
from vit_convert.core.config import default_config
from vit_convert.core.errors import UsageError
from vit_convert.core.onnx_file import open_session, run_session
from vit_convert.quantize.calibrate import calibrate
from vit_convert.quantize.half_precision import to_fp16
from vit_convert.quantize.placement import place
from vit_convert.quantize.qdq import quantize

E4M3 = ml_dtypes.float8_e4m3fn


def fp8(tmp_path, images, *, attention=False, typed=False, **options):
    """The fp32 file, its calibration and the saved FP8 graph."""
    path = TinyViT(**options).save(tmp_path / "model.onnx")
    model = ir.load(path)
    placement = place(model, attention=attention)
    calibration = calibrate(path, images, normalize, placement.tensors())
    result = quantize(model, calibration, placement.sites, target="rtx", precision="fp8")
    saved = tmp_path / "model.fp8.onnx"
    ir.save(to_fp16(result).model if typed else result, saved, external_data="model.fp8.onnx.data")
    onnx.checker.check_model(saved, full_check=True)
    return path, calibration, saved


def as_float8(x, scale):
    """Round to nearest even, saturating, as ONNX's QuantizeLinear with saturate=1."""
    return np.clip(x / scale, -448, 448).astype(E4M3).astype(np.float32) * scale


def test_numbers_are_those_of_float8(tmp_path, images):
    path, calibration, saved = fp8(tmp_path, images)
    model = ir.load(saved)
    x = normalize(images)
    scope = "Transformer/encoderblock_0/LayerNorm_0/out"
    assert calibration.amax[scope] > calibration.thresholds[scope]  # entropy clips, FP8 takes the whole range
    scale = model.graph.initializers[f"{scope}/scale"].const_value.numpy()
    # rounded up to the next fp16 value, 2**-10 away at most
    assert calibration.amax[scope] / 448 <= scale <= calibration.amax[scope] / 448 * (1 + 2**-10)
    got = run_session(open_session(saved, [scope, f"{scope}/dequantized"]), x)
    np.testing.assert_array_equal(got[f"{scope}/dequantized"], as_float8(got[scope], scale))

    kernel = "Transformer/encoderblock_0/MlpBlock_0/Dense_0/kernel"
    weight = ir.load(path).graph.initializers[kernel].const_value.numpy()
    scales = model.graph.initializers[f"{kernel}/scale"].const_value.numpy()
    stored = model.graph.initializers[f"{kernel}/float8e4m3fn"].const_value.numpy()
    assert stored.dtype == E4M3
    assert (np.abs(stored.astype(np.float32)).max(axis=0) == 448).all()
    np.testing.assert_array_equal(stored.astype(np.float32) * scales, as_float8(weight, scales))


@pytest.mark.parametrize(("attention", "typed"), [(False, False), (True, False), (False, True), (True, True)])
def test_fp8_is_close_to_fp32(tmp_path, images, attention, typed):
    path, _, saved = fp8(tmp_path, images, attention=attention, typed=typed)
    x = normalize(images)
    (logits,) = run_session(open_session(saved), x).values()
    result = compare(run(path, x)[0], logits)
    # Three bits of mantissa: a relative error of up to 2**-4 and 2**-4/sqrt(3) = 3.6 % rms for each factor, 5 % for a
    # product; its terms' errors are independent, so each of the eight GEMMs gives 5 % of noise, and in quadrature along
    # the residual stream, whose skip carries half of the signal past each of them, about 10 %: a cosine of 0.995; the
    # worst of 24 images and attention stay above 0.98.
    assert 0.98 < result.cosine < 0.9999


def test_form(tmp_path, images):
    _, _, saved = fp8(tmp_path, images, typed=True)
    graph = ir.load(saved).graph
    quantizers = [node for node in graph if node.op_type == "QuantizeLinear"]
    assert len(quantizers) == 2 * 4
    for node in [*quantizers, *(node for node in graph if node.op_type == "DequantizeLinear")]:
        zero_point = node.inputs[2]
        assert zero_point.dtype == ir.DataType.FLOAT8E4M3FN
        assert not zero_point.const_value.numpy().astype(np.float32).any()
        assert node.inputs[1].dtype == ir.DataType.FLOAT16
    for node in quantizers:
        assert node.inputs[1].const_value.shape == ()  # activations have one scale
    weights = [v for v in graph.initializers.values() if v.dtype == ir.DataType.FLOAT8E4M3FN and len(v.shape) == 2]
    assert len(weights) == 2 * 4


def test_refusals(tmp_path, images):
    path = TinyViT(opset=17).save(tmp_path / "model.onnx")
    model = ir.load(path)
    sites, calibration = place(model).sites, calibrate(path, images[:2], normalize)
    with pytest.raises(UsageError, match="trt8 reads no fp8"):
        quantize(model, calibration, sites, target="trt8", precision="fp8")
    with pytest.raises(UsageError, match="fp8 needs opset 19, the graph has 17"):
        quantize(model, calibration, sites, target="trt10", precision="fp8")
    with pytest.raises(UsageError, match=r"'int4' is not quantized\. Did you mean int8"):
        quantize(model, calibration, sites, target="rtx", precision="int4")


@pytest.mark.slow
def test_fp8_through_the_pipeline(tmp_path):
    """Real weights and images, and TensorRT-RTX builds the engine; fp16 is built beside it."""
    pytest.importorskip("tensorrt_rtx")
    config = default_config()
    config.name, config.checkpoint, config.precision, config.engine.backend = "digits", str(DIGITS), "fp8", "rtx"
    config.calibration.data = str(CHECKPOINTS / "digits" / "calibration.zip")
    config.calibration.num_images, config.evaluation.num_images = 64, 150
    config.evaluation.data = str(CHECKPOINTS / "digits" / "heldout.zip")
    report = convert(config, tmp_path, quiet=True)
    assert [engine["precision"] for engine in report["engines"]] == ["fp16", "fp8"]
    assert report["checks"]["fp8"]["passed"] and len(report["checks"]["fp8"]["quantized"]) == 36
    # a point of top-1 is 1.5 of the 150 images
    assert report["verdicts"]["fp8"]["accurate"] and report["checks"]["fp8"]["top1"] >= 99.0
    assert report["engine"]["precision"] == "fp16"
    assert report["verdicts"]["fp8"]["text"] in report["engine"]["recommended_because"]
