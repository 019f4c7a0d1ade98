"""Real TensorRT on a real GPU: the engines of a bundle that was exported elsewhere are run and timed here.

    VIT_CONVERT_BUNDLE=path/of/a/bundle VIT_CONVERT_RESULTS=results.json python -m pytest -m gpu tests/gpu

Needs what test_build_on_gpu.py does.
"""

import contextlib
import ctypes
import dataclasses
import shutil
import threading
import types

import numpy as np
import pytest
from gpu_bundle import BACKEND, tiled

from vit_convert.core.bundle import Bundle, hash_file, read_json, write_json
from vit_convert.core.compare import compare
from vit_convert.core.errors import BenchmarkError, BuildError
from vit_convert.engine.backend import cuda
from vit_convert.engine.builder.fused_kernels import fused_attention_by_kernels
from vit_convert.engine.measure.loops import Worker, measure_latency, measure_throughput
from vit_convert.engine.measure.monitor import Monitor
from vit_convert.engine.runtime.cuda_graph import CudaGraph
from vit_convert.engine.runtime.device_array import DeviceArray
from vit_convert.engine.runtime.engine import Engine
from vit_convert.engine.runtime.pinned import is_pinned, pinned_array
from vit_convert.engine.runtime.pipelined import PipelinedSession
from vit_convert.engine.runtime.session import Session
from vit_convert.serve.session import FallbackSession

pytestmark = pytest.mark.gpu


def test_cuda_layer():
    stream, begin, end = cuda.Stream(), cuda.Event(), cuda.Event()
    before = cuda.free_memory_bytes()
    given = pinned_array((1 << 24,), np.uint8)
    given[...] = np.arange(given.size, dtype=np.uint8)
    assert is_pinned(given) and not is_pinned(np.zeros(4096, np.uint8))
    first, second = cuda.DeviceBuffer(given.nbytes), cuda.DeviceBuffer(given.nbytes)
    assert before - cuda.free_memory_bytes() >= 2 * given.nbytes
    got = np.zeros_like(given)
    first.upload(given, stream)
    graph = CudaGraph(stream, lambda: second.copy_from(first.pointer, given.nbytes, stream))
    begin.record(stream)
    graph.launch(stream)
    end.record(stream)
    second.download(got, stream)
    stream.synchronize()
    assert np.array_equal(got, given)
    assert 0 < begin.elapsed_ms(end) < 1000
    for thing in (graph, begin, end, first, second, stream):
        thing.close()


def test_every_batch_matches_the_reference(engine, facts, reference):
    expected = reference[facts.output]
    scale = np.abs(expected).max()
    with Session(engine) as session:
        # 16 has a profile of its own, 1..8 the range, 9 is padded to 16, 40 is split.
        for batch in (1, 2, 5, 8, 9, 16, 40):
            got = session.run(tiled(reference, batch))[facts.output]
            wanted = expected[np.arange(batch) % len(expected)]
            # fp32 with TF32 off: 1e-3 of the scale, as verification demands.
            np.testing.assert_allclose(got, wanted, atol=1e-3 * scale, rtol=0)


def test_a_replayed_graph_gives_the_same_bits(engine, facts, reference):
    with Session(engine) as replayed, Session(engine, cuda_graphs=False) as plain:
        for batch in (1, 5, 16):
            prepared = replayed.prepare((batch, *reference["images"].shape[1:]))
            assert prepared.graph is not None, prepared.why_no_graph
            images = tiled(reference, batch)
            assert np.array_equal(replayed.run(images)[facts.output], plain.run(images)[facts.output])
        # Shapes that take turns do not disturb each other's recorded graphs.
        for batch in (5, 1, 16, 7, 5, 1):
            images = tiled(reference, batch)
            assert np.array_equal(replayed.run(images)[facts.output], plain.run(images)[facts.output])


