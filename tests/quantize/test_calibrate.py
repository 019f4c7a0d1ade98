"""Calibration against numpy over onnxruntime's own outputs; the cache."""

import json
import zlib

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from tiny_vit import TinyViT, normalize, run

from vit_convert.core.errors import CalibrationError, UsageError
from vit_convert.core.progress import Progress
from vit_convert.quantize import activations as activation_run
from vit_convert.quantize import calibrate as module
from vit_convert.quantize.activations import ActivationRun
from vit_convert.quantize.calibrate import METHODS, Calibration, calibrate, calibration_keys, sample_products
from vit_convert.quantize.graph import activations
from vit_convert.quantize.guard import Cost, Guard
from vit_convert.quantize.histogram import Histogram, entropy_threshold
from vit_convert.quantize.placement import place


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    return TinyViT().save(tmp_path_factory.mktemp("vit") / "model.onnx")


@pytest.fixture(scope="module")
def calibration(vit, images):
    return calibrate(vit, images, normalize, batch_size=5)


def with_outputs(path, names):
    """All of `names` as outputs of a copy that lies beside the weights."""
    proto = onnx.load(path, load_external_data=False)
    del proto.graph.output[:]
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    copy = path.with_name("outputs.onnx")
    onnx.save(proto, copy)
    return copy


def test_ranges_and_histograms_match_numpy(vit, images, calibration):
    names = place(ir.load(vit)).tensors()
    assert list(calibration.thresholds) == names and len(names) == 8
    values = run(with_outputs(vit, names), normalize(images))
    for name, value in zip(names, values):
        # the same kernels on batches of 5 and of 24: only the order of float32 sums in a GEMM may differ
        np.testing.assert_allclose(calibration.amax[name], np.abs(value).max(), rtol=1e-5)
        histogram = Histogram()
        histogram.add(value)
        # and so a value at a bin's edge may fall to the other side, which moves the best of some thousand thresholds by
        # very little
        np.testing.assert_allclose(calibration.costs[name].candidates[0], entropy_threshold(histogram), rtol=0.02)
        assert calibration.thresholds[name] in calibration.costs[name].candidates


def test_order_of_images_does_not_matter(vit, images, calibration):
    shuffled = calibrate(vit, images[::-1], normalize, batch_size=5)
    for name, threshold in calibration.thresholds.items():
        np.testing.assert_allclose(shuffled.thresholds[name], threshold, rtol=0.02)  # as above
        np.testing.assert_allclose(shuffled.amax[name], calibration.amax[name], rtol=1e-5)
    assert shuffled.keys["data"] != calibration.keys["data"]


def test_a_small_limit_splits_images_and_tensors(vit, images, calibration, monkeypatch):
    limit = 4 * 17 * 64 * 2  # two [17, 64] tensors of one image
    monkeypatch.setattr(activation_run, "OUTPUT_BYTES", limit)
    sizes = []
    counted = ActivationRun.activations

    def spy(self, names, label):
        for values, keys in counted(self, names, label):
            sizes.append((len(values), sum(array.nbytes for array in values.values())))
            yield values, keys

    monkeypatch.setattr(ActivationRun, "activations", spy)
    split = calibrate(vit, images, normalize, batch_size=5)
    assert max(size for _, size in sizes) <= limit and {count for count, _ in sizes} == {1, 2}
    for name, threshold in calibration.thresholds.items():
        np.testing.assert_allclose(split.thresholds[name], threshold, rtol=0.02)  # as above


@pytest.mark.parametrize("method", list(METHODS))
def test_every_image_is_computed_once(vit, images, monkeypatch, method):
    seen = []

    def counting(batch):
        seen.append(len(batch))
        return normalize(batch)

    calibrate(vit, images, counting, method=method, batch_size=5)
    # besides: one image for the sizes of the tensors that histograms are made of, and one for the key
    assert sum(seen) == len(images) + (1 if method == "minmax" else 2)


def test_the_number_of_threads_changes_nothing(vit, images, calibration, monkeypatch):
    for cores in (1, 5):
        monkeypatch.setattr(module, "num_cores", lambda cores=cores: cores)
        assert calibrate(vit, images, normalize, batch_size=5) == calibration


class OutOfMemory:
    """A session on a GPU that has no memory left: the CPU's, but for what it says of itself and what its run does."""

    def __init__(self, *arguments, providers, **options):
        self.given = providers
        self._session = SESSION(*arguments, providers=[providers[-1]], **options)

    def get_providers(self):
        return [name for name, _ in self.given]

    def get_inputs(self):
        return self._session.get_inputs()

    def run(self, names, feeds):
        if len(self.given) > 1:
            raise RuntimeError("CUDA failure 2: out of memory")
        return self._session.run(names, feeds)


SESSION = onnxruntime.InferenceSession


@pytest.fixture
def full_gpu(monkeypatch):
    monkeypatch.setattr(
        onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None)
    monkeypatch.setattr(onnxruntime, "InferenceSession", OutOfMemory)


def test_where_the_gpu_fails_the_cpu_goes_on_if_it_may(vit, images, calibration, full_gpu, capsys):
    found = calibrate(vit, images, normalize, batch_size=5, device="auto", progress=Progress())
    assert found == calibration and found.device == "cpu"
    said = "warning: calibration on cuda: onnxruntime: CUDA failure 2: out of memory; calibrating on the CPU instead"
    assert capsys.readouterr().err.count(said) == 1
    with pytest.raises(CalibrationError, match="out of memory") as caught:
        calibrate(vit, images, normalize, batch_size=5, device="cuda")
    assert "config.calibration.device=cpu" in caught.value.fix


