"""Calls of the CUDA driver: their arguments in the order of cuda.h, by a library that notes them."""

import ctypes
import gc

import numpy as np
import pytest
from cuda_library import Library, plain

from vit_convert.core.errors import BuildError
from vit_convert.engine.backend import cuda


@pytest.fixture
def driver(monkeypatch):
    def install(answers=(), **options):
        found = Library({"cuCtxGetCurrent": ((77,), 0), **dict(answers)}, **options)
        monkeypatch.setattr(cuda, "_driver", lambda: found)
        return found

    cuda.gpu.cache_clear()
    yield install
    cuda.gpu.cache_clear()


DEVICE = {
    "cuDeviceGetCount": ((2,), 0),
    "cuDeviceGet": ((3,), 0),
    "cuDeviceGetName": ((b"NVIDIA H200",), 0),
    "cuDeviceTotalMem_v2": ((150 << 30,), 0),
    "cuDriverGetVersion": ((12040,), 0),
}


@pytest.mark.parametrize(("version", "said"), [(12040, "12.4"), (13000, "13.0"), (11080, "11.8"), (12999, "12.99")])
def test_the_gpu(driver, monkeypatch, tmp_path, version, said):
    """CUDA writes its version as 1000 major + 10 minor; attributes 75 and 76 are the compute capability."""
    file = tmp_path / "version"
    file.write_text("580.95\n")
    monkeypatch.setattr(cuda, "_DRIVER_VERSION_FILE", file)
    library = driver({**DEVICE, "cuDriverGetVersion": ((version,), 0)})
    asked = []

    def attribute(value, number, device):
        asked.append((number, plain(device)))
        value._obj.value = {75: 9, 76: 2}[number]
        return 0

    library.cuDeviceGetAttribute = attribute
    assert cuda.gpu() == cuda.Gpu("NVIDIA H200", "sm92", 150 << 30, "580.95", said)
    assert asked == [(75, 3), (76, 3)] and library.calls[0] == ("cuInit", 0)
    assert ("cuDeviceGet", 3, 0) in library.calls  # the first that this process may use
    assert ("cuDeviceGetName", "text", 256, 3) in library.calls
    assert cuda.gpu() is cuda.gpu()  # asked once
    file.unlink()
    cuda.gpu.cache_clear()
    assert cuda.gpu().driver == ""


@pytest.mark.parametrize(
    "answers",
    [{"cuInit": ((), 100)}, {"cuDeviceGetCount": ((2,), 3)}, {"cuDeviceGetCount": ((0,), 0)}],
    ids=["no device", "an error", "none visible"],
)
def test_no_gpu(driver, answers):
    driver({**DEVICE, **answers})
    assert cuda.gpu() is None


def test_no_driver(monkeypatch):
    monkeypatch.setattr(cuda, "_driver", lambda: None)
    cuda.gpu.cache_clear()
    assert cuda.gpu() is None
    with pytest.raises(BuildError, match=r"cuInit: this machine has no CUDA driver") as caught:
        cuda.status_of("cuInit", 0)
    assert "NVIDIA GPU" in caught.value.fix
    cuda.gpu.cache_clear()


def test_an_error_in_the_drivers_own_words(driver):
    driver({"cuMemAlloc_v2": ((), 2), "cuGetErrorString": ((None, b"out of memory"), 0)})
    assert cuda.status_of("cuMemAlloc_v2") == 2
    with pytest.raises(BuildError, match=r"^cuMemAlloc_v2: CUDA error 2, out of memory"):
        cuda.call("cuMemAlloc_v2")
    library = driver({"cuMemAlloc_v2": ((), 999)})
    with pytest.raises(BuildError, match="CUDA error 999, unknown"):
        cuda.call("cuMemAlloc_v2")
    assert library.calls[-1] == ("cuGetErrorString", 999, None)
    with pytest.raises(BuildError, match="cuGraphLaunch: this CUDA driver does not have it"):
        driver(lacks=("cuGraphLaunch",)) and cuda.call("cuGraphLaunch")


def test_where_it_is_and_what_is_free(driver):
    library = driver({"cuDeviceGetPCIBusId": ((b"0000:18:00.0",), 0), "cuMemGetInfo_v2": ((11, 12), 0)})
    assert cuda.pci_bus_id() == "0000:18:00.0" and library.calls[-1][1:3] == ("text", 32)
    assert cuda.free_memory_bytes() == 11


