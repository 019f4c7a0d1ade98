"""Random checkpoints of any family: values seeded by a leaf's name, and files written leaf by leaf."""

import json
import math
import os
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import IO, Any

import ml_dtypes
import numpy as np

from vit_convert.checkpoint.flax_msgpack import packed_array, packed_map, packed_text
from vit_convert.core.bundle import atomic

DTYPES = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
_SAFETENSORS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
Shape = tuple[int, ...]
Member = tuple[str, Shape, Iterable[np.ndarray]]
"""Name, shape and consecutive pieces of one array."""


def normal(seed: int, name: str, shape: Shape) -> np.ndarray:
    """Standard normal float32 values that depend only on the seed and the name."""
    return np.random.default_rng([seed, zlib.crc32(name.encode())]).standard_normal(shape, np.float32)


def draw(seed: int, name: str, shape: Shape) -> np.ndarray:
    """One canonical parameter: kernels of variance 1/inputs, norm scales near 1, biases small, so that every part
    affects the logits.

    Args:
        seed: of the checkpoint.
        name: ends in "scale", "bias" or, with outputs along the last axis, "kernel".
        shape: of the result.

    Returns:
        float32 array.
    """
    values = normal(seed, name, shape)
    kind = name.rpartition("/")[2]
    if kind == "scale":
        return 1 + np.float32(0.1) * values
    if kind == "bias":
        return np.float32(0.02) * values
    return values / np.float32(math.sqrt(math.prod(shape[:-1])))


def write_npz(path: str | os.PathLike[str], members: Iterable[Member], dtype: str = "float32") -> None:
    """Writes an uncompressed `.npz`, one piece at a time; it appears whole or not at all.

    Args:
        path: the file.
        members: its arrays.
        dtype: one of DTYPES.
    """
    with atomic(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        for name, shape, arrays in members:
            _write_member(archive, name, shape, DTYPES[dtype], arrays)


def _write_member(
    archive: zipfile.ZipFile, name: str, shape: Shape, dtype: np.dtype, arrays: Iterable[np.ndarray]
) -> None:
    # numpy writes bfloat16 as two raw bytes, which is what the published bfloat16 files hold.
    descr = "|V2" if dtype == DTYPES["bfloat16"] else np.lib.format.dtype_to_descr(dtype)
    large = math.prod(shape) * dtype.itemsize >= zipfile.ZIP64_LIMIT // 2
    with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=large) as stream:
        np.lib.format.write_array_header_1_0(stream, {"descr": descr, "fortran_order": False, "shape": shape})
        for array in arrays:
            stream.write(array.astype(dtype, copy=False).tobytes())


def write_safetensors(
    path: str | os.PathLike[str], members: Sequence[tuple[str, Shape, Callable[[], np.ndarray]]], dtype: str = "float32"
) -> None:
    """Writes a `.safetensors` file, one array at a time; it appears whole or not at all.

    Args:
        path: the file.
        members: name, shape and what computes each array.
        dtype: one of DTYPES.
    """
    header, offset, size = {}, 0, DTYPES[dtype].itemsize
    for name, shape, _ in members:
        end = offset + math.prod(shape) * size
        header[name] = {"dtype": _SAFETENSORS[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with atomic(path) as temporary, open(temporary, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, _, compute in members:
            file.write(compute().astype(DTYPES[dtype], copy=False).tobytes())


def write_msgpack(
    path: str | os.PathLike[str], members: Sequence[tuple[str, Shape, Callable[[], np.ndarray]]], dtype: str = "float32"
) -> None:
    """Writes a `.msgpack` file as Flax does, one array at a time; it appears whole or not at all.

    Args:
        path: the file.
        members: name, shape and what computes each array; "/" in a name makes maps within maps.
        dtype: one of DTYPES.
    """
    tree: dict[str, Any] = {}
    for name, shape, compute in members:
        *outer, last = name.split("/")
        inner = tree
        for part in outer:
            inner = inner.setdefault(part, {})
        inner[last] = shape, compute
    with atomic(path) as temporary, open(temporary, "wb") as file:
        _write_map(file, tree, DTYPES[dtype])


def _write_map(file: IO[bytes], tree: Mapping[str, Any], dtype: np.dtype) -> None:
    file.write(packed_map(len(tree)))
    for name, value in tree.items():
        file.write(packed_text(name))
        if isinstance(value, dict):
            _write_map(file, value, dtype)
        else:
            shape, compute = value
            file.write(packed_array(shape, dtype))
            file.write(compute().astype(dtype, copy=False).tobytes())
