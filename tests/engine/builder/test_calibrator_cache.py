"""TensorRT's calibration cache: its format, and what is refused; TensorRT's own calibration needs a GPU."""

import dataclasses
import re

import numpy as np
import pytest
import simulated_gpu
from engine_graphs import IMAGE
from reconverted import as_left

from vit_convert.core.bundle import Bundle
from vit_convert.core.calibration_cache import CacheKey, format_cache, hash_source, parse_cache, save_cache
from vit_convert.core.engine_results import EngineSummary
from vit_convert.core.errors import BuildError, CalibrationError, ConvertError
from vit_convert.core.progress import Progress
from vit_convert.engine import build_bundle
from vit_convert.engine.backend import cuda, trt
from vit_convert.engine.backend.graph_file import hash_graph
from vit_convert.engine.backend.trt import load_backend
from vit_convert.engine.builder.calibrator import make_calibrator
from vit_convert.engine.handoff import read_config, read_facts
from vit_convert.engine.host import EngineHost


def test_backend_without_calibrators(tmp_path):
    pytest.importorskip("tensorrt_rtx")
    images, options = np.zeros((4, 2, 2, 3)), {"batch_size": 2, "cache_path": tmp_path / "c", "source_hash": "a"}
    for algorithm, message in (("entropy", r"tensorrt_rtx .* has none"), ("percentile", "'percentile'")):
        with pytest.raises(BuildError, match=message):
            make_calibrator(
                load_backend("rtx"), algorithm, images, np.asarray, **options, progress=Progress(quiet=True)
            )


@pytest.fixture
def calibrate(gpu, bundle_path, monkeypatch):
    """Builds INT8 with TensorRT's calibrator, as far as this host can; returns whether it built and how many batches it
    took."""
    backend, bundle = gpu[0], Bundle(bundle_path)
    for name in ("IInt8EntropyCalibrator2", "IInt8MinMaxCalibrator"):
        monkeypatch.setattr(backend.module, name, type(name, (), {}), raising=False)
    np.save(bundle.images("calibration"), np.random.default_rng(0).integers(0, 256, (9, *IMAGE), np.uint8))
    as_left(bundle_path, "calibration_images.npy")
    config, taken = read_config(bundle), []
    config.engine.calibrator = True

    def build_engine(backend, request, plan, *, progress):
        calibrator, batches = request.calibrator, 0
        if (cache := calibrator.read_calibration_cache()) is None:
            while calibrator.get_batch(["images"]):
                batches += 1
            calibrator.write_calibration_cache(f"{calibrator.key.header}\nimages: 3caa54fc\n".encode())
        else:
            assert cache.startswith(calibrator.key.header.encode())
        assert calibrator.failure is None
        taken.append(batches)
        simulated_gpu.write_plan(
            plan, request.onnx_path, [tuple(p["images"]) for p in request.profiles], precision=request.precision
        )
        simulated_gpu.change_sidecar(plan, **request.asked.to_dict(), summary={})
        return EngineSummary.from_dict({})

    monkeypatch.setattr(build_bundle, "build_engine", build_engine)

    def start(*, method="entropy_plain", batch_size=2, force=False, preprocess=None):
        taken.clear()
        config.calibration.method, config.calibration.batch_size = method, batch_size
        facts = read_facts(bundle)
        known = dataclasses.replace(facts, preprocess=preprocess or facts.preprocess)
        progress = Progress(bundle.events, quiet=True)
        host = EngineHost(backend, bundle, config, known, progress)
        build_bundle.build_bundle(host, precisions=["int8"], force=force)
        return list(taken)

    return start


def test_calibration_is_kept_and_says_how_far_it_is(calibrate, bundle_path):
    assert calibrate() == [4]  # of nine images, two at a time
    lines = [f"calibration: {done} of 8 images" for done in (2, 4, 6, 8)]
    assert [line for line in lines if line in (bundle_path / "events.jsonl").read_text()] == lines
    assert calibrate() == []
    assert calibrate(force=True) == [0]  # from its cache


