"""DLPack capsules, given to numpy and PyTorch and taken from them, in CPU memory: the protocol is the same for a
GPU's."""

import ctypes
import gc
import struct
import types

import numpy as np
import pytest

from vit_convert.core.errors import BenchmarkError
from vit_convert.engine.runtime import device_array
from vit_convert.engine.runtime.device_array import DeviceArray, as_device_array, queue_copy, read_capsule

CPU = (1, 0)


def wrap(array):
    return DeviceArray(array.ctypes.data, array.shape, array.dtype, array, CPU)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.uint8, np.int64, np.bool_])
def test_numpy_reads_the_same_memory(dtype):
    array = np.arange(24).reshape(2, 3, 4).astype(dtype)
    view = np.from_dlpack(wrap(array))
    assert view.dtype == dtype and np.array_equal(view, array) and view.ctypes.data == array.ctypes.data


def test_torch_reads_the_same_memory():
    torch = pytest.importorskip("torch")
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    view = torch.from_dlpack(wrap(array))
    view[1, 2] = 42
    assert array[1, 2] == 42


def test_a_consumer_that_wants_a_copy_or_another_device_gets_no_view():
    array = wrap(np.zeros((2, 3), np.float32))
    with pytest.raises(BufferError, match=r"array \[2, 3\]: DLPack with copy=True"):
        array.__dlpack__(stream=None, max_version=(1, 0), copy=True)
    with pytest.raises(BufferError, match=r"array \[2, 3\]: DLPack device \(2, 0\) is asked for, it is on \(1, 0\)"):
        array.__dlpack__(dl_device=(2, 0))
    assert read_capsule(array.__dlpack__(dl_device=CPU, copy=False)).pointer == array.pointer


def test_memory_is_released_with_the_last_reader():
    before = len(device_array._exported)
    view = np.from_dlpack(wrap(np.zeros(3, np.float32)))
    assert len(device_array._exported) == before + 1
    del view
    gc.collect()
    assert len(device_array._exported) == before
    unread = wrap(np.zeros(3, np.float32)).__dlpack__()
    assert len(device_array._exported) == before + 1
    del unread
    gc.collect()
    assert len(device_array._exported) == before


def test_reading_a_capsule():
    array = np.arange(12, dtype=np.uint8).reshape(3, 4)[1:]
    found = read_capsule(array.__dlpack__())
    assert (found.pointer, found.shape, found.dtype, found.device) == (array.ctypes.data, (2, 4), np.uint8, CPU)
    assert found.num_bytes == 8


@pytest.mark.parametrize(
    ("shape", "steps"), [((1, 4), (1, 1)), ((3, 1, 4), (4, 1, 1)), ((1, 1), (7, 9)), ((0, 4), (1, 1))]
)
def test_steps_along_axes_of_one_value_are_nobodys(shape, steps):
    """Older PyTorch gives them 1, and others what a slice left there."""
    array = np.zeros(shape, np.float32)
    view = np.lib.stride_tricks.as_strided(array, shape, [4 * step for step in steps])
    assert read_capsule(view.__dlpack__()).shape == shape
    interface = {
        "shape": shape,
        "typestr": "<f4",
        "data": (array.ctypes.data, False),
        "version": 3,
        "strides": view.strides,
    }
    assert as_device_array(types.SimpleNamespace(__cuda_array_interface__=interface), None).shape == shape


def test_an_empty_array_may_be_nowhere():
    """As PyTorch's are."""
    found = read_capsule(DeviceArray(0, (0, 4), np.dtype(np.float32), device=CPU).__dlpack__())
    assert (found.pointer, found.shape) == (0, (0, 4))


def test_what_cannot_be_read_is_refused():
    with pytest.raises(BenchmarkError, match=r"\[3, 2\]: a strided view"):
        read_capsule(np.zeros((3, 4), np.float32)[:, ::2].__dlpack__())
    with pytest.raises(BenchmarkError, match="DLPack type 5 with 64 bits"):
        read_capsule(np.zeros(3, np.complex64).__dlpack__())
    with pytest.raises(BenchmarkError, match=r"DLPack device \(1, 0\), the engine runs on \(2, 0\)"):
        as_device_array(np.zeros(3), None)


class Driver:
    """What a session's stream and memory ask of CUDA, noted in order; its memory is the host's."""

    def __init__(self, monkeypatch):
        self.calls, self.blocks = [], {}
        monkeypatch.setattr(device_array.cuda, "call", lambda function, *arguments: self.calls.append(function))
        monkeypatch.setattr(device_array.cuda, "use_context", lambda: None)
        monkeypatch.setattr(device_array.cuda, "Event", self._event)
        monkeypatch.setattr(device_array.cuda, "DeviceBuffer", self._buffer)
        self.stream = types.SimpleNamespace(handle=77, wait_for=lambda event: self.calls.append(("wait", event.number)))

    def _event(self):
        event = types.SimpleNamespace(number=len(self.calls))
        event.record = lambda handle: self.calls.append(("record", event.number, handle))
        event.close = lambda: self.calls.append(("close", event.number))
        return event

    def _buffer(self, num_bytes):
        memory = np.full(num_bytes, 255, np.uint8)
        self.blocks[memory.ctypes.data] = num_bytes

        def copy_from(pointer, count, stream):
            self.calls.append(("copy", stream))
            ctypes.memmove(memory.ctypes.data, pointer, count)

        return types.SimpleNamespace(
            pointer=memory.ctypes.data,
            memory=memory,
            copy_from=copy_from,
            close=lambda: self.blocks.pop(memory.ctypes.data),
        )


@pytest.fixture
def driver(monkeypatch):
    return Driver(monkeypatch)