def test_threads_with_a_session_each(engine, facts, reference):
    images = tiled(reference, 5)
    with Session(engine) as session:
        expected = session.run(images)[facts.output]
    results: dict[int, list[np.ndarray]] = {}

    def work(number):
        with Session(engine) as session:
            results[number] = [session.run(images)[facts.output] for _ in range(20)]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 3 and all(np.array_equal(got, expected) for found in results.values() for got in found)


def test_gpu_arrays_in_and_out(engine, facts, reference):
    images = np.ascontiguousarray(tiled(reference, 4))
    stream = cuda.Stream()
    source = cuda.DeviceBuffer(images.nbytes)
    source.upload(images, stream)
    stream.synchronize()
    own = DeviceArray(source.pointer, images.shape, images.dtype, source)
    interface = {"shape": images.shape, "typestr": images.dtype.str, "data": (source.pointer, True), "version": 3}
    another = types.SimpleNamespace(__cuda_array_interface__=interface)  # as CuPy and Numba give theirs
    with Session(engine) as session:
        for given in (own, another):
            result = session.run(given)[facts.output]
            got = np.empty(result.shape, result.dtype)
            target = cuda.DeviceBuffer(result.num_bytes)
            target.copy_from(result.pointer, result.num_bytes, stream)
            target.download(got, stream)
            stream.synchronize()
            assert np.array_equal(got, session.run(images)[facts.output])


class LateReader:
    """Reads a GPU array on a stream of its own, a tenth of a second or more after it was asked to, as another library's
    kernels may."""

    def __init__(self, num_bytes):
        self._stream, self._copy = cuda.Stream(), cuda.DeviceBuffer(num_bytes)
        self._busy = cuda.DeviceBuffer(1 << 28), cuda.DeviceBuffer(1 << 28)

    def ask(self, array):
        for _ in range(500):
            self._busy[0].copy_from(self._busy[1].pointer, self._busy[1].num_bytes, self._stream)
        self._copy.copy_from(array.pointer, array.num_bytes, self._stream)

    def has_read(self):
        status = cuda.status_of("cuStreamQuery", ctypes.c_void_p(self._stream.handle))
        assert status in (0, 600)  # 600: CUDA_ERROR_NOT_READY
        return status == 0

    def read(self, like):
        values = np.empty_like(like)
        self._copy.download(values, self._stream)
        self._stream.synchronize()
        return values

    def close(self):
        for thing in (self._stream, self._copy, *self._busy):
            thing.close()


def test_gpu_results_wait_for_who_reads_them(engine, facts, reference):
    """Neither the next run's write nor the return of the memory may come before what another stream has queued."""
    stream, given = cuda.Stream(), np.ascontiguousarray(tiled(reference, 4))
    source = cuda.DeviceBuffer(given.nbytes)
    images = DeviceArray(source.pointer, given.shape, given.dtype, source)
    source.upload(given, stream)
    stream.synchronize()
    with Session(engine) as session, contextlib.closing(LateReader(session.run(given)[facts.output].nbytes)) as reader:
        expected, other = session.run(given)[facts.output], session.run(given[::-1])[facts.output]
        assert not np.array_equal(expected, other)
        result = session.run(images)[facts.output]
        source.upload(np.ascontiguousarray(given[::-1]), stream)
        stream.synchronize()
        reader.ask(result)
        session.run(images)
        assert np.array_equal(reader.read(expected), expected)
        reader.ask(result)
        assert not reader.has_read()
        del result
        assert reader.has_read() and np.array_equal(reader.read(expected), expected)
    source.close()
    stream.close()


@pytest.mark.parametrize("library", ["torch", "cupy"])
@pytest.mark.parametrize("batch", [1, 4])
def test_arrays_of_other_libraries_in_and_out(engine, facts, reference, library, batch, record_property):
    module, values = pytest.importorskip(library), tiled(reference, batch)
    if library == "torch" and not module.cuda.is_available():
        pytest.skip("this PyTorch does not use the GPU")
    record_property("version", module.__version__)
    images = module.from_numpy(values).cuda() if library == "torch" else module.asarray(values)
    with Session(engine) as session:
        result = session.run(images)[facts.output]
        taken = module.from_dlpack(result)
        expected = session.run(values)[facts.output]
        assert np.array_equal(taken.cpu().numpy() if library == "torch" else taken.get(), expected)
        with pytest.raises(BufferError, match="copy=True"):
            result.__dlpack__(copy=True)
        with pytest.raises(BenchmarkError, match=r"given float32 \[0, "):
            session.run(images[:0])