def test_methods(vit, images, calibration):
    name = next(iter(calibration.thresholds))
    minmax = calibrate(vit, images, normalize, [name], method="minmax")
    percentile = calibrate(vit, images, normalize, [name], method="percentile")
    assert minmax.thresholds == minmax.amax
    for method in METHODS:  # entropy's alone are held against the products
        found = minmax if method == "minmax" else calibrate(vit, images, normalize, [name], method=method)
        assert bool(found.costs) == (method == "entropy")
    assert 0 < percentile.thresholds[name] < minmax.thresholds[name] * 1.001


def test_every_activation_can_be_scanned(vit, images):
    names = activations(ir.load(vit).graph)
    assert names[0] == "images" and names[-1] == "logits"
    found = calibrate(vit, images, normalize, names, method="minmax")
    assert found.amax["images"] == np.abs(normalize(images)).max()
    np.testing.assert_allclose(found.amax["logits"], np.abs(run(vit, normalize(images))[0]).max(), rtol=1e-5)


def test_weights_are_not_copied(vit, images):
    before = {p.name for p in vit.parent.iterdir()}
    calibrate(vit, images[:2], normalize)
    assert {p.name for p in vit.parent.iterdir()} == before


def test_weights_are_not_read_into_the_graph(vit, monkeypatch):
    """A model of gigabytes is held once, by onnxruntime."""
    seen = []
    monkeypatch.setattr(activation_run, "open_proto", lambda proto, folder, device: seen.append((proto, folder)))
    monkeypatch.setattr(activation_run, "device_of", lambda session: "cpu")
    for reduce in (False, True):
        ActivationRun(vit, None, normalize, 8, "cpu", None)._session(["images"], reduce=reduce)
    for proto, folder in seen:
        large = [tensor for tensor in proto.graph.initializer if np.prod(tensor.dims) >= 64 * 64]
        assert large and all(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in large)
        assert proto.ByteSize() < 100_000 and folder == vit.parent


def test_keys_follow_graph_data_and_preprocessing(vit, images, calibration, tmp_path):
    keys = calibration_keys(vit, images, normalize, "entropy")
    assert keys == calibration.keys
    assert calibration_keys(vit, images, lambda x: normalize(x) / 2, "entropy")["data"] != keys["data"]
    deeper = TinyViT()
    deeper.rng = np.random.default_rng(1)  # the same graph, other weights
    other = deeper.save(tmp_path / "model.onnx")
    assert calibration_keys(other, images, normalize, "entropy")["graph"] != keys["graph"]


def test_json_round_trip(calibration, tmp_path):
    path = tmp_path / "calibration.json"
    calibration.save(path)
    assert Calibration.load(path) == calibration
    path.write_text(json.dumps({"scales": {}}))
    with pytest.raises(CalibrationError, match="not a calibration"):
        Calibration.load(path)


def test_errors(vit, images):
    with pytest.raises(UsageError, match="'kl'"):
        calibrate(vit, images, normalize, method="kl")
    with pytest.raises(CalibrationError, match="no images"):
        calibrate(vit, images[:0], normalize)
    with pytest.raises(
        UsageError,
        match=r"no activation 'Transformer/encoderblock_0/LayerNorm_0/ou'\. Did you mean "
        r"Transformer/encoderblock_0/LayerNorm_0/out",
    ):
        calibrate(vit, images, normalize, ["Transformer/encoderblock_0/LayerNorm_0/ou"])
    with pytest.raises(CalibrationError, match=r"images are \(16, 32, 3\), the graph takes \(32, 32, 3\)"):
        calibrate(vit, images[:, :16], normalize)


def test_products_of_thresholds_that_were_found_otherwise(vit, images):
    """As the guard has it that saw all activations at once."""
    names = [name for name in place(ir.load(vit)).tensors() if "LayerNorm" in name][:2]
    sampled = sample_products(vit, names, images, normalize, batch_size=5)
    whole = Guard(ir.load(vit), names)
    for name, value in zip(names, run(with_outputs(vit, names), normalize(images))):
        whole.add(name, value, [zlib.crc32(image.tobytes()) for image in images])
    for name in names:
        for threshold in (0.5, 2.0):
            # the same kernels on batches of 5 and of 24, as above
            assert sampled.error(name, threshold) == pytest.approx(whole.error(name, threshold), rel=1e-3)
            assert sampled.error(name, threshold) > 0


def test_the_guards_thresholds_are_taken(vit, images, monkeypatch):
    """But for a tensor that is all zero, of which there is nothing to say."""
    name = place(ir.load(vit)).tensors()[0]
    monkeypatch.setattr(module.Guard, "cost", lambda self, name, low, high: Cost([low, 7.0 * high], [0.5, 0.25]))
    found = calibrate(vit, images[:2], normalize, [name])
    assert found.thresholds == {name: 7.0 * found.amax[name]} and list(found.costs) == [name]
    found = calibrate(vit, images[:2], lambda batch: 0 * normalize(batch), ["images"])
    assert (found.thresholds, found.amax, found.costs) == ({"images": 0.0}, {"images": 0.0}, {})


def test_a_later_image_that_is_not_finite_is_named_too(vit, images):
    """Sizes are read from the first image alone."""

    def spoil(batch):
        result = normalize(batch)
        result[(batch == images[-1]).all((1, 2, 3))] = np.inf
        return result

    for method in METHODS:
        with pytest.raises(CalibrationError, match="images: the activation is not finite"):
            calibrate(vit, images, spoil, ["images"], method=method)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_value_that_is_not_finite_is_an_error(vit, images, bad):
    def spoil(batch):
        result = normalize(batch)
        result[0, 3, 3, 0] = bad
        return result

    for method in METHODS:
        with pytest.raises(CalibrationError, match="not finite"):
            calibrate(vit, images, spoil, ["images"], method=method)
