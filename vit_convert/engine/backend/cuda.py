"""The few CUDA driver calls that engine/ needs, through ctypes: every host with a driver has them, and no Python
package is needed."""

import ctypes
import dataclasses
import functools
import pathlib
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np

from vit_convert.core.errors import BuildError

# cuda.h, CUdevice_attribute
_COMPUTE_CAPABILITY_MAJOR, _COMPUTE_CAPABILITY_MINOR = 75, 76
_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: does not wait for the legacy default stream
_DRIVER_VERSION_FILE = pathlib.Path("/sys/module/nvidia/version")


@dataclasses.dataclass(frozen=True)
class Gpu:
    """The first GPU that this process may use.

    Attributes:
        name: the vendor's name ("NVIDIA H200").
        arch: compute capability as "sm90".
        memory_bytes: total memory.
        driver: driver version if the kernel module reports it, otherwise "".
        cuda: highest CUDA version that the driver supports ("12.4").
    """

    name: str
    arch: str
    memory_bytes: int
    driver: str
    cuda: str


@functools.cache
def gpu() -> Gpu | None:
    """The GPU of this process, or None without a driver or a device."""
    library = _driver()
    count = ctypes.c_int()
    if (
        library is None
        or library.cuInit(0) != 0
        or library.cuDeviceGetCount(ctypes.byref(count)) != 0
        or count.value == 0
    ):
        return None
    device, major, minor, version, total = (
        ctypes.c_int(),
        ctypes.c_int(),
        ctypes.c_int(),
        ctypes.c_int(),
        ctypes.c_size_t(),
    )
    name = ctypes.create_string_buffer(256)
    call("cuDeviceGet", ctypes.byref(device), 0)
    call("cuDeviceGetName", name, len(name), device)
    call("cuDeviceGetAttribute", ctypes.byref(major), _COMPUTE_CAPABILITY_MAJOR, device)
    call("cuDeviceGetAttribute", ctypes.byref(minor), _COMPUTE_CAPABILITY_MINOR, device)
    call("cuDeviceTotalMem_v2", ctypes.byref(total), device)
    call("cuDriverGetVersion", ctypes.byref(version))
    driver = (
        _DRIVER_VERSION_FILE.read_text(encoding="utf-8", errors="replace").strip()
        if _DRIVER_VERSION_FILE.exists()
        else ""
    )
    cuda = f"{version.value // 1000}.{version.value % 1000 // 10}"
    return Gpu(name.value.decode(), f"sm{major.value}{minor.value}", total.value, driver, cuda)


def pci_bus_id() -> str:
    """The PCI address of this process's GPU ("0000:18:00.0"), by which NVML knows it too."""
    device, text = ctypes.c_int(), ctypes.create_string_buffer(32)
    call("cuDeviceGet", ctypes.byref(device), 0)
    call("cuDeviceGetPCIBusId", text, len(text), device)
    return text.value.decode()


def free_memory_bytes() -> int:
    """GPU memory that is free now, whoever uses the rest."""
    use_context()
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
    return free.value


def call(function: str, *arguments: Any) -> None:
    """Calls one function of the CUDA driver.

    Args:
        function: its exported name ("cuMemAlloc_v2").
        *arguments: ctypes values or integers.

    Raises:
        BuildError: there is no driver, or the call failed; the message holds the driver's own words.
    """
    status = status_of(function, *arguments)
    if status != 0:
        text = ctypes.c_char_p()
        status_of("cuGetErrorString", status, ctypes.byref(text))
        raise BuildError(f"{function}: CUDA error {status}, {(text.value or b'unknown').decode()}")


def status_of(function: str, *arguments: Any) -> int:
    """Calls one function of the CUDA driver and returns its status, for calls that may fail in the normal course of
    things.

    Raises:
        BuildError: there is no driver, or it is too old to have the function.
    """
    library = _driver()
    if library is None:
        raise BuildError(
            f"{function}: this machine has no CUDA driver (libcuda.so.1)",
            fix="Run this step on a host with an NVIDIA GPU.",
        )
    if not hasattr(library, function):
        raise BuildError(f"{function}: this CUDA driver does not have it", fix="Update the NVIDIA driver.")
    return int(getattr(library, function)(*arguments))


def use_context() -> None:
    """Makes the device's primary context, the one TensorRT uses, current in this thread unless it has one."""
    current = ctypes.c_void_p()
    call("cuInit", 0)
    call("cuCtxGetCurrent", ctypes.byref(current))
    if not current.value:
        call("cuCtxSetCurrent", _primary_context())


def when_gone(owner: Any, free: Callable[..., None], *arguments: Any) -> "weakref.finalize[..., Any]":
    """Frees memory with the last reference to its owner, in whichever thread that is dropped.

    Args:
        owner: the object that represents the memory; `free` and `arguments` must hold no reference to it.
        free: called with this process's context current, but not when the process ends, which frees its memory anyway.
        *arguments: passed to `free`.

    Returns:
        A function that frees the memory right away.
    """
    finalizer = weakref.finalize(owner, _in_context, free, *arguments)
    finalizer.atexit = False
    return finalizer


