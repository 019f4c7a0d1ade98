"""Sessions on the simulated GPU against onnxruntime on the same graph: same values, whatever the batch, the stream and
the thread."""

import concurrent.futures
import dataclasses
import gc
import threading

import numpy as np
import pytest
import simulated_gpu
from block_engine import RANGE, expected, images
from engine_graphs import TOKENS, WIDTH, block

from vit_convert.core.errors import BenchmarkError, BuildError
from vit_convert.engine.backend import cuda, log_capture
from vit_convert.engine.runtime.device_array import DeviceArray
from vit_convert.engine.runtime.engine import Engine
from vit_convert.engine.runtime.pinned import pinned_array
from vit_convert.engine.runtime.pipelined import PipelinedSession
from vit_convert.engine.runtime.session import Session


# 1 is padded to 2, 4 takes the fixed profile, 5 the range, 7 and 13 are split.
@pytest.mark.parametrize("batch", [1, 2, 4, 5, 6, 7, 13])
@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_any_batch_gives_what_the_graph_gives(load, tmp_path, batch, cuda_graphs):
    given = images(batch)
    with Session(load(), cuda_graphs=cuda_graphs) as session:
        for _ in range(2):  # the second run is a replay
            got = session.run(given)["logits"]
            assert got.shape == given.shape
            # onnxruntime computes both, but a padded batch may sum in another order: float32 rounding of values below
            # 1.
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
    assert not gpu[1].device and not gpu[1].queues and not gpu[1].pinned and not gpu[1].graphs


def test_nothing_is_recorded_before_the_first_run_has_ended(load, gpu, monkeypatch):
    """Which loads kernels and allocates; its failure is then not taken for one of the recording."""
    begin, waiting = gpu[1].cuStreamBeginCapture_v2, []

    def spied(stream, mode):
        waiting.append(len(gpu[1].queues[stream.value]))
        return begin(stream, mode)

    monkeypatch.setattr(gpu[1], "cuStreamBeginCapture_v2", spied)
    with Session(load()) as session:
        session.run(images(4))
        session.run(images(5))
    assert waiting == [0, 0]


def results_in_device_memory(gpu, session):
    own = {session.input_buffer.pointer, session._workspace.pointer}
    return len(set(gpu[1].device) - own)


def test_few_shapes_stay_ready(load, gpu, tmp_path):
    with Session(load(), max_shapes=2) as session:
        for batch in (2, 3, 4, 5, 6, 2, 5, 3):
            np.testing.assert_allclose(
                session.run(images(batch))["logits"], expected(tmp_path, images(batch)), atol=1e-6
            )
            assert results_in_device_memory(gpu, session) <= 2
        five = session.prepare((5, TOKENS, WIDTH))  # 3 is now the one not used for longest
        session.run(images(6))
        assert session.prepare((5, TOKENS, WIDTH)) is five
        assert set(session._prepared) == {(5, TOKENS, WIDTH), (6, TOKENS, WIDTH)}


@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_shape_in_use_outlives_its_place(load, gpu, tmp_path, cuda_graphs):
    given = images(5)
    with Session(load(), cuda_graphs=cuda_graphs, max_shapes=1) as session:
        five = session.prepare(given.shape)
        session.run(images(6))
        assert results_in_device_memory(gpu, session) == 2
        session.input_buffer.upload(given, session.stream)
        session.launch(five)
        got = np.empty(given.shape, np.float32)
        five.outputs["logits"][2].download(got, session.stream)
        session.stream.synchronize()
        np.testing.assert_allclose(got, expected(tmp_path, given), atol=1e-6)
        del five
        assert results_in_device_memory(gpu, session) == 1


def test_gpu_result_outlives_its_shapes_place(load, gpu, tmp_path):
    given = images(5)
    with Session(load(), max_shapes=1) as session:
        result = session.run(DeviceArray(given.ctypes.data, given.shape, given.dtype, given))["logits"]
        session.run(images(6))
        got = np.from_dlpack(dataclasses.replace(result, device=(1, 0)))
        np.testing.assert_allclose(got, expected(tmp_path, given), atol=1e-6)
        assert result.pointer in gpu[1].device
        pointer = result.pointer
        del got, result
        gc.collect()
        assert pointer not in gpu[1].device


