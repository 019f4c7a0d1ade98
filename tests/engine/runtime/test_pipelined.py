"""Pipelined sessions on the simulated GPU: results in the order of their batches, whatever fails, and page-locked
memory."""

import concurrent.futures
import gc
import threading

import numpy as np
import pytest
from block_engine import expected, images
from engine_graphs import TOKENS, WIDTH

from vit_convert.core.errors import BenchmarkError, BuildError
from vit_convert.engine.backend import cuda
from vit_convert.engine.runtime.pinned import is_pinned, pinned_array
from vit_convert.engine.runtime.pipelined import PipelinedSession


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
        assert not any("images" in slot._memory for slot in session._slots)
        list(session.run([images(4)]))
        assert any("images" in slot._memory for slot in session._slots)


def test_pipelined_can_be_left_early(load):
    with PipelinedSession(load()) as session:
        results = session.run(images(4, seed) for seed in range(5))
        next(results)
        results.close()
        with pytest.raises(BenchmarkError, match="batch 7: the engine takes 6"):
            list(session.run([images(7)]))


@pytest.mark.parametrize("go_on", [False, True])
def test_pipelined_results_may_outlive_their_session(load, gpu, monkeypatch, go_on):
    waited = []
    wait = cuda.Stream.synchronize
    monkeypatch.setattr(
        cuda.Stream, "synchronize", lambda stream: waited.append(stream.handle in gpu[1].queues) or wait(stream)
    )
    with PipelinedSession(load()) as session:
        results = session.run(images(4, seed) for seed in range(5))
        next(results)
    assert not gpu[1].device and not gpu[1].queues
    if go_on:
        with pytest.raises(BenchmarkError, match="the session is closed"):
            next(results)
    results.close()
    assert all(waited)  # on streams that were still there


def test_pipelined_that_does_not_fit_leaves_nothing(load, gpu, monkeypatch):
    engine, allocate, blocks = load(), gpu[1].cuMemAlloc_v2, []

    def run_out(pointer, num_bytes):
        blocks.append(num_bytes)
        # images and workspace of the first session, images of the second
        return allocate(pointer, num_bytes) if len(blocks) < 4 else 2

    monkeypatch.setattr(gpu[1], "cuMemAlloc_v2", run_out)
    with pytest.raises(BuildError, match="cuMemAlloc_v2: CUDA error 2"):
        PipelinedSession(engine)
    assert not gpu[1].device and not gpu[1].queues


def test_pipelined_closes_every_session_when_one_fails(load, gpu, monkeypatch):
    session = PipelinedSession(load(), num_streams=3)
    broken, wait = session._slots[1].session.stream.handle, gpu[1].cuStreamSynchronize
    monkeypatch.setattr(gpu[1], "cuStreamSynchronize", lambda stream: 700 if stream.value == broken else wait(stream))
    with pytest.raises(BuildError, match="cuStreamSynchronize: CUDA error 700"):
        session.close()
    assert not gpu[1].device and not gpu[1].queues


@pytest.mark.parametrize("num_streams", [1, 2, 3])
def test_pipelined_gives_what_is_in_flight_before_an_error(load, tmp_path, num_streams):
    good = [images(batch, seed) for seed, batch in enumerate((4, 1, 5))]

    def broken_source():
        yield from good
        raise OSError("damaged image")

    with PipelinedSession(load(), num_streams=num_streams) as session:
        for batches, error, message in (
            ([*good, images(7)], BenchmarkError, "batch 7: the engine takes 6"),
            (broken_source(), OSError, "damaged image"),
        ):
            got = []
            with pytest.raises(error, match=message):
                for result in session.run(batches):
                    got.append(result["logits"])
            assert len(got) == len(good)
            for given, value in zip(good, got):
                np.testing.assert_allclose(value, expected(tmp_path, given), atol=1e-6)


def test_pipelined_gives_no_result_in_place_of_a_lost_one(load, monkeypatch):
    with PipelinedSession(load()) as session:
        results = session.run(images(4, seed) for seed in range(4))
        next(results)
        wait = session._slots[1].session.stream

        def lose():
            raise BuildError("lost")

        with monkeypatch.context() as patched:
            patched.setattr(wait, "synchronize", lose)
            with pytest.raises(BuildError, match="lost"):
                next(results)
        assert list(results) == []


def test_pipelined_keeps_one_block_of_host_memory_for_all_shapes(load, gpu):
    with PipelinedSession(load(), num_streams=1) as session:
        list(session.run(images(batch) for batch in (6, 5, 4, 3, 2, 6)))
        gc.collect()
        assert len(gpu[1].pinned) == 2  # images and logits


def test_pinned_memory_lives_as_long_as_a_view(gpu):
    view = pinned_array((8, 4), np.uint8)[2:]
    gc.collect()
    assert len(gpu[1].pinned) == 1
    del view
    gc.collect()
    assert not gpu[1].pinned


def test_a_thread_gets_the_context_before_anything_is_copied(load, gpu, tmp_path, monkeypatch):
    """CUDA refuses copies in a thread that has none; a server's thread may be new, and its shape long prepared."""
    given, driver, current = images(4), gpu[1], threading.local()

    def get(context):
        context._obj.value = getattr(current, "context", None)
        return 0

    def needs_one(function):
        return lambda *arguments: function(*arguments) if getattr(current, "context", None) else 201

    with PipelinedSession(load()) as session, monkeypatch.context() as patched:
        list(session.run([given, given]))
        patched.setattr(driver, "cuCtxGetCurrent", get)
        patched.setattr(driver, "cuCtxSetCurrent", lambda context: setattr(current, "context", 1) or 0)
        for name in ("cuMemcpyHtoDAsync_v2", "cuMemcpyDtoHAsync_v2", "cuGraphLaunch"):
            patched.setattr(driver, name, needs_one(getattr(driver, name)))
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            (got,) = pool.submit(lambda: list(session.run([given]))).result()
        np.testing.assert_allclose(got["logits"], expected(tmp_path, given), atol=1e-6)
