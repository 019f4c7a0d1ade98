"""TensorRT's own INT8 calibration cache, byte for byte, with a key beside it by which a cache of another build is
refused."""

import dataclasses
import math
import os
import pathlib
import re
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np

from vit_convert.core.bundle import atomic, hash_file, hash_value, read_json, write_json
from vit_convert.core.errors import CalibrationError, nearest

# Our name, and TensorRT's name in the first line of a cache.
ALGORITHMS = {"entropy": "EntropyCalibration2", "minmax": "MinMaxCalibration"}


@dataclasses.dataclass(frozen=True)
class CacheKey:
    """What a calibration cache is valid for.

    Attributes:
        algorithm: "entropy" or "minmax".
        version: TensorRT's version string.
        source_hash: of what was calibrated with what, as `hash_source` gives it.
    """

    algorithm: str
    version: str
    source_hash: str

    @property
    def header(self) -> str:
        """The first line of TensorRT's cache: "TRT-8600-EntropyCalibration2" for 8.6.0.

        Raises:
            CalibrationError: TensorRT does not have this algorithm, or its version is not three numbers.
        """
        if self.algorithm not in ALGORITHMS:
            raise CalibrationError(
                f"calibration algorithm {self.algorithm!r} is not TensorRT's.{nearest(self.algorithm, ALGORITHMS)}",
                fix=f"Use {' or '.join(ALGORITHMS)}.",
            )
        numbers = re.match(r"(\d+)\.(\d+)\.(\d+)", self.version)  # of "10.0.0b6" too
        if numbers is None:
            raise CalibrationError(f"TensorRT {self.version}: the calibration cache of such a version is unknown")
        major, minor, patch = map(int, numbers.groups())
        # NvInferVersion.h; 10 moved the major up a digit
        number = major * (1000 if major < 10 else 10000) + minor * 100 + patch
        return f"TRT-{number}-{ALGORITHMS[self.algorithm]}"


def hash_source(
    graph: Mapping[str, str],
    images_path: str | os.PathLike[str],
    *,
    num_images: int,
    preprocessing: Mapping[str, Any],
    batch_size: int | None = None,
) -> str:
    """The hash of everything that a graph's ranges depend on.

    Args:
        graph: hashes of the fp32 graph that is calibrated and of its weights.
        images_path: the calibration images.
        num_images: how many of them are used.
        preprocessing: the record of how they become inputs.
        batch_size: of the batches, if the ranges depend on it: TensorRT's do, ours do not.

    Returns:
        A sha256 in hex.
    """
    batched = [] if batch_size is None else [batch_size]
    return hash_value([dict(graph), hash_file(images_path), num_images, dict(preprocessing), *batched])


def format_cache(key: CacheKey, amax: Mapping[str, float]) -> bytes:
    """Writes ranges in the format of TensorRT's cache.

    Args:
        key: what they are valid for.
        amax: largest |x| that int8 represents, for each tensor.

    Returns:
        The file's bytes: the header, then "<tensor>: <the scale's big-endian float32 bits in hex, without padding>"
        lines.
    """
    bits = {
        name: struct.unpack("!I", struct.pack("!f", np.float32(a) / np.float32(127)))[0] for name, a in amax.items()
    }
    return "\n".join([key.header, *(f"{name}: {b:x}" for name, b in bits.items()), ""]).encode()


def parse_cache(data: bytes) -> tuple[str, dict[str, float]]:
    """Reads TensorRT's calibration cache.

    Args:
        data: the file, as `format_cache` writes it.

    Returns:
        The header and the scale (largest magnitude / 127) of each tensor.

    Raises:
        CalibrationError: it is not a calibration cache.
    """
    try:
        header, *lines = data.decode().splitlines()
        scales = {}
        for line in filter(None, lines):
            tensor, bits = line.rsplit(": ", 1)  # tensor names hold colons and blanks
            scales[tensor] = struct.unpack("!f", bytes.fromhex(bits.zfill(8)))[0]
            if not 0 <= scales[tensor] < math.inf:
                raise ValueError(f"{tensor} has scale {scales[tensor]}")
    except (ValueError, struct.error) as e:
        raise CalibrationError(
            f"calibration cache: not one of TensorRT's ({e})", fix="Delete it and calibrate again."
        ) from e
    return header, scales


def load_cache(path: str | os.PathLike[str], key: CacheKey) -> bytes | None:
    """Reads a calibration cache if it exists, and refuses one that is not for this build.

    Args:
        path: the cache; `<path>.json` beside it holds its key.
        key: what it must be valid for.

    Returns:
        The cache, or None if it does not exist yet.

    Raises:
        CalibrationError: it is for another algorithm or version, or made from another graph, other weights or other
            images.
    """
    found = _load(pathlib.Path(path), key)
    return None if found is None else found[0]


def load_ranges(path: str | os.PathLike[str], key: CacheKey) -> dict[str, float] | None:
    """Reads the ranges of a calibration cache that may be of another version of TensorRT.

    Args:
        path: the cache; `<path>.json` beside it holds its key.
        key: what it must be valid for, apart from the version.

    Returns:
        The largest |x| that int8 represents, for each tensor; None if there is no cache.

    Raises:
        CalibrationError: as `load_cache`.
    """
    found = _load(pathlib.Path(path), key, any_version=True)
    return None if found is None else {name: scale * 127 for name, scale in found[1].items()}


def _load(path: pathlib.Path, key: CacheKey, *, any_version: bool = False) -> tuple[bytes, dict[str, float]] | None:
    """A cache and its scales, after comparison with the key."""
    if not path.exists():
        return None
    data, stored = path.read_bytes(), read_json(key_path(path)) or {}
    if any_version and (version := stored.get("version")):
        key = dataclasses.replace(key, version=str(version))
    fix = f"Delete {path} to calibrate again."
    header, scales = parse_cache(data)
    if header != key.header:
        raise CalibrationError(f"{path}: made as {header}, needed {key.header}", fix=fix)
    source = stored.get("source_hash")
    if source != key.source_hash:
        nameless = f"a graph and images that no {key_path(path).name} names"
        was = f"graph, weights and images {source[:12]}…" if source and isinstance(source, str) else nameless
        raise CalibrationError(f"{path}: made from {was}, needed {key.source_hash[:12]}…", fix=fix)
    if not scales:
        raise CalibrationError(f"{path}: holds no scale", fix=fix)
    return data, scales


def save_cache(path: str | os.PathLike[str], key: CacheKey, data: bytes, *, num_images: int) -> None:
    """Writes a calibration cache and the key beside it.

    Args:
        path: the cache.
        key: what it is valid for.
        data: the cache, byte for byte.
        num_images: how many images it was made from.
    """
    path = pathlib.Path(path)
    # Remove the old key first: a cache without a key is refused, but a new cache with an old key would be accepted.
    key_path(path).unlink(missing_ok=True)
    with atomic(path) as temporary:
        temporary.write_bytes(data)
    write_json(key_path(path), {**dataclasses.asdict(key), "num_images": num_images})


def key_path(path: pathlib.Path) -> pathlib.Path:
    """Where the key of a cache is kept."""
    return path.with_name(f"{path.name}.json")