@pytest.mark.parametrize(("current", "set_"), [(77, []), (None, [("cuCtxSetCurrent", 55)])])
def test_the_context_that_tensorrt_uses(driver, monkeypatch, current, set_):
    """A thread has one of its own if another library gave it one."""
    library = driver({"cuCtxGetCurrent": ((current,), 0), "cuDevicePrimaryCtxRetain": ((55,), 0)})
    cuda._primary_context.cache_clear()
    try:
        cuda.use_context()
        assert [call for call in library.calls if call[0] == "cuCtxSetCurrent"] == set_
        assert library.calls[0] == ("cuInit", 0)  # before which no other call works
    finally:
        cuda._primary_context.cache_clear()


@pytest.fixture
def stream(driver):
    library = driver({"cuStreamCreate": ((5,), 0), "cuEventCreate": ((6,), 0), "cuMemAlloc_v2": ((4096,), 0),
                      "cuEventElapsedTime": ((1.5,), 0)})  # fmt: skip
    return cuda.Stream(), library


def test_streams_and_events(stream):
    found, library = stream
    assert found.handle == 5 and ("cuStreamCreate", 5, 1) in library.calls  # 1: waits for no other stream
    event, end = cuda.Event(), cuda.Event()
    assert ("cuEventCreate", 6, 0) in library.calls  # 0: it keeps the time
    library.calls.clear()
    event.record(found)
    event.record(9)
    found.wait_for(event)
    found.synchronize()
    event.synchronize()
    assert event.elapsed_ms(end) == 1.5
    event.close()
    found.close()
    assert library.calls == [
        ("cuEventRecord", 6, 5),
        ("cuEventRecord", 6, 9),
        ("cuStreamWaitEvent", 5, 6, 0),
        ("cuStreamSynchronize", 5),
        ("cuEventSynchronize", 6),
        ("cuEventElapsedTime", 1.5, 6, 6),
        ("cuEventDestroy_v2", 6),
        ("cuStreamDestroy_v2", 5),
    ]


def test_copies(stream):
    found, library = stream
    buffer, array = cuda.DeviceBuffer(40), np.zeros(10, np.float32)
    assert (buffer.pointer, buffer.num_bytes) == (4096, 40) and ("cuMemAlloc_v2", 4096, 40) in library.calls
    library.calls.clear()
    buffer.upload(array, found)
    buffer.download(array[:9], found)
    buffer.copy_from(8192, 40, found)
    buffer.close()
    host = array.ctypes.data
    assert library.calls == [
        ("cuMemcpyHtoDAsync_v2", 4096, host, 40, 5),
        ("cuMemcpyDtoHAsync_v2", host, 4096, 36, 5),
        ("cuMemcpyDtoDAsync_v2", 4096, 8192, 40, 5),
        ("cuMemFree_v2", 4096),
    ]


def test_copies_past_the_end_and_of_strided_views_are_refused(stream):
    found, library = stream
    buffer = cuda.DeviceBuffer(40)
    library.calls.clear()
    for array in (np.zeros(11, np.float32), np.zeros((4, 4), np.float32)[:, :2]):
        for copy in (buffer.upload, buffer.download):
            with pytest.raises(ValueError, match="for a buffer of 40 bytes"):
                copy(array, found)
    with pytest.raises(ValueError, match="41 bytes for a buffer of 40 bytes"):
        buffer.copy_from(8192, 41, found)
    assert library.calls == []


def test_memory_is_freed_with_its_owner_once(driver):
    library, freed = driver(), []

    class Owner:
        pass

    owner = Owner()
    finalizer = cuda.when_gone(owner, lambda *arguments: freed.append((*arguments, len(library.calls))), 1, 2)
    assert finalizer.atexit is False and not freed
    del owner
    gc.collect()
    assert [row[:2] for row in freed] == [(1, 2)] and freed[0][2] > 0  # after a context was made current
    finalizer()
    assert len(freed) == 1


def test_the_library_that_is_loaded(monkeypatch):
    cuda._driver.cache_clear()
    try:
        monkeypatch.setattr(ctypes, "CDLL", lambda name: name)
        assert cuda._driver() == "libcuda.so.1"
        cuda._driver.cache_clear()

        def missing(name):
            raise OSError(f"{name}: cannot open shared object file")

        monkeypatch.setattr(ctypes, "CDLL", missing)
        assert cuda._driver() is None
    finally:
        cuda._driver.cache_clear()
