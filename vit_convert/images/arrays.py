"""Images that are an array already: `.npz` files, memory-mapped where they are stored uncompressed."""

import pathlib
import struct
import zipfile

import numpy as np

from vit_convert.errors import CalibrationError

_FIX = "Save it as numpy.savez(path, images=uint8 [N, H, W, 3], labels=integers [N])."


def read_arrays(path: pathlib.Path) -> tuple[np.ndarray, np.ndarray | None]:
    """Opens an `.npz` of images.

    Args:
        path: file with `images` and perhaps `labels`.

    Returns:
        (uint8 [N, H, W, 3], memory-mapped when the member is not compressed; int64 [N] or None).

    Raises:
        CalibrationError: not such a file.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            if "images" not in arrays.files:
                raise CalibrationError(f"images {path}: holds {arrays.files}, not `images`", fix=_FIX)
            mapped = _map_member(path, "images.npy")
            images = arrays["images"] if mapped is None else mapped
            labels = arrays["labels"] if "labels" in arrays.files else None
    except (OSError, ValueError, zipfile.BadZipFile) as e:
        raise CalibrationError(f"images {path}: not a readable .npz ({e})", fix=_FIX) from e
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise CalibrationError(f"images {path}: `images` is {images.dtype} {list(images.shape)}, needed is uint8 [N, H, W, 3]", fix=_FIX)
    if labels is None:
        return images, None
    if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
        raise CalibrationError(
            f"images {path}: `labels` is {labels.dtype} {list(labels.shape)}, needed are integers [{len(images)}]", fix=_FIX
        )
    return images, labels.astype(np.int64)


def _map_member(path: pathlib.Path, member: str) -> np.ndarray | None:
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(member)
    if info.compress_type != zipfile.ZIP_STORED:
        return None
    with open(path, "rb") as f:
        f.seek(info.header_offset + 26)  # lengths of the name and of the extra field, the last two of the local header's 30 bytes
        f.seek(sum(struct.unpack("<HH", f.read(4))), 1)
        version = np.lib.format.read_magic(f)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read_header(f)
        if dtype.hasobject or 0 in shape:
            return None
        return np.memmap(path, dtype, "r", f.tell(), shape, "F" if fortran else "C")
