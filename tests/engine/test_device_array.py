"""DLPack capsules, given to numpy and PyTorch and taken from them, in CPU memory: the protocol is the same for a GPU's."""

import gc
import types

import numpy as np
import pytest

from vit_convert.core.errors import BenchmarkError
from vit_convert.engine.runtime import device_array
from vit_convert.engine.runtime.device_array import DeviceArray, as_device_array, read_capsule

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


@pytest.mark.parametrize(("shape", "steps"), [((1, 4), (1, 1)), ((3, 1, 4), (4, 1, 1)), ((1, 1), (7, 9)), ((0, 4), (1, 1))])
def test_steps_along_axes_of_one_value_are_nobodys(shape, steps):
    """Older PyTorch gives them 1, and others what a slice left there."""
    array = np.zeros(shape, np.float32)
    view = np.lib.stride_tricks.as_strided(array, shape, [4 * step for step in steps])
    assert read_capsule(view.__dlpack__()).shape == shape
    interface = {"shape": shape, "typestr": "<f4", "data": (array.ctypes.data, False), "version": 3, "strides": view.strides}
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
