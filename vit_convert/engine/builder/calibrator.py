"""TensorRT's own INT8 calibrator (8.6 and 10): fed with batches on the GPU, or with our thresholds as its cache.

TensorRT's entropy calibration looks only at how often values occur, and so ruins a trained transformer, in which a few
huge activations carry much of the information. So calibration.method=entropy gives it the guarded thresholds that the
conversion found; entropy_plain and minmax ask for TensorRT's own. See `calibration_cache` for the files.
"""

import functools
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from vit_convert.core.bundle import Bundle, hash_value
from vit_convert.core.calibration_cache import (
    ALGORITHMS,
    CacheKey,
    format_cache,
    hash_source,
    load_cache,
    load_ranges,
    save_cache,
)
from vit_convert.core.errors import BuildError, CalibrationError
from vit_convert.core.progress import Progress
from vit_convert.engine.backend.cuda import DeviceBuffer, Stream
from vit_convert.engine.backend.trt import Backend
from vit_convert.engine.builder.request import BuildRequest
from vit_convert.engine.host import EngineHost
from vit_convert.images.preprocess import Preprocess

_REPORTS = 10  # progress lines per calibration
_GUARDED = "entropy"
# methods by which TensorRT calibrates, and our names for its algorithms
_OWN = {"entropy_plain": "entropy", "minmax": "minmax"}


def make_calibrator(
    backend: Backend,
    algorithm: str,
    images: np.ndarray,
    normalise: Callable[[np.ndarray], np.ndarray],
    *,
    batch_size: int,
    cache_path: str | os.PathLike[str],
    source_hash: str,
    progress: Progress,
    given: bytes | None = None,
) -> Any:
    """Makes a TensorRT calibrator for one build of a graph with one input.

    Args:
        backend: a TensorRT with calibrators (10 or earlier).
        algorithm: "entropy" or "minmax".
        images: [images, height, width, 3] uint8 or float32, also memory-mapped; read batch by batch.
        normalise: turns a batch of `images` into the graph's input.
        batch_size: images per batch; TensorRT takes only full batches, so a remainder is dropped.
        cache_path: where the cache is read from or written to.
        source_hash: of the graph, the images and everything else that ranges depend on, see `hash_source`.
        progress: shows how many images are done.
        given: a cache for TensorRT to use instead of `cache_path` and the images.

    Returns:
        The calibrator for `BuildRequest.calibrator`; its `key` is its cache's, its `failure` what went wrong inside
        TensorRT's callbacks.

    Raises:
        BuildError: this backend does not have this calibrator.
        CalibrationError: too few images, or a cache that is not for this build.
    """
    if algorithm not in ALGORITHMS:
        raise BuildError(f"calibrator {algorithm!r}: unknown", fix=f"Use {' or '.join(ALGORITHMS)}.")
    if not backend.has_calibrator:
        raise BuildError(
            f"calibrator: {backend.module.__name__} {backend.version} has none",
            fix="Give it the quantized (Q/DQ) graph instead.",
        )
    key = CacheKey(algorithm, backend.version, source_hash)
    cached = load_cache(cache_path, key) if given is None else given
    num_images = _in_full_batches(images, batch_size)
    if cached is None and num_images == 0:
        raise CalibrationError(
            f"calibration: {len(images)} images, one batch needs {batch_size}",
            fix="Give more images, or a smaller batch.",
        )
    bases = {"entropy": backend.find("IInt8EntropyCalibrator2"), "minmax": backend.find("IInt8MinMaxCalibrator")}
    base = bases[algorithm]

    class Calibrator(base):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            base.__init__(self)
            self.key = key
            self.failure: BaseException | None = None
            self._next = 0
            self._buffer: DeviceBuffer | None = None
            self._stream: Stream | None = None

        def get_batch_size(self) -> int:
            return batch_size

        def get_batch(self, names: list[str]) -> list[int] | None:
            # An exception must not unwind through TensorRT, and None means "no more images": it is kept, and raised
            # after the build.
            try:
                return self._upload(names)
            except BaseException as e:
                self.failure = e
                self._release()
                return None

        def read_calibration_cache(self) -> bytes | None:
            return cached

        def write_calibration_cache(self, cache: Any) -> None:
            try:
                self._release()
                if self.failure is None and cached is None:
                    save_cache(cache_path, key, bytes(cache), num_images=num_images)
            except BaseException as e:
                self.failure = e

        def _upload(self, names: list[str]) -> list[int] | None:
            if len(names) != 1:
                raise CalibrationError(
                    f"calibration: the graph has the inputs {names}, calibration feeds one",
                    fix="Export a graph that takes only images.",
                )
            if self._next >= num_images:
                return None
            batch = np.ascontiguousarray(normalise(np.asarray(images[self._next : self._next + batch_size])))
            if self._buffer is None or self._stream is None:
                self._stream, self._buffer = Stream(), DeviceBuffer(batch.nbytes)
            self._buffer.upload(batch, self._stream)
            self._stream.synchronize()
            before, self._next = self._next, self._next + batch_size
            if before * _REPORTS // num_images != self._next * _REPORTS // num_images:
                progress.say(f"calibration: {self._next} of {num_images} images")
            return [self._buffer.pointer]

        def _release(self) -> None:
            if self._buffer is not None and self._stream is not None:
                self._buffer.close()
                self._stream.close()
                self._buffer = self._stream = None

    return Calibrator()


