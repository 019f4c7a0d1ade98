"""TensorRT's own INT8 calibration (8.6 and 10): batches streamed to the GPU, and a cache that is refused where it does not belong."""

import dataclasses
import os
import pathlib
import struct
from collections.abc import Callable
from typing import Any

import numpy as np

from vit_convert.bundle import atomic, read_json, write_json
from vit_convert.engine.cuda import DeviceBuffer, Stream
from vit_convert.engine.trt import Backend
from vit_convert.errors import BuildError, CalibrationError

# Our name: TensorRT's class, and its word in the first line of a cache.
_ALGORITHMS = {
    "entropy": ("IInt8EntropyCalibrator2", "EntropyCalibration2"),
    "minmax": ("IInt8MinMaxCalibrator", "MinMaxCalibration"),
}


@dataclasses.dataclass(frozen=True)
class CacheKey:
    """What a calibration cache is valid for.

    Attributes:
        algorithm: "entropy" or "minmax".
        version: TensorRT's version string.
        graph_hash: sha256 of the fp32 graph that was calibrated.
    """

    algorithm: str
    version: str
    graph_hash: str

    @property
    def header(self) -> str:
        """The first line that TensorRT gives such a cache: "TRT-8600-EntropyCalibration2" for 8.6.0."""
        major, minor, patch = (int(part) for part in self.version.split(".")[:3])
        number = major * (1000 if major < 10 else 10000) + minor * 100 + patch  # NvInferVersion.h; 10 moved the major up a digit
        return f"TRT-{number}-{_ALGORITHMS[self.algorithm][1]}"


def parse_cache(data: bytes) -> tuple[str, dict[str, float]]:
    """Reads TensorRT's calibration cache.

    Args:
        data: the file: a header line, then "<tensor>: <big-endian float32 in hex>" lines.

    Returns:
        The header and the scale (largest magnitude / 127) of each tensor.

    Raises:
        CalibrationError: it is no such file.
    """
    try:
        header, *lines = data.decode().splitlines()
        scales = {}
        for line in filter(None, lines):
            tensor, bits = line.rsplit(": ", 1)  # tensor names hold colons and blanks
            scales[tensor] = struct.unpack("!f", bytes.fromhex(bits.zfill(8)))[0]
    except (ValueError, struct.error) as e:
        raise CalibrationError(f"calibration cache: no TensorRT calibration cache ({e})", fix="Delete it and calibrate again.") from e
    return header, scales


def load_cache(path: str | os.PathLike[str], key: CacheKey) -> bytes | None:
    """Reads a calibration cache if there is one, and refuses one that is not for this build.

    Args:
        path: the cache; `<path>.json` beside it names the graph.
        key: what it has to be for.

    Returns:
        The cache, or None where there is none yet.

    Raises:
        CalibrationError: it is for another algorithm, version or graph.
    """
    path = pathlib.Path(path)
    if not path.exists():
        return None
    data = path.read_bytes()
    fix = f"Delete {path} to calibrate again."
    header, scales = parse_cache(data)
    if header != key.header:
        raise CalibrationError(f"{path}: made as {header}, needed {key.header}", fix=fix)
    graph = (read_json(_key_path(path)) or {}).get("graph_hash")
    if graph != key.graph_hash:
        was = f"graph {graph[:12]}…" if graph else f"a graph that no {_key_path(path).name} names"
        raise CalibrationError(f"{path}: made for {was}, needed {key.graph_hash[:12]}…", fix=fix)
    if not scales:
        raise CalibrationError(f"{path}: holds no scale", fix=fix)
    return data


def save_cache(path: str | os.PathLike[str], key: CacheKey, data: bytes, *, num_images: int) -> None:
    """Writes a calibration cache and the key beside it.

    Args:
        path: the cache.
        key: what it is valid for.
        data: TensorRT's cache, byte for byte.
        num_images: how many images it was made from.
    """
    path = pathlib.Path(path)
    # The key first goes: a cache without a key is refused, a new cache with an old key would be believed.
    _key_path(path).unlink(missing_ok=True)
    with atomic(path) as temporary:
        temporary.write_bytes(data)
    write_json(_key_path(path), {**dataclasses.asdict(key), "num_images": num_images})


def make_calibrator(
    backend: Backend,
    algorithm: str,
    images: np.ndarray,
    normalise: Callable[[np.ndarray], np.ndarray],
    *,
    batch_size: int,
    cache_path: str | os.PathLike[str],
    graph_hash: str,
) -> Any:
    """Makes a TensorRT calibrator for one build of a graph with one input.

    Args:
        backend: a TensorRT with calibrators (10 or earlier).
        algorithm: "entropy" or "minmax".
        images: [images, height, width, 3] uint8 or float32, also memory-mapped; read batch by batch.
        normalise: turns a batch of `images` into the graph's float32 input.
        batch_size: images per batch; TensorRT takes full batches alone, so a remainder is left out.
        cache_path: where the cache is read from or written to.
        graph_hash: sha256 of the graph to be calibrated.

    Returns:
        The calibrator for `BuildRequest.calibrator`; its `failure` holds what went wrong inside TensorRT's callbacks.

    Raises:
        BuildError: this backend has no such calibrator.
        CalibrationError: too few images, or a cache that is not for this build.
    """
    if algorithm not in _ALGORITHMS:
        raise BuildError(f"calibrator {algorithm!r}: there is none of this name", fix=f"Use {' or '.join(_ALGORITHMS)}.")
    if not backend.has_calibrator:
        raise BuildError(
            f"calibrator: {backend.module.__name__} {backend.version} has none", fix="Give it the quantized (Q/DQ) graph instead."
        )
    key = CacheKey(algorithm, backend.version, graph_hash)
    cached = load_cache(cache_path, key)
    num_images = len(images) // batch_size * batch_size
    if cached is None and num_images == 0:
        raise CalibrationError(
            f"calibration: {len(images)} images, one batch needs {batch_size}", fix="Give more images, or a smaller batch."
        )
    bases = {"entropy": backend.find("IInt8EntropyCalibrator2"), "minmax": backend.find("IInt8MinMaxCalibrator")}
    base = bases[algorithm]

    class Calibrator(base):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            base.__init__(self)
            self.algorithm = algorithm
            self.failure: BaseException | None = None
            self._next = 0
            self._buffer: DeviceBuffer | None = None
            self._stream: Stream | None = None

        def get_batch_size(self) -> int:
            return batch_size

        def get_batch(self, names: list[str]) -> list[int] | None:
            # An exception would unwind through TensorRT, and None alone means "no more images": kept, and raised after the build.
            try:
                return self._upload(names)
            except BaseException as e:
                self.failure = e
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
                    f"calibration: the graph has the inputs {names}, calibration feeds one", fix="Export a graph with images alone."
                )
            if self._next >= num_images:
                return None
            batch = np.ascontiguousarray(normalise(np.asarray(images[self._next : self._next + batch_size])), dtype=np.float32)
            if self._buffer is None or self._stream is None:
                self._stream, self._buffer = Stream(), DeviceBuffer(batch.nbytes)
            self._buffer.upload(batch, self._stream)
            self._stream.synchronize()
            self._next += batch_size
            return [self._buffer.pointer]

        def _release(self) -> None:
            if self._buffer is not None and self._stream is not None:
                self._buffer.close()
                self._stream.close()
                self._buffer = self._stream = None

    return Calibrator()


def _key_path(path: pathlib.Path) -> pathlib.Path:
    return path.with_name(f"{path.name}.json")