def _in_context(free: Callable[..., None], *arguments: Any) -> None:
    use_context()
    free(*arguments)


@functools.cache
def _primary_context() -> ctypes.c_void_p:
    device, context = ctypes.c_int(), ctypes.c_void_p()
    call("cuDeviceGet", ctypes.byref(device), 0)
    call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
    return context


class Stream:
    """A CUDA stream; `handle` is what TensorRT takes."""

    def __init__(self) -> None:
        use_context()
        handle = ctypes.c_void_p()
        call("cuStreamCreate", ctypes.byref(handle), _NON_BLOCKING)
        self.handle = handle.value or 0

    def synchronize(self) -> None:
        """Waits until everything queued on the stream is done."""
        call("cuStreamSynchronize", ctypes.c_void_p(self.handle))

    def wait_for(self, event: "Event") -> None:
        """Makes what is queued from now on wait for an event, without making the CPU wait."""
        call("cuStreamWaitEvent", ctypes.c_void_p(self.handle), event.handle, 0)

    def close(self) -> None:
        """Destroys the stream."""
        call("cuStreamDestroy_v2", ctypes.c_void_p(self.handle))


class Event:
    """A mark in a stream, with the time at which the GPU reaches it."""

    def __init__(self) -> None:
        use_context()
        self.handle = ctypes.c_void_p()
        call("cuEventCreate", ctypes.byref(self.handle), 0)

    def record(self, stream: Stream | int) -> None:
        """Queues the mark on a stream of ours, or on one known by its handle."""
        handle = stream if isinstance(stream, int) else stream.handle
        call("cuEventRecord", self.handle, ctypes.c_void_p(handle))

    def synchronize(self) -> None:
        """Waits until the GPU has reached the mark."""
        call("cuEventSynchronize", self.handle)

    def elapsed_ms(self, end: "Event") -> float:
        """Milliseconds on the GPU from this mark to another; both must have been reached."""
        milliseconds = ctypes.c_float()
        call("cuEventElapsedTime", ctypes.byref(milliseconds), self.handle, end.handle)
        return milliseconds.value

    def close(self) -> None:
        """Destroys the event."""
        call("cuEventDestroy_v2", self.handle)


class DeviceBuffer:
    """A block of GPU memory.

    Args:
        num_bytes: its size.

    Raises:
        BuildError: the GPU has no such block free.
    """

    def __init__(self, num_bytes: int):
        use_context()
        pointer = ctypes.c_uint64()
        call("cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(num_bytes))
        self.pointer = pointer.value
        self.num_bytes = num_bytes

    def upload(self, array: np.ndarray, stream: Stream) -> None:
        """Queues a copy of a C-contiguous array to the GPU; the array must live until the stream is synchronized."""
        _require_fit(array, self.num_bytes)
        call(
            "cuMemcpyHtoDAsync_v2",
            ctypes.c_uint64(self.pointer),
            _address(array),
            ctypes.c_size_t(array.nbytes),
            ctypes.c_void_p(stream.handle),
        )

    def download(self, array: np.ndarray, stream: Stream) -> None:
        """Queues a copy from the GPU into a C-contiguous array, valid once the stream is synchronized."""
        _require_fit(array, self.num_bytes)
        call(
            "cuMemcpyDtoHAsync_v2",
            _address(array),
            ctypes.c_uint64(self.pointer),
            ctypes.c_size_t(array.nbytes),
            ctypes.c_void_p(stream.handle),
        )

    def copy_from(self, pointer: int, num_bytes: int, stream: Stream) -> None:
        """Queues a copy of `num_bytes` from elsewhere on the GPU."""
        if num_bytes > self.num_bytes:
            raise ValueError(f"{num_bytes} bytes for a buffer of {self.num_bytes} bytes")
        call(
            "cuMemcpyDtoDAsync_v2",
            ctypes.c_uint64(self.pointer),
            ctypes.c_uint64(pointer),
            ctypes.c_size_t(num_bytes),
            ctypes.c_void_p(stream.handle),
        )

    def close(self) -> None:
        """Gives the memory back."""
        call("cuMemFree_v2", ctypes.c_uint64(self.pointer))


def _address(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def _require_fit(array: np.ndarray, num_bytes: int) -> None:
    # A copy past the end, or of a strided view, would corrupt memory silently.
    if array.nbytes > num_bytes or not array.flags.c_contiguous:
        raise ValueError(
            f"array of {array.nbytes} bytes (C-contiguous: {array.flags.c_contiguous}) for a buffer of {num_bytes} "
            "bytes"
        )


@functools.cache
def _driver() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
