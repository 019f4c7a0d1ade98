"""Images that are arrays already: `.npz` files, memory-mapped if they are stored uncompressed."""

import math
import pathlib
import zipfile

import numpy as np

from vit_convert.core.errors import CalibrationError
from vit_convert.core.npy_header import read_npy_header
from vit_convert.core.zip_member import UNREADABLE, data_offset, open_member

_FIX = "Save it as numpy.savez(path, images=uint8 [N, H, W, 3], labels=integers [N])."


def read_arrays(path: pathlib.Path) -> tuple[np.ndarray, np.ndarray | None]:
    """Opens an `.npz` of images.

    Args:
        path: file with `images` and perhaps `labels`.

    Returns:
        (uint8 [N, H, W, 3], memory-mapped when the member is not compressed; int64 [N] or None).

    Raises:
        CalibrationError: the file cannot be read, or does not hold images.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = {member.filename.removesuffix(".npy"): member for member in archive.infolist()}
            if "images" not in members:
                raise CalibrationError(f"images {path}: holds {list(members)}, not `images`", fix=_FIX)
        images = _read_member(path, members["images"])
        labels = _read_member(path, members["labels"]) if "labels" in members else None
    except UNREADABLE as e:
        raise CalibrationError(f"images {path}: not a readable .npz ({e})", fix=_FIX) from e
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise CalibrationError(
            f"images {path}: `images` is {images.dtype} {list(images.shape)}, needed is uint8 [N, H, W, 3]", fix=_FIX
        )
    if images.size == 0 and len(images):
        raise CalibrationError(f"images {path}: `images` is {list(images.shape)}, which holds no pixel", fix=_FIX)
    if labels is None:
        return images, None
    if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
        raise CalibrationError(
            f"images {path}: `labels` is {labels.dtype} {list(labels.shape)}, needed are integers [{len(images)}]",
            fix=_FIX,
        )
    if labels.dtype == np.uint64 and labels.max(initial=0) > np.iinfo(np.int64).max:  # would become negative
        raise CalibrationError(f"images {path}: label {labels.max()} is the number of no class", fix=_FIX)
    return images, labels.astype(np.int64)


def _read_member(path: pathlib.Path, member: zipfile.ZipInfo) -> np.ndarray:
    with open_member(path, member) as stream:
        shape, fortran, dtype = read_npy_header(stream)
        if dtype.hasobject:
            raise ValueError(f"{member.filename} is a pickled object array")
        header_bytes, needed = stream.tell(), math.prod(shape) * dtype.itemsize
        if needed != member.file_size - header_bytes:
            raise ValueError(
                f"{member.filename}: {member.file_size - header_bytes} bytes, shape {shape} of {dtype} needs {needed}"
            )
        if member.compress_type != zipfile.ZIP_STORED or not needed:
            return np.frombuffer(stream.read(), dtype).reshape(shape, order="F" if fortran else "C")
    with open(path, "rb") as file:
        offset = data_offset(file, member) + header_bytes
    return np.memmap(path, dtype, "r", offset, shape, "F" if fortran else "C")