def bundle_calibrator(host: EngineHost, request: BuildRequest) -> Any:
    """Makes the calibrator of a bundle's INT8 engine; its cache is in the bundle, named after its source.

    Args:
        host: whose TensorRT has calibrators, and whose bundle holds the calibration images.
        request: what to build, without its calibrator.

    Raises:
        BuildError: this backend has no calibrators.
        CalibrationError: there are no images or too few, or the cache there is not for this build.
    """
    bundle, config, version = host.bundle, host.config, host.backend.version
    path, method, batch_size = bundle.images("calibration"), config.calibration.method, config.calibration.batch_size
    if wrong := host.facts.files.wrong(path):
        raise CalibrationError(wrong, fix="Run the conversion's calibrate stage first.")
    images, given = np.load(path, mmap_mode="r"), None
    # TensorRT's own ranges depend on the batches, ours do not
    batched = {} if method == _GUARDED else {"batch_size": batch_size}
    used = _in_full_batches(images, batch_size) if batched else len(images)
    graph, preprocessing = request.asked.onnx.hashes, request.preprocessing
    source = hash_source(graph, path, num_images=used, preprocessing=preprocessing, **batched)
    if method == _GUARDED:
        given = _guarded_cache(bundle, CacheKey("entropy", version, source))
        source = hash_value([source, given.decode()])
    name = f"calibration.tensorrt-{version}-{_OWN.get(method, method)}-{source[:12]}.cache"
    dtype, channels_first = np.dtype(config.input), config.layout == "NCHW"
    return make_calibrator(
        host.backend,
        _OWN.get(method, "entropy"),
        images,
        functools.partial(Preprocess.from_dict(preprocessing).graph_input, dtype=dtype, channels_first=channels_first),
        batch_size=batch_size,
        cache_path=bundle.root / name,
        source_hash=source,
        progress=host.progress,
        given=given,
    )


def _guarded_cache(bundle: Bundle, key: CacheKey) -> bytes:
    """The conversion's thresholds as a cache of this TensorRT, whichever version the conversion wrote them for."""
    ranges = load_ranges(bundle.calibration_cache, key)
    if ranges is None:
        raise CalibrationError(
            f"{bundle.calibration_cache}: missing, so TensorRT's calibrator has no guarded thresholds",
            fix="Convert again with this target, or give calibration.method=minmax or entropy_plain for TensorRT's "
            "own calibration.",
        )
    return format_cache(key, ranges)


def _in_full_batches(images: np.ndarray, batch_size: int) -> int:
    return len(images) // batch_size * batch_size
