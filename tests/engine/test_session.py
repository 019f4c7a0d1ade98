"""Sessions on the simulated GPU against onnxruntime on the same graph: same values, whatever the batch, the stream and the thread."""

import concurrent.futures
import dataclasses
import gc

import numpy as np
import onnxruntime
import pytest
import simulated_gpu
from engine_graphs import TOKENS, WIDTH, block

from vit_convert.engine.device_array import DeviceArray
from vit_convert.engine.pinned import is_pinned, pinned_array
from vit_convert.engine.pipelined import PipelinedSession
from vit_convert.engine.runtime import Engine
from vit_convert.engine.session import Session
from vit_convert.errors import BenchmarkError, BuildError

RANGE = ((2, TOKENS, WIDTH), (4, TOKENS, WIDTH), (6, TOKENS, WIDTH))
FIXED = ((4, TOKENS, WIDTH),) * 3


@pytest.fixture
def gpu(monkeypatch):
    return simulated_gpu.install(monkeypatch)


@pytest.fixture
def load(gpu, tmp_path):
    def make(ranges=(FIXED, RANGE), **options):
        graph = block(tmp_path / "model.onnx")
        return Engine(gpu[0], simulated_gpu.write_plan(tmp_path / "fp32.plan", graph, ranges, **options), onnx_path=graph)

    return make


def images(batch, seed=0):
    return np.random.default_rng(seed).normal(size=(batch, TOKENS, WIDTH)).astype(np.float32)


def expected(tmp_path, batch):
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    return session.run(None, {"images": batch})[0]


# 1 is padded to 2, 4 takes the fixed profile, 5 the range, 7 and 13 are split.
@pytest.mark.parametrize("batch", [1, 2, 4, 5, 6, 7, 13])
@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_any_batch_gives_what_the_graph_gives(load, tmp_path, batch, cuda_graphs):
    given = images(batch)
    with Session(load(), cuda_graphs=cuda_graphs) as session:
        for _ in range(2):  # the second run is a replay
            got = session.run(given)["logits"]
            assert got.shape == given.shape
            # onnxruntime computes both, but a padded batch may sum in another order: float32 rounding of values below 1.
            np.testing.assert_allclose(got, expected(tmp_path, given), atol=1e-6)


def test_graph_is_recorded_once_for_each_shape(load, gpu):
    with Session(load()) as session:
        assert session.prepare((4, TOKENS, WIDTH)) is session.prepare((4, TOKENS, WIDTH))
        before = gpu[1].launches
        for _ in range(3):
            session.run(images(4))
        assert gpu[1].launches == before + 3
        assert session.prepare((4, TOKENS, WIDTH)).index == 0 and session.prepare((5, TOKENS, WIDTH)).index == 1


def test_all_memory_is_given_back(load, gpu):
    engine = load()
    with Session(engine) as session:
        session.run(images(5))
        assert gpu[1].device
    with PipelinedSession(engine) as pipelined:
        list(pipelined.run([images(4), images(5)]))
    del pipelined, session
    gc.collect()
    assert not gpu[1].device and not gpu[1].queues and not gpu[1].pinned


def test_wrong_images_are_refused(load):
    with Session(load()) as session:
        with pytest.raises(BenchmarkError, match=r"given float64 \[4, 4, 8\], the engine takes float32 \[-1, 4, 8\]"):
            session.run(images(4).astype(np.float64))
        with pytest.raises(BenchmarkError, match=r"given float32 \[4, 8\]"):
            session.run(images(4)[:, 0])
        with pytest.raises(BenchmarkError, match=r"given float32 \[0, 4, 8\]"):
            session.run(images(0))
        with pytest.raises(BenchmarkError, match=r"\[4, 5, 8\]: the engine takes \[4, 4, 8\], or \[2, 4, 8\] to \[6, 4, 8\]"):
            session.run(np.zeros((4, 5, WIDTH), np.float32))


def test_failed_run_says_why(load):
    with Session(load(broken=True)) as session, pytest.raises(BenchmarkError, match=r"fp32\.plan: a run: simulated: a kernel failed"):
        session.run(images(4))


def test_plan_that_tensorrt_does_not_load(load):
    with pytest.raises(BuildError, match="does not load"):
        load(content=b"no plan")


def test_sidecar_is_checked_before_the_plan_is_read(load, gpu, tmp_path):
    load()
    older = dataclasses.replace(gpu[0], version="8.6.1")
    with pytest.raises(BuildError, match=r"built by tensorrt 8\.6\.0, here is 8\.6\.1"):
        Engine(older, tmp_path / "fp32.plan")