def test_a_long_calibration_says_ten_times_how_far_it_is(calibrate, bundle_path):
    """Of 41 images, two at a time: at each tenth of the 40 that fill batches."""
    path = bundle_path / "calibration_images.npy"
    np.save(path, np.random.default_rng(0).integers(0, 256, (41, *IMAGE), np.uint8))
    as_left(bundle_path, path.name)
    assert calibrate() == [20]
    said = re.findall(r"calibration: (\d+) of 40 images", (bundle_path / "events.jsonl").read_text())
    assert said == [str(done) for done in range(4, 41, 4)]


def weights(bundle_path):
    _replace(bundle_path / "model.onnx.data", lambda data: data[:-4] + b"\x01\x02\x03\x04")


def images(bundle_path):
    path = bundle_path / "calibration_images.npy"
    np.save(path, np.load(path)[::-1].copy())


def number(bundle_path):
    path = bundle_path / "calibration_images.npy"
    np.save(path, np.load(path)[:8])


def _replace(path, change):
    other = path.with_name("other")
    other.write_bytes(change(path.read_bytes()))
    other.replace(path)


@pytest.mark.parametrize("change", [weights, images, number])
def test_other_sources_are_calibrated_and_built_again(calibrate, bundle_path, change):
    assert calibrate() == [4] and calibrate() == []
    change(bundle_path)
    with pytest.raises(ConvertError, match="is not the file that stage export left"):
        calibrate()
    as_left(bundle_path, "model.onnx.data", "calibration_images.npy")
    assert calibrate() == [4] and calibrate() == []


def test_other_preprocessing_is_calibrated_and_built_again(calibrate, bundle_path):
    record = read_facts(Bundle(bundle_path)).preprocess
    assert calibrate() == [4]
    assert calibrate(preprocess={**record, "mean": [0.0, 0.0, 0.0]}) == [4]


def test_calibrator_needs_no_typed_graph(calibrate, gpu, monkeypatch):
    """TensorRT 10 still has it, and builds such a network by flags."""
    monkeypatch.setattr(type(gpu[0]), "strongly_typed", True)
    assert calibrate() == [4]


def test_other_batches_are_calibrated_and_built_again(calibrate):
    assert calibrate() == [4]
    assert calibrate(batch_size=4) == [2]  # TensorRT's histograms are of batches
    assert calibrate(batch_size=4) == []


def test_each_algorithm_has_its_cache(calibrate, bundle_path):
    assert calibrate() == [4] and calibrate(method="minmax") == [4]
    assert calibrate() == [0]  # the engine was the other's, the cache is there
    assert len(list(bundle_path.glob("calibration.tensorrt-8.6.0-entropy-*.cache"))) == 1
    assert len(list(bundle_path.glob("calibration.tensorrt-8.6.0-minmax-*.cache"))) == 1


def guarded(bundle_path, ranges, *, graph="model.onnx", algorithm="entropy", version="8.6.1"):
    """Leaves the cache that the conversion writes."""
    bundle = Bundle(bundle_path)
    about = {"num_images": 9, "preprocessing": read_facts(bundle).preprocess}
    key = CacheKey(
        algorithm, version, hash_source(hash_graph(bundle_path / graph), bundle.images("calibration"), **about)
    )
    save_cache(bundle.calibration_cache, key, format_cache(key, ranges), num_images=9)