def interface(array, **changes):
    """An array whose library has the interface alone."""
    found = {
        "shape": array.shape,
        "typestr": array.dtype.str,
        "data": (array.ctypes.data, False),
        "version": 3,
        **changes,
    }
    return types.SimpleNamespace(__cuda_array_interface__=found)


@pytest.mark.parametrize(
    ("changes", "calls"),
    [
        ({}, []),  # version 3 without a stream: there is nothing to wait for
        ({"stream": None}, []),
        ({"stream": 1}, [("record", 0, 1), ("wait", 0), ("close", 0)]),  # the legacy default stream
        ({"stream": 2}, [("record", 0, 2), ("wait", 0), ("close", 0)]),
        ({"stream": 1234}, [("record", 0, 1234), ("wait", 0), ("close", 0)]),
        ({"version": 2}, ["cuCtxSynchronize"]),  # it cannot say what its values wait for
        ({"version": 2, "stream": 5}, ["cuCtxSynchronize"]),
    ],
)
def test_values_are_waited_for_as_the_interface_says(driver, changes, calls):
    array = np.arange(6, dtype=np.float16).reshape(2, 3)
    found = as_device_array(given := interface(array, **changes), driver.stream)
    assert (found.pointer, found.shape, found.dtype, found.owner) == (array.ctypes.data, (2, 3), np.float16, given)
    assert found.device == (2, 0) and driver.calls == calls


def test_a_strided_interface_is_refused(driver):
    array = np.zeros((3, 4), np.float32)
    with pytest.raises(BenchmarkError, match=r"images \[3, 2\]: a strided view") as caught:
        as_device_array(interface(array[:, ::2], strides=array[:, ::2].strides), driver.stream)
    assert caught.value.fix == "Make the array contiguous."
    assert as_device_array(interface(array, strides=(16, 4)), driver.stream).shape == (3, 4)


def test_dlpack_goes_before_the_interface_and_is_told_the_stream(driver):
    array, asked = np.arange(4, dtype=np.int32), []

    class Tensor:
        __cuda_array_interface__ = None

        def __dlpack_device__(self):
            return np.int32(2), 0

        def __dlpack__(self, *, stream):
            asked.append(stream)
            return DeviceArray(array.ctypes.data, array.shape, array.dtype).__dlpack__()

    tensor = Tensor()
    found = as_device_array(tensor, driver.stream)
    assert (found.pointer, found.shape, found.dtype, found.device) == (array.ctypes.data, (4,), np.int32, (2, 0))
    assert asked == [77] and found.owner[1] is tensor and driver.calls == []


def test_what_is_no_array_is_refused(driver):
    with pytest.raises(BenchmarkError, match="images: list has neither __dlpack__ nor __cuda_array_interface__"):
        as_device_array([1, 2], driver.stream)


@pytest.mark.parametrize(
    ("shape", "dtype"), [((2, 3), np.float32), ((5,), np.uint8), ((), np.float64), ((0, 4), np.float32)]
)
def test_a_copy_is_the_callers_own_until_it_lets_go(driver, shape, dtype):
    source = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    copy = queue_copy(source.ctypes.data, shape, np.dtype(dtype), driver.stream)
    assert (copy.shape, copy.dtype, copy.device) == (shape, dtype, (2, 0)) and driver.calls == [("copy", driver.stream)]
    assert driver.blocks == {copy.pointer: max(1, source.nbytes)}  # of nothing, too, there is a pointer
    view = DeviceArray(copy.pointer, shape, copy.dtype, copy, CPU)  # which a consumer goes on holding
    del copy
    gc.collect()
    assert np.array_equal(np.from_dlpack(view), source) and len(driver.blocks) == 1
    del view
    gc.collect()
    assert driver.blocks == {}


def test_what_a_capsule_says_is_as_dlpack_h_lays_it_out():
    """By offsets of dlpack.h's DLManagedTensor on 64 bits, which the class under test does not enter."""
    array = np.arange(24, dtype=np.float16).reshape(2, 3, 4)
    capsule = DeviceArray(array.ctypes.data, array.shape, array.dtype, array, (2, 1)).__dlpack__()
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    raw = ctypes.string_at(get(capsule, b"dltensor"), 64)
    data, kind, number, ndim, code, bits, lanes, shape, strides, offset, manager, deleter = struct.unpack(
        "<QiiiBBHQQQQQ", raw
    )
    assert (data, kind, number, ndim, code, bits, lanes) == (array.ctypes.data, 2, 1, 3, 2, 16, 1)
    assert (offset, manager) == (0, 0) and deleter != 0
    read = lambda address: list(struct.unpack("<3q", ctypes.string_at(address, 24)))  # noqa: E731
    assert read(shape) == [2, 3, 4] and read(strides) == [12, 4, 1]
    array_interface = DeviceArray(4096, (2, 3), np.dtype(np.float16)).__cuda_array_interface__
    assert array_interface == {"shape": (2, 3), "typestr": "<f2", "data": (4096, False), "version": 3, "stream": None}


def test_values_that_begin_behind_the_pointer():
    """DLPack's byte_offset, which PyTorch and CuPy leave at 0 and others use; and more than one lane is no type of
    numpy's."""
    array = np.arange(8, dtype=np.float32)
    capsule = wrap(array).__dlpack__()
    record = device_array._Tensor.from_address(device_array._get(capsule, b"dltensor"))
    record.byte_offset, record.shape[0] = 12, 5
    record.strides = None  # which means contiguous
    found = read_capsule(capsule)
    assert (found.pointer, found.shape) == (array.ctypes.data + 12, (5,))
    record.lanes = 4
    with pytest.raises(BenchmarkError, match="DLPack type 2 with 32 bits is none of numpy's"):
        read_capsule(capsule)