def test_too_large_an_engine_for_the_gpu(load):
    huge = (1 << 30, TOKENS, WIDTH)
    with pytest.raises(BuildError, match="cuMemAlloc_v2: CUDA error 2"):
        Session(load(ranges=[((1, TOKENS, WIDTH), (4, TOKENS, WIDTH), huge)]))


def test_gpu_arrays_in_and_out(load, tmp_path):
    given = images(3)
    source = pinned_array(given.shape, given.dtype)
    source[...] = given
    with Session(load()) as session:
        result = session.run(DeviceArray(source.ctypes.data, source.shape, source.dtype, source))["logits"]
        assert isinstance(result, DeviceArray) and result.__cuda_array_interface__["shape"] == (3, TOKENS, WIDTH)
        # The simulated GPU's memory is the host's, so the same bytes can be read as a CPU array.
        got = np.from_dlpack(dataclasses.replace(result, device=(1, 0)))
        np.testing.assert_allclose(got, expected(tmp_path, given), atol=1e-6)
        with pytest.raises(BenchmarkError, match="batch 7: the engine takes 6"):
            session.run(DeviceArray(source.ctypes.data, (7, TOKENS, WIDTH), source.dtype, source))


class OldInterface:
    """An array of a library that knows `__cuda_array_interface__` alone."""

    def __init__(self, array, **changes):
        about = {
            "shape": array.shape,
            "typestr": array.dtype.str,
            "data": (array.ctypes.data, False),
            "version": 3,
            "stream": 1,
            "strides": None,
        }
        self._array, self.__cuda_array_interface__ = array, {**about, **changes}


def test_cuda_array_interface(load, gpu, tmp_path):
    gpu[1].queues[1] = []  # the default stream
    given = images(4)
    with Session(load()) as session:
        got = np.from_dlpack(dataclasses.replace(session.run(OldInterface(given))["logits"], device=(1, 0)))
        np.testing.assert_allclose(got, expected(tmp_path, given), atol=1e-6)
        with pytest.raises(BenchmarkError, match="a strided view"):
            session.run(OldInterface(given, strides=(8, 4, 4)))
        with pytest.raises(BenchmarkError, match="list has neither"):
            session.run([1.0])


def test_threads_with_a_session_each(load, tmp_path):
    engine = load()

    def work(seed):
        with Session(engine) as session:
            return [session.run(images(batch, seed))["logits"] for batch in (1, 4, 5)]

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for seed, got in enumerate(pool.map(work, range(4))):
            for batch, value in zip((1, 4, 5), got):
                np.testing.assert_allclose(value, expected(tmp_path, images(batch, seed)), atol=1e-6)


@pytest.mark.parametrize("num_streams", [1, 2, 3])
def test_pipelined_results_come_in_order(load, tmp_path, num_streams):
    batches = [images(batch, seed) for seed, batch in enumerate((4, 4, 1, 6, 5, 4))]
    with PipelinedSession(load(), num_streams=num_streams) as session:
        for given, got in zip(batches, session.run(iter(batches)), strict=True):
            np.testing.assert_allclose(got["logits"], expected(tmp_path, given), atol=1e-6)


def test_pipelined_reads_pinned_batches_where_they_are(load, tmp_path):
    given = pinned_array((4, TOKENS, WIDTH), np.float32)
    given[...] = images(4)
    assert is_pinned(given) and not is_pinned(images(4))
    with PipelinedSession(load()) as session:
        (got,) = session.run([given])
        np.testing.assert_allclose(got["logits"], expected(tmp_path, given), atol=1e-6)
        assert not any(slot._staging for slot in session._slots)
        list(session.run([images(4)]))
        assert any(slot._staging for slot in session._slots)


def test_pipelined_can_be_left_early(load):
    with PipelinedSession(load()) as session:
        results = session.run(images(4, seed) for seed in range(5))
        next(results)
        results.close()
        with pytest.raises(BenchmarkError, match="batch 7: the engine takes 6"):
            list(session.run([images(7)]))


def test_pinned_memory_lives_as_long_as_a_view(gpu):
    view = pinned_array((8, 4), np.uint8)[2:]
    gc.collect()
    assert len(gpu[1].pinned) == 1
    del view
    gc.collect()
    assert not gpu[1].pinned