@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_gpu_results_are_the_callers_own(load, gpu, tmp_path, cuda_graphs):
    """Another library reads when its own stream gets there, which may be long after the next run."""
    first, second = images(4), images(4, seed=1)
    reader = cuda.Stream()
    with Session(load(), cuda_graphs=cuda_graphs) as session:
        result = session.run(DeviceArray(first.ctypes.data, first.shape, first.dtype, first))["logits"]
        got = cuda.DeviceBuffer(result.num_bytes)
        got.copy_from(result.pointer, result.num_bytes, reader)
        later = session.run(DeviceArray(second.ctypes.data, second.shape, second.dtype, second))["logits"]
        assert later.pointer != result.pointer
        reader.synchronize()
        values = np.empty(first.shape, np.float32)
        got.download(values, reader)
        reader.synchronize()
        np.testing.assert_allclose(values, expected(tmp_path, first), atol=1e-6)


def test_failed_gpu_run_leaves_nothing_queued(load, gpu, monkeypatch):
    """Neither its images nor its results may be freed while the stream still copies them."""
    given = images(4)
    with Session(load()) as session:
        session.prepare(given.shape)
        before = dict(gpu[1].device)
        monkeypatch.setattr(gpu[1], "cuMemAlloc_v2", lambda pointer, num_bytes: 2)
        with pytest.raises(BuildError, match="cuMemAlloc_v2: CUDA error 2"):
            session.run(DeviceArray(given.ctypes.data, given.shape, given.dtype, given))
        assert gpu[1].queues[session.stream.handle] == [] and gpu[1].device == before


def test_a_graph_that_records_and_does_not_run_is_not_used(load, gpu, tmp_path, monkeypatch):
    """The GPU finds out while it runs: waited for before the graph stands for a run that somebody asks for."""
    fails, synchronize = [], gpu[1].cuStreamSynchronize
    monkeypatch.setattr(gpu[1], "cuGraphLaunch", lambda graph, stream: fails.append(700) or 0)
    monkeypatch.setattr(gpu[1], "cuStreamSynchronize", lambda stream: fails.pop() if fails else synchronize(stream))
    with Session(load()) as session:
        prepared = session.prepare(images(4).shape)
        assert prepared.graph is None and "cuStreamSynchronize: CUDA error 700" in prepared.why_no_graph
        given = images(4)
        np.testing.assert_allclose(session.run(given)["logits"], expected(tmp_path, given), atol=1e-6)


def test_gpu_result_outlives_its_session(load, gpu, tmp_path):
    given = images(5)
    with Session(load()) as session:
        result = session.run(DeviceArray(given.ctypes.data, given.shape, given.dtype, given))["logits"]
    got = np.from_dlpack(dataclasses.replace(result, device=(1, 0)))
    np.testing.assert_allclose(got, expected(tmp_path, given), atol=1e-6)
    assert list(gpu[1].device) == [result.pointer]  # all else has gone
    del got, result, session
    gc.collect()
    assert not gpu[1].device


def test_session_that_does_not_fit_leaves_nothing(load, gpu, monkeypatch):
    engine = load()
    monkeypatch.setattr(simulated_gpu.CudaEngine, "device_memory_size", 1 << 40)
    with pytest.raises(BuildError, match="cuMemAlloc_v2: CUDA error 2"):
        Session(engine)
    assert not gpu[1].device and not gpu[1].queues


def test_shape_that_cannot_be_prepared_leaves_nothing(load, gpu):
    with Session(load(broken=True)) as session:
        for _ in range(2):
            with pytest.raises(BenchmarkError, match="a kernel failed"):
                session.run(images(4))
        assert results_in_device_memory(gpu, session) == 0
    assert not gpu[1].device and not gpu[1].queues


def test_a_session_may_be_closed_twice(load, gpu):
    session = Session(load())
    session.run(images(4))
    session.close()
    session.close()
    assert not gpu[1].device and not gpu[1].queues


@pytest.mark.parametrize("prepared", [True, False])
def test_a_closed_session_is_refused(load, gpu, prepared):
    with Session(load()) as session:
        if prepared:
            session.prepare((4, TOKENS, WIDTH))
    given = images(4)
    for use in (
        lambda: session.run(given),
        lambda: session.run(DeviceArray(given.ctypes.data, given.shape, given.dtype, given)),
        lambda: session.prepare(given.shape),
    ):
        with pytest.raises(BenchmarkError, match=r"fp32\.plan: the session is closed"):
            use()
    assert not gpu[1].device and not gpu[1].queues


