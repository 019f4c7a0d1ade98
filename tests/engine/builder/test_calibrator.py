"""What TensorRT's calibrator is fed with, batch by batch, and what becomes of a failure in the middle; no GPU."""

import pathlib
import types

import numpy as np
import pytest

from vit_convert.core.calibration_cache import CacheKey, format_cache, load_cache, save_cache
from vit_convert.core.errors import CalibrationError
from vit_convert.core.progress import Progress
from vit_convert.engine.builder import calibrator as module
from vit_convert.engine.builder.calibrator import make_calibrator

IMAGES = np.arange(7 * 4, dtype=np.uint8).reshape(7, 2, 2, 1)


class Gpu:
    """Streams and buffers that note what is done with them, in order."""

    def __init__(self):
        self.done, self.held, self.batches, self.made = [], set(), [], []

    def stream(self):
        self.held.add("stream")
        self.made.append("stream")
        return types.SimpleNamespace(
            synchronize=lambda: self.done.append("wait"), close=lambda: self.held.remove("stream")
        )

    def buffer(self, nbytes):
        self.held.add("buffer")
        self.made.append("buffer")

        def upload(batch, stream):
            assert self.held == {"stream", "buffer"} and batch.nbytes <= nbytes and batch.flags.c_contiguous
            self.done.append("upload")
            self.batches.append(batch.copy())

        return types.SimpleNamespace(upload=upload, close=lambda: self.held.remove("buffer"), pointer=4096)


@pytest.fixture
def gpu(monkeypatch):
    found = Gpu()
    monkeypatch.setattr(module, "Stream", found.stream)
    monkeypatch.setattr(module, "DeviceBuffer", found.buffer)
    return found


BASES = {name: type(name, (), {}) for name in ("IInt8EntropyCalibrator2", "IInt8MinMaxCalibrator")}
BACKEND = types.SimpleNamespace(
    has_calibrator=True, version="8.6.1", find=BASES.get, module=types.SimpleNamespace(__name__="tensorrt")
)


@pytest.fixture
def make(tmp_path):
    def make(images=IMAGES, normalise=lambda batch: batch.astype(np.float32) / 2, *, algorithm="entropy", **options):
        asked = {"batch_size": 2, "cache_path": tmp_path / "c.cache", "source_hash": "abc", **options}
        return make_calibrator(BACKEND, algorithm, images, normalise, progress=Progress(quiet=True), **asked)

    return make


@pytest.mark.parametrize(
    ("algorithm", "base"), [("entropy", "IInt8EntropyCalibrator2"), ("minmax", "IInt8MinMaxCalibrator")]
)
def test_each_full_batch_once_and_waited_for(make, gpu, algorithm, base):
    found = make(algorithm=algorithm)
    assert isinstance(found, BASES[base]) and found.get_batch_size() == 2 and found.read_calibration_cache() is None
    assert found.key == CacheKey(algorithm, "8.6.1", "abc")
    given = [found.get_batch(["images"]) for _ in range(4)]
    assert given == [[4096], [4096], [4096], None]  # of seven images, the last one left out
    assert gpu.done == ["upload", "wait"] * 3  # what is behind the pointer has arrived
    assert gpu.made == ["stream", "buffer"]  # once for all batches
    np.testing.assert_array_equal(np.concatenate(gpu.batches), IMAGES[:6].astype(np.float32) / 2)
    assert gpu.batches[0].dtype == np.float32 and found.failure is None


def test_what_tensorrt_found_is_kept_and_the_gpus_memory_given_back(make, gpu, tmp_path):
    found = make()
    while found.get_batch(["images"]):
        pass
    assert gpu.held == {"stream", "buffer"}
    found.write_calibration_cache(memoryview(format_cache(found.key, {"images": 2.5})))
    assert not gpu.held and found.failure is None
    kept = load_cache(tmp_path / "c.cache", found.key)
    assert kept == format_cache(found.key, {"images": 2.5})
    again = make()  # from its cache, which it does not write anew
    assert again.read_calibration_cache() == kept
    again.write_calibration_cache(b"other")
    assert load_cache(tmp_path / "c.cache", found.key) == kept


@pytest.mark.parametrize("error", [ValueError("not an image"), KeyboardInterrupt()])
def test_a_failure_is_kept_for_after_the_build(make, gpu, tmp_path, error):
    """Nothing may unwind through TensorRT, which then goes on with the batches that it had."""
    calls = []

    def normalise(batch):
        calls.append(batch)
        if len(calls) == 2:
            raise error
        return batch.astype(np.float32)

    found = make(normalise=normalise)
    assert found.get_batch(["images"]) == [4096]
    assert found.get_batch(["images"]) is None and found.failure is error
    assert not gpu.held
    found.write_calibration_cache(format_cache(found.key, {"images": 1.0}))
    assert not (tmp_path / "c.cache").exists()  # of half the images


def test_a_cache_that_cannot_be_written_is_a_failure_too(make, monkeypatch):
    found, full = make(), OSError("full disk")

    def save(*arguments, **options):
        raise full

    monkeypatch.setattr(module, "save_cache", save)
    found.write_calibration_cache(b"ranges")
    assert found.failure is full


@pytest.mark.parametrize("names", [[], ["images", "mask"]])
def test_a_graph_of_several_inputs_is_refused(make, gpu, names):
    found = make()
    assert found.get_batch(names) is None and not gpu.done
    assert isinstance(found.failure, CalibrationError) and "calibration feeds one" in str(found.failure)


def test_fewer_images_than_a_batch(make, tmp_path):
    with pytest.raises(CalibrationError, match="7 images, one batch needs 8"):
        make(batch_size=8)
    assert make(batch_size=7).get_batch_size() == 7
    key = CacheKey("entropy", "8.6.1", "abc")  # none is needed where ranges are given, or kept
    assert make(batch_size=8, given=b"ranges").read_calibration_cache() == b"ranges"
    save_cache(pathlib.Path(tmp_path / "c.cache"), key, format_cache(key, {"x": 1.0}), num_images=8)
    assert make(batch_size=8).read_calibration_cache() == format_cache(key, {"x": 1.0})
