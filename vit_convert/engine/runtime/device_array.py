"""Arrays in GPU memory, exchanged with PyTorch, CuPy and JAX without a copy: `__cuda_array_interface__` and DLPack."""

import ctypes
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from vit_convert.core.errors import BenchmarkError
from vit_convert.engine.backend import cuda

CUDA_DEVICE = (2, 0)  # kDLCUDA of dlpack.h, and the first device
_KINDS = {"i": 0, "u": 1, "f": 2, "b": 6}  # DLDataTypeCode
_NAME = b"dltensor"

# CPython's capsule functions, some of them twice, because a dying capsule must not be referenced again.
_new = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)(
    ("PyCapsule_New", ctypes.pythonapi)
)
_get = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(("PyCapsule_GetPointer", ctypes.pythonapi))
_get_dying = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)
_is_valid_dying = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p)(
    ("PyCapsule_IsValid", ctypes.pythonapi)
)


class _Tensor(ctypes.Structure):
    """DLManagedTensor of dlpack.h with its DLTensor inlined."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
        ("manager", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    )


@dataclasses.dataclass(frozen=True)
class DeviceArray:
    """A C-contiguous array whose values are not in Python's memory.

    Attributes:
        pointer: its address.
        shape: its shape.
        dtype: its numpy type.
        owner: the object that keeps the memory alive.
        device: DLPack's (device type, device id).
    """

    pointer: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    owner: Any = None
    device: tuple[int, int] = CUDA_DEVICE

    @property
    def num_bytes(self) -> int:
        """Size of its values."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.pointer, False),
            "version": 3,
            "stream": None,
        }

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device

    def __dlpack__(
        self, *, stream: Any = None, max_version: Any = None, dl_device: Any = None, copy: bool | None = None
    ) -> Any:
        """Passes the memory to another library, in the first version of DLPack whatever `max_version` says, as the
        standard allows.

        Args:
            stream: ignored, because sessions hand out finished results.
            max_version: the newest version that the consumer reads.
            dl_device: where the consumer wants the values; None leaves them where they are.
            copy: whether the consumer must get memory of its own.

        Returns:
            The capsule.

        Raises:
            BufferError: a copy, or another device, is asked for.
        """
        if copy:
            raise BufferError(
                f"array {list(self.shape)}: DLPack with copy=True is asked for, the memory itself is given"
            )
        if dl_device is not None and tuple(map(int, dl_device)) != self.device:
            raise BufferError(
                f"array {list(self.shape)}: DLPack device {tuple(map(int, dl_device))} is asked for, it is on "
                f"{self.device}"
            )
        return _make_capsule(self)


def as_device_array(array: Any, stream: cuda.Stream) -> DeviceArray:
    """Reads another library's GPU array, and makes a stream wait until it is ready.

    Args:
        array: has `__dlpack__` or `__cuda_array_interface__`.
        stream: the one that will read it.

    Returns:
        The same memory; holds a reference to `array`.

    Raises:
        BenchmarkError: it is not in GPU memory, or is a strided view.
    """
    if hasattr(array, "__dlpack__"):
        device = tuple(int(part) for part in array.__dlpack_device__())
        if device != CUDA_DEVICE:
            raise BenchmarkError(
                f"images: DLPack device {device}, the engine runs on {CUDA_DEVICE}", fix="Give a numpy or a GPU array."
            )
        return read_capsule(array.__dlpack__(stream=stream.handle), owner=array)
    if hasattr(array, "__cuda_array_interface__"):
        return _read_interface(array, stream)
    raise BenchmarkError(
        f"images: {type(array).__name__} has neither __dlpack__ nor __cuda_array_interface__",
        fix="Give a numpy or a GPU array.",
    )


