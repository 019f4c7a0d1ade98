"""Arrays of the GPU to and from PyTorch, CuPy and JAX, those that are installed; needs no TensorRT.

python -m pytest -m gpu tests/gpu/test_arrays_on_gpu.py
"""

import gc
import importlib
import os
import time

import numpy as np
import pytest

from vit_convert.engine.backend import cuda
from vit_convert.engine.runtime import device_array
from vit_convert.engine.runtime.device_array import as_device_array, queue_copy

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # JAX would take what the others need
if cuda.gpu() is None:
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)
pytestmark = pytest.mark.gpu


class Torch:
    """How PyTorch takes arrays from the host and gives them back, and how it takes ours."""

    def __init__(self):
        self.module = importlib.import_module("torch")
        if not self.module.cuda.is_available():
            pytest.skip("this PyTorch does not use the GPU")

    def send(self, values):
        return self.module.from_numpy(values).cuda()

    def values(self, array):
        return array.cpu().numpy()

    def take(self, ours):
        return self.module.from_dlpack(ours), self.module.as_tensor(ours, device="cuda")


class Cupy(Torch):
    """The same for CuPy."""

    def __init__(self):
        self.module = importlib.import_module("cupy")

    def send(self, values):
        return self.module.asarray(values)

    def values(self, array):
        return array.get()

    def take(self, ours):
        return self.module.from_dlpack(ours), self.module.asarray(ours)


class Jax(Torch):
    """The same for JAX, which reads DLPack alone."""

    def __init__(self):
        jax = importlib.import_module("jax")
        jax.config.update("jax_platforms", "cuda,cpu")  # the other tests run it on the CPU
        try:
            self.module, self._device = jax, jax.devices("cuda")[0]
        except RuntimeError as e:
            pytest.skip(f"JAX does not use the GPU: {e}")

    def send(self, values):
        return self.module.device_put(values, self._device)

    def values(self, array):
        return np.asarray(array)

    def take(self, ours):
        return (self.module.dlpack.from_dlpack(ours),)


@pytest.fixture(params=[Torch, Cupy, Jax])
def library(request, record_property):
    name = request.param.__name__.lower()
    record_property("version", pytest.importorskip(name).__version__)
    return request.param()


@pytest.fixture
def stream():
    found = cuda.Stream()
    yield found
    found.close()


def read(array, stream):
    """The values of a GPU array, copied on a stream of ours."""
    copy, values = queue_copy(array.pointer, array.shape, array.dtype, stream), np.empty(array.shape, array.dtype)
    copy.owner.buffer.download(values, stream)
    stream.synchronize()
    return values


def noise(dtype, shape=(3, 5, 7)):
    return np.random.default_rng(0).integers(0, 100, shape).astype(dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int32, np.uint8])
def test_theirs_are_read(library, stream, dtype):
    values = noise(dtype)
    array = as_device_array(library.send(values), stream)
    assert (array.shape, array.dtype) == (values.shape, values.dtype) and np.array_equal(read(array, stream), values)


def test_theirs_are_read_when_they_are_computed(library, stream):
    """The library has only queued the work when it hands the array over: reading waits for it."""
    # 20 products with it take a third of a second, and are exact
    mirrored = np.eye(8192, dtype=np.float32)[::-1].copy()
    factor = library.send(mirrored)
    result = factor
    try:
        for _ in range(20):
            # no two are alike, so that memory that is used again holds no right values
            result = (result @ factor) * 0.5
    except ImportError as e:
        pytest.skip(f"this installation cannot compute: {e}")  # CuPy takes cuBLAS from wherever there is one
    assert np.array_equal(read(as_device_array(result, stream), stream), mirrored * 0.5**20)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int32, np.uint8])
def test_ours_are_taken_and_outlive_us(library, stream, dtype):
    values = noise(dtype)
    source = cuda.DeviceBuffer(values.nbytes)
    source.upload(values, stream)
    before = len(device_array._exported)
    ours = queue_copy(source.pointer, values.shape, values.dtype, stream)
    stream.synchronize()
    taken = library.take(ours)
    del ours
    other = queue_copy(source.pointer, values.shape, values.dtype, stream)  # would get the memory if it had gone back
    zeros = np.zeros_like(values)
    other.owner.buffer.upload(zeros, stream)
    stream.synchronize()
    for array in taken:
        assert np.array_equal(library.values(array), values)
    assert len(device_array._exported) == before + 1
    del taken, array
    deadline = time.monotonic() + 5.0  # JAX may let go in a thread of its own
    while len(device_array._exported) > before and time.monotonic() < deadline:
        gc.collect()
    assert len(device_array._exported) == before
    source.close()
