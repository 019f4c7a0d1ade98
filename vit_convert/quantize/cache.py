"""TensorRT's own INT8 calibration cache, byte for byte."""

import dataclasses
import os
import pathlib
import re
import struct
from collections.abc import Mapping

import numpy as np

from vit_convert.bundle import atomic
from vit_convert.errors import CalibrationError

ALGORITHMS = ("EntropyCalibration2", "EntropyCalibration", "MinMaxCalibration", "LegacyCalibration")
_HEADER = re.compile(r"TRT-(\d+)-(\w+)")


@dataclasses.dataclass(frozen=True)
class TrtCache:
    """A TensorRT calibration cache.

    Attributes:
        version: TensorRT's version as the header spells it, 8601 for 8.6.1.
        algorithm: one of ALGORITHMS.
        amax: largest |x| that int8 represents, for each tensor: 127 times the scale in the file.
    """

    version: int
    algorithm: str
    amax: dict[str, float]


def version_number(version: str) -> int:
    """Spells a version as the cache's header does: 8.6.1 is 8601, 10.14.1 is 101401 (two digits for the minor version from 10 on)."""
    major, minor, patch = (int(part) for part in [*version.split("."), "0", "0"][:3])
    return major * (10000 if major >= 10 else 1000) + minor * 100 + patch


def write_trt_cache(path: str | os.PathLike[str], amax: Mapping[str, float], version: str, algorithm: str = "EntropyCalibration2") -> None:
    """Writes ranges as a TensorRT calibration cache.

    Args:
        path: the file.
        amax: largest |x| that int8 represents, for each tensor.
        version: of the TensorRT that will read it, "8.6.1".
        algorithm: one of ALGORITHMS; TensorRT refuses a cache of another algorithm than its calibrator's.

    Raises:
        CalibrationError: the algorithm is not one of TensorRT's.
    """
    if algorithm not in ALGORITHMS:
        raise CalibrationError(f"calibration algorithm {algorithm!r} is not TensorRT's", fix=f"Use one of {', '.join(ALGORITHMS)}.")
    lines = [f"TRT-{version_number(version)}-{algorithm}"]
    # The scale's big-endian IEEE-754 bits, lower-case hex without padding.
    lines += [f"{name}: {struct.unpack('!I', struct.pack('!f', np.float32(a) / np.float32(127)))[0]:x}" for name, a in amax.items()]
    with atomic(path) as temporary:
        temporary.write_bytes(("\n".join(lines) + "\n").encode())


def read_trt_cache(path: str | os.PathLike[str]) -> TrtCache:
    """Reads a TensorRT calibration cache.

    Args:
        path: the file.

    Returns:
        The TrtCache.

    Raises:
        CalibrationError: the file is missing or not a calibration cache.
    """
    path = pathlib.Path(path)
    fix = "Remove it; calibration writes a new one."
    try:
        lines = path.read_bytes().decode().splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise CalibrationError(f"{path}: not a readable calibration cache ({e})", fix=fix) from e
    header = _HEADER.fullmatch(lines[0]) if lines else None
    if header is None:
        raise CalibrationError(f"{path}: the first line is {lines[0] if lines else ''!r}, not TRT-<version>-<algorithm>", fix=fix)
    amax = {}
    for number, line in enumerate(lines[1:], start=2):
        name, separator, bits = line.rpartition(": ")  # names hold colons and spaces themselves
        try:
            if not separator:
                raise ValueError("no separator")
            (scale,) = struct.unpack("!f", bytes.fromhex(bits.zfill(8)))
        except (ValueError, struct.error) as e:
            raise CalibrationError(f"{path}, line {number}: {line!r} is not '<tensor>: <hex>'", fix=fix) from e
        amax[name] = scale * 127
    return TrtCache(int(header[1]), header[2], amax)