def read_capsule(capsule: Any, *, owner: Any = None) -> DeviceArray:
    """Reads what a DLPack capsule describes, without consuming it.

    Args:
        capsule: from `__dlpack__`.
        owner: kept alive with the result, as the capsule is.

    Returns:
        The array.

    Raises:
        BenchmarkError: a strided view, or a type that numpy does not have.
    """
    found = _Tensor.from_address(_get(capsule, _NAME))
    shape = tuple(found.shape[i] for i in range(found.ndim))
    if found.strides and not _contiguous(shape, [found.strides[i] for i in range(found.ndim)]):
        raise BenchmarkError(f"images {list(shape)}: a strided view", fix="Make the array contiguous.")
    kinds = {code: kind for kind, code in _KINDS.items()}
    if found.code not in kinds or found.lanes != 1:
        raise BenchmarkError(
            f"images: DLPack type {found.code} with {found.bits} bits is none of numpy's", fix="Convert the array."
        )
    dtype = np.dtype(f"{kinds[found.code]}{found.bits // 8}")
    pointer = (found.data or 0) + found.byte_offset  # an empty array may have no address
    return DeviceArray(pointer, shape, dtype, (capsule, owner), (found.device_type, found.device_id))


def queue_copy(pointer: int, shape: tuple[int, ...], dtype: np.dtype[Any], stream: cuda.Stream) -> DeviceArray:
    """Queues a copy of GPU memory into new memory, which is freed with the last reference to it.

    Args:
        pointer: where the values are.
        shape: of the values.
        dtype: of the values.
        stream: for the copy; must be synchronized before the result is freed.

    Returns:
        The copy, finished once the stream is synchronized.

    Raises:
        BuildError: the GPU has not enough free memory.
    """
    owner = _Owner(max(1, math.prod(shape) * dtype.itemsize))
    result = DeviceArray(owner.buffer.pointer, shape, dtype, owner)
    owner.buffer.copy_from(pointer, result.num_bytes, stream)
    return result


class _Owner:
    """Frees a block of GPU memory when nothing refers to it any more."""

    def __init__(self, num_bytes: int):
        self.buffer = cuda.DeviceBuffer(num_bytes)
        # cuMemFree waits for every stream, and so for whatever a consumer queued before it released the array
        cuda.when_gone(self, self.buffer.close)


def _read_interface(array: Any, stream: cuda.Stream) -> DeviceArray:
    found = array.__cuda_array_interface__
    shape, dtype = tuple(found["shape"]), np.dtype(found["typestr"])
    if found.get("strides") is not None and not _contiguous(
        shape, [step / dtype.itemsize for step in found["strides"]]
    ):
        raise BenchmarkError(f"images {list(shape)}: a strided view", fix="Make the array contiguous.")
    if found["version"] < 3:  # it does not say what its values depend on
        cuda.call("cuCtxSynchronize")
    elif found.get("stream") is not None:
        event = cuda.Event()
        # 1 and 2 are the default streams here and in the driver (CU_STREAM_LEGACY, _PER_THREAD)
        event.record(int(found["stream"]))
        stream.wait_for(event)
        event.close()
    return DeviceArray(found["data"][0], shape, dtype, array)


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def _contiguous(shape: tuple[int, ...], steps: Sequence[float]) -> bool:
    # The stride of an axis of length one is never used, so libraries may put anything there; in an empty array, any
    # stride.
    return 0 in shape or all(size == 1 or step == wanted for size, step, wanted in zip(shape, steps, _strides(shape)))


_exported: dict[int, Any] = {}  # arrays that consumers still hold, by the address of their description


def _release(address: int) -> None:
    _exported.pop(address, None)


def _destroy(capsule: int) -> None:
    if _is_valid_dying(capsule, _NAME):  # otherwise a consumer renamed it, and calls the deleter itself
        _release(_get_dying(capsule, _NAME))


_DELETER = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(_release)
_DESTRUCTOR = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)(_destroy)


def _make_capsule(array: DeviceArray) -> Any:
    sizes = (ctypes.c_int64 * len(array.shape))(*array.shape)
    steps = (ctypes.c_int64 * len(array.shape))(*_strides(array.shape))
    kind, bits = _KINDS[array.dtype.kind], array.dtype.itemsize * 8
    tensor_struct = _Tensor(array.pointer, *array.device, len(array.shape), kind, bits, 1, sizes, steps, 0, None)
    tensor_struct.deleter = ctypes.cast(_DELETER, ctypes.c_void_p)
    location = ctypes.addressof(tensor_struct)
    _exported[location] = (tensor_struct, sizes, steps, array)
    return _new(location, _NAME, ctypes.cast(_DESTRUCTOR, ctypes.c_void_p))
