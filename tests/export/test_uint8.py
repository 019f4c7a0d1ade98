"""Pixels in: the graph that takes uint8 computes what the one behind the preprocessing record computes."""

import flax.linen as nn
import jax
import numpy as np
import onnx_ir as ir
import pytest
from export_graphs import architecture, random_params
from signatures import image_input

from vit_convert.core.onnx_file import open_session, run_session, save_onnx
from vit_convert.export.exporter import export_model
from vit_convert.export.targets import TARGETS
from vit_convert.families.user.model import user_model
from vit_convert.families.vit.model import vit_model
from vit_convert.images.preprocess import preprocess_for
from vit_convert.quantize.calibrate import calibrate
from vit_convert.quantize.graph import activations
from vit_convert.quantize.half_precision import to_bf16, to_fp16
from vit_convert.quantize.placement import place
from vit_convert.quantize.qdq import quantize

SIZE = (48, 64)


def pixels(count=5, size=SIZE):
    """Random pixels, some images all dark or all bright: the ends 0 and 255 are where a wrong constant shows most."""
    images = np.random.default_rng(3).integers(0, 256, (count, *size, 3), np.uint8)
    images[0, 0, 0], images[0, 0, 1], images[1], images[2] = 0, 255, 0, 255
    return images


def export(path, model, record=None, *, target="rtx", layout="NHWC", size=SIZE, **options):
    constants = None if record is None else (record.scale, record.offset)
    export_model(model, path, target=TARGETS[target], layout=layout, pixels=constants, **options)
    return path


def run(path, images, layout="NHWC", tensor=None):
    fed = images if layout == "NHWC" else np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    session = open_session(path, [tensor] if tensor else [])
    return list(run_session(session, fed).values())[-1].astype(np.float32)


def error(got, expected):
    assert got.shape == expected.shape
    return float(np.abs(got - expected).max() / np.abs(expected).max())


def ops(path, count=3):
    return [node.op_type for node in list(ir.load(path).graph)[:count]]


# float32 against float32: the same sums of 768 products in another order and with constants rounded once, as all fp32
# checks.
@pytest.mark.parametrize(
    ("family", "target", "layout"),
    [("vit_jax", "rtx", "NHWC"), ("imagenet", "rtx", "NCHW"), ("clip", "trt8", "NHWC"), ("imagenet", "trt8", "NCHW")],
)
def test_folded_into_the_patch_convolution(tmp_path, family, target, layout):
    arch, record = architecture(), preprocess_for(family, SIZE)
    model = vit_model(arch, random_params(arch))
    plain = export(tmp_path / "float32.onnx", model, target=target)
    folded = export(tmp_path / "uint8.onnx", model, record, target=target, layout=layout)
    graph = ir.load(folded).graph
    assert graph.inputs[0].dtype == ir.DataType.UINT8 and ops(folded, 2) == ["Cast", "Sub"]
    assert list(graph.inputs[0].shape)[1:] == ([*SIZE, 3] if layout == "NHWC" else [3, *SIZE])
    assert len(list(graph)) <= len(list(ir.load(plain).graph)) + 2
    as_product = target == "trt8" and layout == "NHWC"  # the bias is then in the position table
    assert ("embedding/bias" in graph.initializers) is not as_product
    assert list(graph.initializers["embedding/kernel"].shape) == ([768, 32] if as_product else [32, 3, 16, 16])
    if as_product:
        assert ops(folded, 6) == ["Cast", "Sub", "Reshape", "Transpose", "Reshape", "MatMul"]
    for tensor in (*(["embedding/Conv"] if target == "rtx" else []), "block_00", None):
        assert (
            error(run(folded, pixels(), layout, tensor), run(plain, record.normalize(pixels()), tensor=tensor)) <= 1e-5
        )


def test_folded_weights_are_those_of_float64(tmp_path):
    arch, record = architecture(), preprocess_for("imagenet", SIZE)
    params = random_params(arch)
    path = export(tmp_path / "uint8.onnx", vit_model(arch, params), record)
    # [B, rows, columns, 16·16·3]
    patches = pixels().reshape(5, 3, 16, 4, 16, 3).transpose(0, 1, 3, 2, 4, 5).reshape(5, 3, 4, -1)
    scale = 1 / (255 * np.array([0.229, 0.224, 0.225]))
    values = patches * np.tile(scale, 256) - np.tile(
        np.array([0.485, 0.456, 0.406]) / np.array([0.229, 0.224, 0.225]), 256
    )
    expected = values @ params["embedding/kernel"].astype(np.float64).reshape(-1, 32) + params["embedding/bias"]
    got = run(path, pixels(), tensor="embedding/Conv").transpose(0, 2, 3, 1)
    assert error(got, expected) <= 2e-6  # 768 float32 products


class _Convolution(nn.Module):
    padding: str
    use_bias: bool = True

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = nn.Conv(8, (3, 3), strides=(2, 2), padding=self.padding, use_bias=self.use_bias, name="stem")(images)
        return x.mean(axis=(1, 2))


def convolution(padding, use_bias=True):
    module = _Convolution(padding, use_bias)
    variables = module.init(jax.random.key(0), np.zeros((1, *SIZE, 3), np.float32))
    return user_model(module, variables, image_shape=(*SIZE, 3))


