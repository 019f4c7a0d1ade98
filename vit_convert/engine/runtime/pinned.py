"""Page-locked host memory, the only kind that the GPU can copy from and to while both CPU and GPU keep working."""

import ctypes
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from vit_convert.engine.backend import cuda

# cuda.h: CU_POINTER_ATTRIBUTE_MEMORY_TYPE, CU_MEMORYTYPE_HOST
_MEMORY_TYPE, _HOST = 2, 1


def pinned_array(shape: Sequence[int], dtype: Any) -> np.ndarray:
    """Allocates a numpy array in page-locked memory, which is freed with the last reference to it.

    Args:
        shape: of the array.
        dtype: of the array.

    Returns:
        The array, with undefined values.

    Raises:
        BuildError: there is no driver, or not enough memory.
    """
    dtype = np.dtype(dtype)
    num_bytes = math.prod(shape) * dtype.itemsize
    cuda.use_context()
    pointer = ctypes.c_void_p()
    cuda.call("cuMemHostAlloc", ctypes.byref(pointer), ctypes.c_size_t(num_bytes), 0)
    assert pointer.value is not None
    block = (ctypes.c_byte * num_bytes).from_address(pointer.value)
    cuda.when_gone(block, cuda.call, "cuMemFreeHost", ctypes.c_void_p(pointer.value))
    return np.frombuffer(block, dtype).reshape(shape)


def is_pinned(array: np.ndarray) -> bool:
    """Whether an array lies in page-locked memory, whoever allocated it."""
    kind = ctypes.c_uint()
    status = cuda.status_of(
        "cuPointerGetAttribute", ctypes.byref(kind), _MEMORY_TYPE, ctypes.c_uint64(array.ctypes.data)
    )
    return status == 0 and kind.value == _HOST