def test_closed_sessions_are_refused(engine, reference):
    images = tiled(reference, 4)
    with Session(engine) as session, PipelinedSession(engine) as pipelined:
        session.run(images)
        results = pipelined.run(images for _ in range(5))
        next(results)
    with pytest.raises(BenchmarkError, match="the session is closed"):
        session.run(images)
    with pytest.raises(BenchmarkError, match="the session is closed"):
        next(results)


def test_pipelined_results_come_in_order(engine, facts, reference):
    batches = [np.roll(tiled(reference, 8), shift, axis=0) for shift in range(12)]
    pinned = [pinned_array(batch.shape, batch.dtype) for batch in batches[:6]]
    for array, batch in zip(pinned, batches):
        array[...] = batch
    with Session(engine) as plain, PipelinedSession(engine) as pipelined:
        for given, got in zip(batches, pipelined.run([*pinned, *batches[6:]]), strict=True):
            assert np.array_equal(got[facts.output], plain.run(given)[facts.output])


def test_kernels_are_named(engine):
    for row in fused_attention_by_kernels(engine):
        assert row["kernels"] > 10 and "of" in row["text"], row


def test_latency_and_throughput_agree(engine, facts):
    with Session(engine) as session, Monitor() as monitor:
        workers = [Worker(session, engine.ranges[-1].optimal, transfers=False)]
        rate, latency = measure_throughput(workers, 0.5), measure_latency(workers, 0.5)
        # Queued runs cannot be slower than single ones; a tenth is left for a clock that moves.
        assert rate >= 0.9 * workers[0].batch / (np.median(latency.wall_ms) / 1e3)
    assert monitor.missing or monitor.summary()["sm_clock_mhz"] > 0


def test_an_engine_of_another_version_is_refused(built):
    with pytest.raises(BuildError, match="built by tensorrt"):
        Engine(dataclasses.replace(BACKEND, version="0.0.1"), built["fp32"])


def test_a_damaged_plan_with_a_matching_sidecar_is_refused(built, tmp_path):
    path = tmp_path / "fp32.plan"
    path.write_bytes(built["fp32"].read_bytes()[:1000])
    sidecar = read_json(f"{built['fp32']}.json")
    write_json(f"{path}.json", {**sidecar, "plan": {"bytes": 1000, "sha256": hash_file(path)}})
    with pytest.raises(BuildError, match="does not load"):
        Engine(BACKEND, path)


@pytest.mark.parametrize("damaged", [True, False])
def test_rollback_goes_on_with_the_model(bundle, built, facts, reference, tmp_path, damaged):
    """An engine that does not load, and one that fails in a run: the same images give the same values as before, by
    onnxruntime."""
    pytest.importorskip("onnxruntime")
    copy = Bundle(shutil.copytree(bundle.root, tmp_path / "bundle"))
    plan, images = copy.root / built["fp32"].relative_to(bundle.root), tiled(reference, 4)
    if damaged:
        plan.write_bytes(plan.read_bytes()[:-1])
    session = FallbackSession(copy, plan, backend="tensorrt")
    wanted = reference[facts.output][np.arange(4) % len(reference["images"])]
    if not damaged:
        assert compare(wanted, session.run(images)[facts.output]).cosine > 0.99999 and session.runs_on == "tensorrt"
        session._runner.close()  # as a GPU that is lost: every later call of the engine fails
    assert compare(wanted, session.run(images)[facts.output]).cosine > 0.99999
    assert session.runs_on == "onnxruntime" and ("sha256" if damaged else "closed") in session.reason
    session.close()
