"""Page-locked memory on a driver that notes what it is asked; numbers are those of cuda.h."""

import ctypes
import gc

import numpy as np
import pytest

from vit_convert.engine.runtime import pinned

MEMORY_TYPE, HOST, DEVICE = 2, 1, 2  # CU_POINTER_ATTRIBUTE_MEMORY_TYPE, CU_MEMORYTYPE_HOST and _DEVICE


@pytest.fixture
def driver(monkeypatch):
    """What was asked of the driver, in order; it allocates real memory, and keeps it until the end."""
    asked, held = [], []

    def call(name, *arguments):
        if name == "cuMemHostAlloc":
            pointer, size, flags = arguments
            held.append(ctypes.create_string_buffer(size.value))
            pointer._obj.value = ctypes.addressof(held[-1])
            asked.append((name, size.value, flags))
        else:
            asked.append((name, arguments[0].value == ctypes.addressof(held[-1])))

    monkeypatch.setattr(pinned.cuda, "use_context", lambda: asked.append("context"))
    monkeypatch.setattr(pinned.cuda, "call", call)
    return asked


def test_an_array_is_allocated_once_and_freed_with_its_last_view(driver):
    array = pinned.pinned_array((2, 3), np.float16)
    assert (array.shape, array.dtype, array.nbytes) == ((2, 3), np.float16, 12)
    assert driver == ["context", ("cuMemHostAlloc", 12, 0)]  # no flags: portable or mapped memory is not asked for
    array[...] = np.arange(6).reshape(2, 3)
    row = array[1]
    del array
    gc.collect()
    assert len(driver) == 2 and row.tolist() == [3, 4, 5]
    del row
    gc.collect()
    assert driver[2:] == ["context", ("cuMemFreeHost", True)]  # whichever thread lets go of it


@pytest.mark.parametrize(
    ("status", "kind", "expected"),
    [(0, HOST, True), (0, DEVICE, False), (0, 0, False), (1, HOST, False), (1, 0, False)],
)
def test_the_driver_tells_whether_memory_is_page_locked(monkeypatch, status, kind, expected):
    array = np.zeros(4, np.float32)

    def status_of(name, found, attribute, pointer):
        assert (name, attribute, pointer.value) == ("cuPointerGetAttribute", MEMORY_TYPE, array.ctypes.data)
        found._obj.value = kind
        return status

    monkeypatch.setattr(pinned.cuda, "status_of", status_of)
    assert pinned.is_pinned(array) is expected
