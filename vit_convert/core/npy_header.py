"""The header of an `.npy` file or member. It may come from anybody, so it is read within bounds, by numpy, with one
kind of error."""

import io
import math
import struct
from typing import IO

import numpy as np

# numpy itself refuses more than 10 000 characters, but only after reading them, and a header may claim 4 GiB
_LONGEST_BYTES = 1 << 16
_MOST_AXES = 32  # numpy's own limit before 2.0
_LENGTHS = {(1, 0): "<H", (2, 0): "<I"}
_READERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def read_npy_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Reads a header of version 1.0 or 2.0 and nothing after it.

    Args:
        stream: at the start of the file; left at the first value.

    Returns:
        (shape, whether values are in column-major order, dtype); `dtype.hasobject` where the values are pickled.

    Raises:
        ValueError: it is not such a header, or no array can have its shape and dtype.
    """
    version = np.lib.format.read_magic(stream)
    if version not in _LENGTHS:
        raise ValueError(f"npy version {version}")
    prefix = stream.read(struct.calcsize(_LENGTHS[version]))
    if len(prefix) != struct.calcsize(_LENGTHS[version]):
        raise ValueError("its npy header is cut")
    length = struct.unpack(_LENGTHS[version], prefix)[0]
    if length > _LONGEST_BYTES:
        raise ValueError(f"its npy header has {length} bytes")
    try:
        shape, fortran, dtype = _READERS[version](io.BytesIO(prefix + stream.read(length)))
    except Exception as e:
        # it is parsed as Python source, which may raise TokenError, RecursionError, TypeError …
        raise ValueError(f"its npy header is damaged: {type(e).__name__}") from e
    # numpy computes it the same way: (0, 2**62) is refused although it is empty
    size = math.prod(n for n in shape if n) * dtype.itemsize
    if len(shape) > _MOST_AXES or min(shape, default=0) < 0 or dtype.subdtype or not 0 < size < 1 << 63:
        raise ValueError(f"no array has shape {shape} of {dtype}")
    return shape, fortran, dtype