@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
def test_padding_is_not_a_pixel(tmp_path, layout):
    record = preprocess_for("imagenet", SIZE)
    plain = export(tmp_path / "float32.onnx", convolution("SAME"))
    unfolded = export(tmp_path / "uint8.onnx", convolution("SAME"), record, layout=layout)
    assert ops(unfolded) == ["Cast", "Mul", "Add"]
    # The same constants, product and sum as the record's own: the same bits go into the same convolution.
    assert error(run(unfolded, pixels(), layout), run(plain, record.normalize(pixels()))) <= 1e-6


def test_convolution_without_bias_gets_one(tmp_path):
    record = preprocess_for("imagenet", SIZE)
    plain = export(tmp_path / "float32.onnx", convolution("VALID", use_bias=False))
    folded = export(tmp_path / "uint8.onnx", convolution("VALID", use_bias=False), record)
    assert ops(folded, 2) == ["Cast", "Sub"] and "stem/bias" in ir.load(folded).graph.initializers
    assert error(run(folded, pixels()), run(plain, record.normalize(pixels()))) <= 1e-5


def test_images_read_twice_are_normalised_once(tmp_path):
    def model(params, images):
        return images.mean(axis=(1, 2)) + images[:, 0, 0] * params["a"]

    record = preprocess_for("clip", SIZE)
    made = user_model(model, {"a": np.full(3, 2, np.float32)}, image_shape=(*SIZE, 3))
    path = export(tmp_path / "uint8.onnx", made, record)
    assert ops(path) == ["Cast", "Mul", "Add"]
    assert error(run(path, pixels()), made.run(record.normalize(pixels()))["logits"]) <= 1e-5


def test_fp16_loses_no_more_than_with_normalised_input(tmp_path):
    arch, record = architecture(), preprocess_for("imagenet", SIZE)
    model = vit_model(arch, random_params(arch))
    plain, folded = export(tmp_path / "float32.onnx", model), export(tmp_path / "uint8.onnx", model, record)
    lowered = {}
    for name, path in (("plain", plain), ("folded", folded)):
        typed = to_fp16(ir.load(path))
        assert "embedding/Conv" not in typed.islands
        lowered[name] = tmp_path / f"{name}.fp16.onnx"
        save_onnx(typed.model, lowered[name])
    bright = np.clip(pixels() // 8 + 220, 0, 255).astype(np.uint8)  # what an uncentred kernel rounds badly
    for images in (pixels(), bright):
        expected = run(plain, record.normalize(images), tensor="embedding/Conv")
        before = error(run(lowered["plain"], record.normalize(images), tensor="embedding/Conv"), expected)
        after = error(run(lowered["folded"], images, tensor="embedding/Conv"), expected)
        # Pixels are exact in fp16 where normalised ones are rounded; what is left is the rounding of the kernels, of
        # equal size.
        assert after <= 1.1 * before and after < 1e-3


def test_normalisation_outside_the_convolution_stays_fp32(tmp_path):
    record = preprocess_for("imagenet", SIZE)
    path = export(tmp_path / "uint8.onnx", convolution("SAME"), record)
    for lower in (to_fp16, to_bf16):
        typed = lower(ir.load(path))
        assert [typed.islands.get(node.outputs[0].name) for node in list(typed.model.graph)[:3]] == [
            "normalises pixels"
        ] * 3


def test_ranges_are_measured_behind_the_pixels(tmp_path):
    arch, record = architecture(), preprocess_for("vit_jax", SIZE)
    path = export(tmp_path / "uint8.onnx", vit_model(arch, random_params(arch)), record)
    names = activations(ir.load(path).graph)
    assert "images" not in names and {"embedding/Conv", "block_00", "logits"} <= set(names)


@pytest.mark.parametrize(
    ("precision", "layout"), [("fp32", "NCHW"), ("fp16", "NHWC"), ("bf16", "NHWC"), ("int8", "NCHW")]
)
def test_tensorrt_rtx_builds_it(tmp_path, precision, layout):
    pytest.importorskip("tensorrt_rtx")
    from vit_convert.core.bundle import read_json
    from vit_convert.core.progress import Progress
    from vit_convert.engine.backend.trt import load_backend
    from vit_convert.engine.builder.build import build_engine
    from vit_convert.engine.builder.request import BuildRequest
    from vit_convert.engine.runtime.profiles import batch_profiles

    arch, record = architecture(), preprocess_for("vit_jax", SIZE)
    path = export(tmp_path / "fp32.onnx", vit_model(arch, random_params(arch)), record, layout=layout)
    if precision != "fp32":
        model = ir.load(path)
        if precision == "int8":
            turn = (0, 1, 2, 3) if layout == "NHWC" else (0, 3, 1, 2)
            calibration = calibrate(path, pixels(), lambda batch: batch.transpose(turn), method="minmax")
            model = quantize(model, calibration, place(model).sites, target="rtx")
        path = tmp_path / f"{precision}.onnx"
        save_onnx((to_bf16 if precision == "bf16" else to_fp16)(model).model, path)
    profiles = batch_profiles(image_input(SIZE, layout), SIZE, {"min": 1, "opt": 4, "max": 8, "profiles": ()})
    request = BuildRequest(path, precision, profiles=profiles)
    build_engine(load_backend("rtx"), request, tmp_path / "engine.plan", progress=Progress(quiet=True))
    (images,) = read_json(tmp_path / "engine.plan.json")["inputs"]
    assert images["dtype"] == "uint8" and images["shape"] == ([-1, *SIZE, 3] if layout == "NHWC" else [-1, 3, *SIZE])
