"""MLPs that are 1 × 1 convolutions are quantized as the matrix products that they were: real weights and images in both
forms."""

import dataclasses
import functools
import pathlib

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from outliers import CHECKPOINTS, DIGITS, write_outlier_digits
from tiny_vit import unfused

from vit_convert.core.compare import Comparison, compare
from vit_convert.core.onnx_file import open_session, run_session, save_onnx
from vit_convert.export.exporter import export_model
from vit_convert.export.targets import lowering_named, target_named
from vit_convert.families.load import load_checkpoint
from vit_convert.families.vit.model import vit_model
from vit_convert.images.preprocess import preprocess_for
from vit_convert.images.sources import open_images
from vit_convert.quantize.activation_max import largest
from vit_convert.quantize.calibrate import Calibration, calibrate
from vit_convert.quantize.placement import Placement, place
from vit_convert.quantize.qdq import quantize
from vit_convert.quantize.sensitivity import SWITCHES, candidates, switched
from vit_convert.quantize.smooth import Smoothed, find_norms, smooth

normalize = preprocess_for("vit_jax", (32, 32)).normalize
CHECKPOINTS_BY_NAME = ["digits", "outliers"]
NUM_CALIBRATION = 64
# GEMMs of 8-bit inputs, 24 in a row, are off by 3 % on average; the worst of 150 images by 7.5 %: 1 - 0.075²/2
WORST_COSINE = 0.997


@functools.cache
def pictures(name: str, count: int) -> np.ndarray:
    """The first digits of a set: uint8 [count, 32, 32, 3]."""
    source = open_images(CHECKPOINTS / "digits" / name)
    return np.stack([source.read(i) for i in range(count)])


@dataclasses.dataclass
class Form:
    """One lowering of the digits model for TensorRT 8.6, in its folder."""

    path: pathlib.Path

    @functools.cached_property
    def model(self) -> ir.Model:
        return ir.load(self.path)

    @functools.cached_property
    def placement(self) -> Placement:
        return place(self.model)

    @functools.cached_property
    def channels(self) -> dict[str, np.ndarray]:
        """The largest |x| of each channel after each LayerNorm that is quantized."""
        norms, declined = find_norms(self.model, self.placement.sites)
        assert len(norms) == 12 and not declined  # two in each of six blocks
        return largest(
            self.path,
            [norm.tensor for norm in norms],
            [normalize(pictures("calibration.zip", NUM_CALIBRATION))],
            per_channel=True,
        )

    @functools.cached_property
    def smoothed(self) -> Smoothed:
        return smooth(self.model, self.placement.sites, self.channels)

    def calibration(self, path: pathlib.Path) -> Calibration:
        return calibrate(
            path, pictures("calibration.zip", NUM_CALIBRATION), normalize, self.placement.tensors(), method="minmax"
        )

    def quantized(self, model: ir.Model, path: pathlib.Path, target: str = "trt8") -> ir.Model:
        """`model`, which lies at `path`, in int8."""
        return quantize(model, self.calibration(path), self.placement.sites, target=target)

    def int8(self, model: ir.Model, path: pathlib.Path) -> Comparison:
        """What int8 makes of the held-out digits, against this form in fp32."""
        saved = path.with_suffix(".int8.onnx")
        save_onnx(self.quantized(model, path), saved)
        onnx.checker.check_model(saved, full_check=True)
        return compare(logits(self.path), logits(saved))


def logits(path: pathlib.Path) -> np.ndarray:
    return run_session(open_session(path), normalize(pictures("heldout.zip", 150)))["logits"]


@pytest.fixture(scope="module")
def forms(tmp_path_factory):
    """By checkpoint and lowering; three channels after each LayerNorm of "outliers" are a hundred times as large."""
    root = tmp_path_factory.mktemp("forms")
    files = {"digits": DIGITS, "outliers": write_outlier_digits(root / "outliers.npz", 100.0, range(6))}
    targets = {"conv": target_named("trt8"), "matmul": lowering_named("trt8", "matmul")}
    found = {}
    for name in CHECKPOINTS_BY_NAME:
        checkpoint = load_checkpoint(files[name])
        model = vit_model(checkpoint.architecture, checkpoint.params)
        for lowering, target in targets.items():
            path = root / f"{name}_{lowering}.onnx"
            export_model(model, path, target=target)
            found[name, lowering] = Form(path)
    return found