def test_closing_waits_for_a_run_in_another_thread(load, gpu, tmp_path, monkeypatch):
    session, given = Session(load()), images(4)
    session.prepare(given.shape)
    running, go_on = threading.Event(), threading.Event()
    launch = session.launch

    def slowly(prepared):
        running.set()
        go_on.wait(10)
        launch(prepared)

    monkeypatch.setattr(session, "launch", slowly)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        result = pool.submit(session.run, given)
        running.wait(10)
        closing = pool.submit(session.close)
        with pytest.raises(concurrent.futures.TimeoutError):
            closing.result(0.2)
        assert session.stream.handle in gpu[1].queues
        go_on.set()
        closing.result()
        np.testing.assert_allclose(result.result()["logits"], expected(tmp_path, given), atol=1e-6)
    assert not gpu[1].device and not gpu[1].queues


def test_wrong_images_are_refused(load):
    with Session(load()) as session:
        with pytest.raises(BenchmarkError, match=r"given float64 \[4, 4, 8\], the engine takes float32 \[-1, 4, 8\]"):
            session.run(images(4).astype(np.float64))
        with pytest.raises(BenchmarkError, match=r"given float32 \[4, 8\]"):
            session.run(images(4)[:, 0])
        with pytest.raises(BenchmarkError, match=r"given float32 \[0, 4, 8\]"):
            session.run(images(0))
        with pytest.raises(BenchmarkError, match=r"given float32 \[0, 4, 8\]"):
            session.run(DeviceArray(0, (0, TOKENS, WIDTH), np.dtype(np.float32)))
        with pytest.raises(BenchmarkError, match=r"given float32 \[\], the engine takes"):
            session.run(DeviceArray(0, (), np.dtype(np.float32)))
        with pytest.raises(
            BenchmarkError, match=r"\[4, 5, 8\]: the engine takes \[4, 4, 8\], or \[2, 4, 8\] to \[6, 4, 8\]"
        ):
            session.require_images((4, 5, WIDTH), np.dtype(np.float32))


def test_failed_run_says_why(load):
    with (
        Session(load(broken=True)) as session,
        pytest.raises(BenchmarkError, match=r"fp32\.plan: a run: simulated: a kernel failed"),
    ):
        session.run(images(4))


def test_every_failed_run_says_its_own_reason(load, monkeypatch):
    with Session(load(), cuda_graphs=False) as session:
        session.run(images(4))
        for reason in ("first", "second"):

            def fail(context, stream, reason=reason):
                context._engine.logger.log(0, reason)
                return False

            monkeypatch.setattr(simulated_gpu.Context, "execute_async_v3", fail)
            with pytest.raises(BenchmarkError, match=rf"fp32\.plan: a run: {reason}$"):
                session.run(images(4))


@pytest.mark.parametrize("during", ["deserialize", "create_context", "warm_up"])
def test_interrupt_while_tensorrt_speaks_is_not_lost(load, gpu, monkeypatch, during):
    """Python delivers Ctrl-C where its code runs next, which may be in TensorRT's logger."""

    def interrupted(heard, text):
        raise KeyboardInterrupt

    def speaking(function):
        def speak(*arguments):
            gpu[0].logger.log(gpu[0].module.ILogger.WARNING, "slow")
            return function(*arguments)

        return speak

    owner, name = {
        "deserialize": (gpu[0].module.Runtime, "deserialize_cuda_engine"),
        "create_context": (simulated_gpu.CudaEngine, "create_execution_context_without_device_memory"),
        "warm_up": (simulated_gpu.Context, "execute_async_v3"),
    }[during]
    monkeypatch.setattr(log_capture.Heard, "hear_warning", interrupted)
    monkeypatch.setattr(owner, name, speaking(getattr(owner, name)))
    with pytest.raises(KeyboardInterrupt), Session(load()) as session:
        session.run(images(4))
    gc.collect()
    assert not gpu[1].device and not gpu[1].queues


def test_plan_that_tensorrt_does_not_load(load):
    with pytest.raises(BuildError, match="does not load"):
        load(content=b"no plan")


def test_a_host_without_a_gpu_says_so(gpu, tmp_path):
    simulated_gpu.write_plan(tmp_path / "fp32.plan", block(tmp_path / "model.onnx"), [RANGE])
    with pytest.raises(BuildError, match=r"fp32\.plan: engines run only on a GPU, and this host has none") as caught:
        Engine(dataclasses.replace(gpu[0], gpu=None), tmp_path / "fp32.plan")
    assert "NVIDIA GPU" in caught.value.fix


def test_sidecar_is_checked_before_the_plan_is_read(gpu, tmp_path):
    simulated_gpu.write_plan(tmp_path / "fp32.plan", block(tmp_path / "model.onnx"), [RANGE], content=b"no plan")
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