def test_by_default_tensorrt_is_given_our_thresholds(calibrate, gpu, bundle_path, monkeypatch):
    """Its own entropy calibration clips what carries the image; nothing of it runs."""
    given = []

    class Calibrator:
        def __init__(self):
            given.append(self)

    monkeypatch.setattr(gpu[0].module, "IInt8EntropyCalibrator2", Calibrator, raising=False)
    guarded(bundle_path, {"images": 2.5, "block: 0/x": 139.5})
    assert calibrate(method="entropy") == [0]  # no batch
    header, scales = parse_cache(given[-1].read_calibration_cache())
    # of the TensorRT that builds, not of the conversion
    assert gpu[0].version == "8.6.0" and header == "TRT-8600-EntropyCalibration2"
    assert scales["images"] * 127 == pytest.approx(2.5, rel=1e-6) and scales["block: 0/x"] * 127 == pytest.approx(
        139.5, rel=1e-6
    )
    assert calibrate(method="entropy") == []
    guarded(bundle_path, {"images": 2.5, "block: 0/x": 140.0})
    assert calibrate(method="entropy") == [0]  # other thresholds, another engine
    # what TensorRT did not measure is not kept as if it had
    assert not list(bundle_path.glob("calibration.tensorrt-*.cache"))


def test_thresholds_of_another_graph_or_none_are_refused(calibrate, bundle_path):
    with pytest.raises(
        CalibrationError, match=r"calibration\.cache: missing, so TensorRT's calibrator has no guarded thresholds"
    ) as caught:
        calibrate(method="entropy")
    assert "entropy_plain" in caught.value.fix
    guarded(bundle_path, {"images": 2.5})
    weights(bundle_path)
    as_left(bundle_path, "model.onnx.data")
    with pytest.raises(CalibrationError, match=r"calibration\.cache: made from graph, weights and images"):
        calibrate(method="entropy")
    guarded(bundle_path, {"images": 2.5}, algorithm="minmax")
    with pytest.raises(
        CalibrationError, match="made as TRT-8601-MinMaxCalibration, needed TRT-8601-EntropyCalibration2"
    ):
        calibrate(method="entropy")


def test_without_a_driver_the_cuda_layer_says_so():
    if cuda.gpu() is not None:
        pytest.skip("this machine has a GPU")
    with pytest.raises(BuildError, match="no CUDA driver") as caught:
        cuda.Stream()
    assert "GPU" in caught.value.fix
    with pytest.raises(BuildError, match="this host has no GPU"):
        load_backend("tensorrt")


def test_backend_names():
    pytest.importorskip("tensorrt_rtx")
    with pytest.raises(BuildError, match="'onnx'"):
        load_backend("onnx")
    if cuda.gpu() is None:
        assert load_backend("auto") is load_backend("rtx")


def test_auto_takes_no_backend_that_cannot_build_for_this_gpu(monkeypatch):
    pytest.importorskip("tensorrt_rtx")
    rtx = load_backend("rtx")
    missing = BuildError("tensorrt: cannot be imported (libnvinfer.so.8: no such file)")

    def load(name):
        if name == "tensorrt":
            raise missing
        return dataclasses.replace(rtx, gpu=cuda.Gpu("NVIDIA H200", "sm90", 1, "580.1", "13.0"))

    monkeypatch.setattr(trt, "_load", load)
    with pytest.raises(BuildError, match=r"libnvinfer\.so\.8: no such file.*rtx [\d.]+: builds for .*, here is sm90"):
        load_backend("auto", for_this_gpu=True)
    assert load_backend("auto").name == "rtx"  # a conversion builds for the GPUs that it knows


@pytest.mark.gpu
def test_device_memory_gives_back_what_it_was_given():
    if cuda.gpu() is None:
        pytest.skip("needs a GPU")
    stream, buffer = cuda.Stream(), cuda.DeviceBuffer(4 * 1000)
    given, got = np.arange(1000, dtype=np.float32), np.empty(1000, np.float32)
    buffer.upload(given, stream)
    buffer.download(got, stream)
    stream.synchronize()
    assert np.array_equal(given, got)
    with pytest.raises(ValueError, match="4004 bytes"):
        buffer.upload(np.zeros(1001, np.float32), stream)
    buffer.close()
    stream.close()