def both(forms, name="digits"):
    return forms[name, "conv"], forms[name, "matmul"]


def same_loss(matmul):
    """How far the cosine of the same arithmetic may be: float32 rounding takes one value in 10⁴ over a quantizer's
    edge, each by a step.

    That is twice the rounding error that every value has, so a hundredth of the loss is ample; it measures 2·10⁻⁵ of
    it.
    """
    return 0.01 * (1 - matmul.cosine)


def is_mlp(site):
    return site.kind in ("fc1", "fc2")


def test_the_same_layers_are_quantized(forms):
    conv, matmul = both(forms)
    assert [site.name for site in conv.placement.sites] == [site.name for site in matmul.placement.sites]
    assert conv.placement.weights() == matmul.placement.weights()
    producers = {value.name: node for node in conv.model.graph for value in node.outputs}
    operators = {(is_mlp(site), producers[site.node].op_type) for site in conv.placement.sites}
    assert operators == {(True, "Conv"), (False, "MatMul")}
    # the embedding is a matrix product and the head a Gemm, both outside the blocks
    assert len(conv.placement.sites) == 6 * 6


@pytest.mark.parametrize("target", ["trt8", "trt10"])
def test_weight_scales_are_those_of_the_matmul_form(forms, target):
    """A scale for each output channel: along axis 0 of [N, K, 1, 1], the same numbers as along axis 1 of [K, N]."""
    found = {}
    for form in both(forms):
        for node in form.quantized(form.model, form.path, target).graph:
            stored = node.inputs[0]
            weight = node.outputs[0].name.removesuffix("/quantized").removesuffix("/dequantized")
            if weight in form.placement.weights() and stored.is_initializer():
                values = [value.const_value.numpy() for value in node.inputs]
                found.setdefault(weight, []).append((node.op_type, node.attributes["axis"].as_int(), *values))
    sites = {site.weight: site for site in both(forms)[0].placement.sites}
    assert set(found) == set(sites)
    for weight, (conv, matmul) in found.items():
        operator, axis, stored, scales, zeros = conv
        assert operator == matmul[0] == ("QuantizeLinear" if target == "trt8" else "DequantizeLinear")
        assert (axis, matmul[1]) == (0 if is_mlp(sites[weight]) else 1, 1)
        assert scales.shape == zeros.shape == (stored.shape[axis],)
        np.testing.assert_array_equal(scales, matmul[3])
        turned = stored[..., 0, 0].T if is_mlp(sites[weight]) else stored
        np.testing.assert_array_equal(turned, matmul[2])
        # the largest of a channel fills the range; rounding the scale up to fp16 takes 127 to 126.87 at least
        if target == "trt10":
            inputs = tuple(i for i in range(stored.ndim) if i != axis)
            assert (np.abs(stored.astype(int)).max(axis=inputs) == 127).all()


@pytest.mark.slow
def test_activations_get_the_ranges_of_the_matmul_form(forms):
    conv, matmul = both(forms)
    by_layer = [
        {site.name: form.calibration(form.path).amax[site.tensor] for site in form.placement.sites}
        for form in (conv, matmul)
    ]
    assert by_layer[0].keys() == by_layer[1].keys()
    for name, amax in by_layer[0].items():
        # float32 sums of up to 384 terms in another order, over six blocks
        assert amax == pytest.approx(by_layer[1][name], rel=1e-4), name


@pytest.mark.parametrize("name", CHECKPOINTS_BY_NAME)
def test_channel_ranges_are_those_of_the_matmul_form(forms, name):
    conv, matmul = both(forms, name)
    assert conv.channels.keys() == matmul.channels.keys()
    for tensor, amax in conv.channels.items():
        assert amax.shape == (96,)
        np.testing.assert_allclose(amax, matmul.channels[tensor], rtol=1e-4)  # as above
    tensor = "Transformer/encoderblock_3/LayerNorm_1/LayerNormalization"
    values = run_session(open_session(conv.path, [tensor]), normalize(pictures("calibration.zip", NUM_CALIBRATION)))[
        tensor
    ]
    assert values.shape == (NUM_CALIBRATION * 17, 96, 1, 1)
    np.testing.assert_array_equal(conv.channels[tensor], np.abs(values).max(axis=(0, 2, 3)))


