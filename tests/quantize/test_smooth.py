"""SmoothQuant: exact in fp32, the paper's formula, and what it brings on a real model with outlier channels."""

import numpy as np
import onnx_ir as ir
import pytest
from outliers import CHECKPOINTS, write_outlier_digits
from tiny_vit import TinyViT, normalize, run

from vit_convert.convert import convert
from vit_convert.core.compare import compare
from vit_convert.core.config import default_config
from vit_convert.core.errors import UsageError
from vit_convert.core.onnx_file import open_session, run_session, save_onnx
from vit_convert.quantize.activation_max import largest
from vit_convert.quantize.placement import place
from vit_convert.quantize.smooth import find_norms, smooth

FORMS = [
    {},
    {"fused_qkv": False},
    {"opset": 17},
    {"opset": 17, "layernorm": "two_pass", "fused_qkv": False},
    {"layernorm": "fast_variance"},
]


def smoothed(tmp_path, images, strength=0.5, **options):
    path = TinyViT(**options).save(tmp_path / "model.onnx")
    model = ir.load(path)
    sites = place(model).sites
    norms, _ = find_norms(model, sites)
    amax = largest(path, [norm.tensor for norm in norms], [normalize(images)], per_channel=True)
    return path, smooth(model, sites, amax, strength=strength)


@pytest.mark.parametrize("options", FORMS)
def test_it_is_exact_in_fp32(tmp_path, images, options):
    path, result = smoothed(tmp_path, images, **options)
    assert len(result.factors) == 4 and not result.declined  # two norms in each of two blocks
    assert all(s.max() / s.min() > 1.3 for s in result.factors.values())  # so that something was moved
    save_onnx(result.model, tmp_path / "smooth.onnx")
    x = normalize(images)
    # Only roundings of x/s and w·s differ, 2**-24 each; a sum of 128 of them, eight times over, stays below 1e-5 of
    # scale.
    assert compare(run(path, x)[0], run(tmp_path / "smooth.onnx", x)[0]).max_rel <= 1e-5


@pytest.mark.parametrize("strength", [0.3, 0.5, 0.8])
def test_factors_are_those_of_the_paper(tmp_path, images, strength):
    path, result = smoothed(tmp_path, images, strength, fused_qkv=False)
    weights = {name: v.const_value.numpy() for name, v in ir.load(path).graph.initializers.items()}
    scope = "Transformer/encoderblock_1"
    readers = [weights[f"{scope}/MultiHeadDotProductAttention_0/{part}/kernel"] for part in ("query", "key", "value")]
    outputs = run_session(open_session(path, [f"{scope}/LayerNorm_0/out"]), normalize(images))[
        f"{scope}/LayerNorm_0/out"
    ]
    expected = [
        float(np.abs(outputs[..., j]).max()) ** strength
        / max(abs(float(w)) for kernel in readers for w in kernel[j]) ** (1 - strength)
        for j in range(outputs.shape[-1])
    ]
    np.testing.assert_allclose(result.factors[f"{scope}/LayerNorm_0/out"], expected, rtol=1e-5)  # float32
    moved = result.model.graph.initializers[f"{scope}/MultiHeadDotProductAttention_0/key/kernel"].const_value.numpy()
    np.testing.assert_allclose(moved, readers[1] * np.array(expected)[:, None], rtol=1e-5)
    scale = result.model.graph.initializers[f"{scope}/LayerNorm_0/scale"].const_value.numpy()
    np.testing.assert_allclose(scale, weights[f"{scope}/LayerNorm_0/scale"] / expected, rtol=1e-5)


def test_dead_channels_are_left_alone(tmp_path, images):
    path = TinyViT().save(tmp_path / "model.onnx")
    model = ir.load(path)
    sites = place(model).sites
    norms, _ = find_norms(model, sites)
    amax = largest(path, [norm.tensor for norm in norms], [normalize(images)], per_channel=True)
    amax[norms[0].tensor][5] = 0
    assert smooth(model, sites, amax).factors[norms[0].tensor][5] == 1


def test_a_norm_with_another_reader_is_declined(tmp_path, images):
    vit = TinyViT()
    build = vit.norm

    def norm(x, scope):
        y = build(x, scope)
        return vit.op("Relu", [y], f"{scope}/relu") and y if scope.endswith("encoderblock_0/LayerNorm_1") else y

    vit.norm = norm
    model = ir.load(vit.save(tmp_path / "model.onnx"))
    norms, declined = find_norms(model, place(model).sites)
    assert declined == {
        "Transformer/encoderblock_0/LayerNorm_1/out": "Relu Transformer/encoderblock_0/LayerNorm_1/relu/Relu reads "
        "it too"
    }
    assert len(norms) == 3


def test_a_scale_that_two_norms_share_is_split(tmp_path, images):
    vit = TinyViT()
    build = vit.norm

    def norm(x, scope):
        y = build(x, scope)
        vit.nodes[-1].input[1] = "Transformer/encoderblock_0/LayerNorm_0/scale"
        return y

    vit.norm = norm
    path = vit.save(tmp_path / "model.onnx")
    model = ir.load(path)
    sites = place(model).sites
    amax = largest(path, [n.tensor for n in find_norms(model, sites)[0]], [normalize(images)], per_channel=True)
    save_onnx(smooth(model, sites, amax).model, tmp_path / "smooth.onnx")
    x = normalize(images)
    assert compare(run(path, x)[0], run(tmp_path / "smooth.onnx", x)[0]).max_rel <= 1e-5


@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_strength_out_of_range(tmp_path, images, strength):
    with pytest.raises(UsageError, match="between 0 and 1"):
        smoothed(tmp_path, images[:2], strength)


@pytest.mark.slow
def test_it_recovers_what_outlier_channels_cost(tmp_path):
    """Real weights, real images: the digits with three channels after each LayerNorm a hundred times as large."""
    config = default_config()
    config.checkpoint = str(write_outlier_digits(tmp_path / "outliers.npz", 100.0, range(6)))
    config.name, config.precision, config.engine.backend = "outliers", "int8", "none"
    config.calibration.data = str(CHECKPOINTS / "digits" / "calibration.zip")
    config.calibration.method = "minmax"
    config.evaluation.data = str(CHECKPOINTS / "digits" / "heldout.zip")
    config.evaluation.num_images = 150
    config.check.int8_cosine, config.check.max_top1_drop = -1.0, 100.0  # measured here, judged below
    plain = convert(config, tmp_path, quiet=True)
    assert "smooth" not in plain["checks"] and plain["verdicts"]["int8"]["accurate"]
    config.calibration.smooth = 0.5
    smooth = convert(config, tmp_path, quiet=True)
    assert [row["name"] for row in smooth["stages"] if row["status"] == "done"] == ["calibrate", "quantize"]
    assert smooth["checks"]["smooth"]["max_rel"] <= 1e-5
    assert smooth["calibration"]["smoothed"]["num_norms"] == 12
    before, after = plain["checks"]["int8"], smooth["checks"]["int8"]
    assert before["cosine"] < 0.9 and before["top1"] < 90.0
    assert after["cosine"] > 0.999 and after["top1"] >= 99.0