def test_int8_is_as_good_as_in_the_matmul_form(forms):
    conv, matmul = (form.int8(form.model, form.path) for form in both(forms))
    assert WORST_COSINE < conv.cosine < 1
    assert conv.cosine == pytest.approx(matmul.cosine, abs=same_loss(matmul))


def test_smoothing_changes_nothing_in_fp32(forms, tmp_path):
    conv, _ = both(forms, "outliers")
    save_onnx(conv.smoothed.model, tmp_path / "smooth.onnx")
    # Only roundings of x/s and w·s differ, 2**-24 each; a sum of 96 of them, 24 times over, stays below 1e-5 of scale.
    assert compare(logits(conv.path), logits(tmp_path / "smooth.onnx")).max_rel <= 1e-5


@pytest.mark.parametrize("name", CHECKPOINTS_BY_NAME)
def test_smoothing_finds_the_factors_of_the_matmul_form(forms, name):
    conv, matmul = (form.smoothed for form in both(forms, name))
    assert conv.factors.keys() == matmul.factors.keys() and len(conv.factors) == 12
    for tensor, factors in conv.factors.items():
        assert factors.max() / factors.min() > (20 if name == "outliers" else 1.3)  # so that something was moved
        np.testing.assert_allclose(factors, matmul.factors[tensor], rtol=1e-4)  # of channel ranges that agree so
    turned = {"scale": lambda v: v[:, 0, 0], "bias": lambda v: v[:, 0, 0], "kernel": lambda v: v[..., 0, 0].T}
    for i in range(6):
        for weight in ("LayerNorm_1/scale", "LayerNorm_1/bias", "MlpBlock_0/Dense_0/kernel"):
            here, there = (
                result.model.graph.initializers[f"Transformer/encoderblock_{i}/{weight}"].const_value.numpy()
                for result in (conv, matmul)
            )
            np.testing.assert_allclose(turned[weight.rpartition("/")[2]](here), there, rtol=1e-4)


def test_smoothing_recovers_what_outlier_channels_cost(forms):
    """As in the MatMul form, and to the same cosine."""
    after = []
    for form in both(forms, "outliers"):
        assert form.int8(form.model, form.path).cosine < 0.9
        path = form.path.with_suffix(".smooth.onnx")
        save_onnx(form.smoothed.model, path)
        after.append(form.int8(ir.load(path), path))
    conv, matmul = after
    assert WORST_COSINE < conv.cosine < 1
    assert conv.cosine == pytest.approx(matmul.cosine, abs=same_loss(matmul))


def test_a_switched_graph_gives_the_numbers_of_its_own_graph(forms, tmp_path):
    """What measures layers one by one: convolutions are switched like matrix products."""
    conv, _ = both(forms)
    calibration, units = conv.calibration(conv.path), candidates(conv.model, {}, attention=False)
    save_onnx(switched(conv.model, calibration, units, target="trt8", precision="int8"), tmp_path / "switched.onnx")
    x = normalize(pictures("heldout.zip", 24))
    for kinds in (set(), {"fc1"}, {"fc2"}, {"qkv", "out", "fc1", "fc2"}):
        chosen = [unit for unit in units if unit.kind in kinds]
        own = quantize(conv.model, calibration, [site for unit in chosen for site in unit.sites], target="trt8")
        save_onnx(own, tmp_path / "own.onnx")
        (expected,) = unfused(tmp_path / "own.onnx").run(None, {"images": x})
        on = np.array([unit in chosen for unit in units])
        (got,) = unfused(tmp_path / "switched.onnx").run(None, {"images": x, SWITCHES: on})
        np.testing.assert_array_equal(got, expected, err_msg=str(kinds))  # the same arithmetic, node by node
