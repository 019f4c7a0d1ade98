"""The measuring loops on a GPU of the test's own, whose clock stands still but for what is done by it, and on the
simulated one."""

import threading
import types

import numpy as np
import pytest
from block_engine import FIXED, expected

from vit_convert.engine.backend.cuda import DeviceBuffer
from vit_convert.engine.measure import loops as measure
from vit_convert.engine.measure.loops import MIN_RUNS, QUEUED, Worker, measure_latency, measure_throughput, noise
from vit_convert.engine.runtime.session import Session

MS = 1 / 1024  # s: binary fractions, so that sums are exact; the loops' own factor of 1e3 makes 1000 / 1024 of it
LAUNCH, WAKE = 1 * MS, 0.5 * MS  # of the CPU: to queue a run, and to see that it is done


class Machine:
    """Threads that each have a CPU and a GPU of their own; a thread's time is what it has done."""

    def __init__(self, monkeypatch, run_ms, begins_ms=(0.0, 0.0)):
        self.run_ms, self.begins = run_ms, dict(zip(run_ms, begins_ms))
        self.own, self.open_events, self.started = threading.local(), set(), []
        monkeypatch.setattr(measure, "time", types.SimpleNamespace(perf_counter=lambda: self.own.now))
        monkeypatch.setattr(measure, "cuda", types.SimpleNamespace(Event=lambda: Event(self), use_context=lambda: None))

    def worker(self, name, batch):
        machine = self

        class FakeWorker:
            def __init__(self):
                self.batch, self.flying, self.most, self.idle = batch, [], 0, 0.0
                self.session = types.SimpleNamespace(stream=types.SimpleNamespace(synchronize=machine.wait))

            def enqueue(self):
                own = machine.own
                self.flying = [end for end in self.flying if end > own.now]
                own.now += LAUNCH
                begin = max(own.now, own.busy_until)
                self.idle += begin - own.busy_until if self.most else 0.0
                own.busy_until = begin + machine.run_ms[name] * MS
                self.flying.append(own.busy_until)
                self.most = max(self.most, len(self.flying))

        worker = FakeWorker()
        worker.begin = lambda: (
            setattr(self.own, "now", self.begins[name] * MS),
            setattr(self.own, "busy_until", self.begins[name] * MS),
        )
        return worker

    def wait(self):
        self.own.now = max(self.own.now, self.own.busy_until) + WAKE


class Event:
    def __init__(self, machine):
        self.machine = machine
        machine.open_events.add(self)

    def record(self, stream):
        self.time = max(self.machine.own.now, self.machine.own.busy_until)

    def synchronize(self):
        own = self.machine.own
        own.now = max(own.now, self.time) + WAKE

    def elapsed_ms(self, end):
        return 1e3 * (end.time - self.time)

    def close(self):
        self.machine.open_events.remove(self)


@pytest.fixture
def begun(monkeypatch):
    """Each thread's clock is set before its loop begins."""
    for name in ("_closed_loop", "_queued_loop"):
        loop = getattr(measure, name)
        monkeypatch.setattr(
            measure, name, lambda worker, seconds, loop=loop: (worker.begin(), loop(worker, seconds))[1]
        )


# Of a run of 3 ms, one is launched (1), done (3) and seen (0.5): 4.5 by the CPU's clock and 4 by the GPU's, which waits
# for the launch.
@pytest.mark.parametrize(("seconds", "runs"), [(0.0, 10), (45 * MS, 10), (45.5 * MS, 11), (90 * MS, 20), (91 * MS, 21)])
def test_latency_of_one_run_at_a_time(monkeypatch, begun, seconds, runs):
    machine = Machine(monkeypatch, {"a": 3.0})
    worker = machine.worker("a", 8)
    latency = measure_latency([worker], seconds)
    assert latency.wall_ms.tolist() == [1e3 * 4.5 * MS] * runs and latency.gpu_ms.tolist() == [1e3 * 4 * MS] * runs
    assert worker.most == 1 and machine.open_events == set()


def test_latencies_of_all_streams(monkeypatch, begun):
    machine = Machine(monkeypatch, {"a": 3.0, "b": 5.0})
    latency = measure_latency([machine.worker("a", 8), machine.worker("b", 8)], 65 * MS)
    a, b = -(-65 * 2 // 9), MIN_RUNS  # of 4.5 ms and 6.5 ms each, as many as begin in time
    assert latency.wall_ms.tolist() == [1e3 * 4.5 * MS] * a + [1e3 * 6.5 * MS] * b
    assert latency.gpu_ms.tolist() == [1e3 * 4 * MS] * a + [1e3 * 6 * MS] * b


@pytest.mark.parametrize(("seconds", "runs"), [(0.0, MIN_RUNS), (98.5 * MS, 26), (98.75 * MS, 27)])
def test_throughput_of_a_gpu_that_never_waits(monkeypatch, begun, seconds, runs):
    machine = Machine(monkeypatch, {"a": 4.0})
    worker = machine.worker("a", 8)
    rate = measure_throughput([worker], seconds)
    # Runs of 4 ms are queued by 1, 2, 6.5, 10.5, … ms: from the third on, each 1 ms after the one two before it was
    # seen to be done (5, 9, … and 0.5 to see it); so the time is asked for run 26 at 4 · 26 - 5.5 = 98.5 ms.
    assert rate == pytest.approx(8 * runs / ((1 + 4 * runs + 0.5) * MS), rel=1e-12)
    assert worker.most == QUEUED == 2 and worker.idle == 0.0 and machine.open_events == set()


def test_streams_share_the_time_from_the_first_begin_to_the_last_end(monkeypatch, begun):
    machine = Machine(monkeypatch, {"a": 4.0, "b": 8.0}, begins_ms=(2.0, 16.0))
    rate = measure_throughput([machine.worker("a", 8), machine.worker("b", 1)], 0.0)
    begin, end = 2.0, 16.0 + 1 + 8 * MIN_RUNS + 0.5
    assert rate == pytest.approx((8 * MIN_RUNS + 1 * MIN_RUNS) / ((end - begin) * MS), rel=1e-12)


def test_no_stream_begins_before_all_are_there(monkeypatch):
    """Each waits at a barrier for as many as there are, and then has the context of the GPU, before it runs."""
    order = []

    class Barrier:
        def __init__(self, parties):
            order.append(parties)

        def wait(self):
            order.append((threading.get_ident(), "waits"))

    monkeypatch.setattr(measure.threading, "Barrier", Barrier)
    monkeypatch.setattr(measure.cuda, "use_context", lambda: order.append((threading.get_ident(), "context")))
    found = measure._at_once("ab", lambda worker: order.append((threading.get_ident(), "runs")) or worker)
    assert found == ["a", "b"] and order.pop(0) == 2
    threads = {thread for thread, _ in order}
    assert [[what for thread, what in order if thread == one] for one in threads] in (
        [["waits", "context", "runs"]] * 2,
        [["waits", "context", "runs"] * 2],  # one thread of the pool was done before the other was needed
    )


@pytest.fixture
def copies(monkeypatch):
    """What is copied to and from the GPU, in order."""
    found = []
    for name in ("upload", "download"):
        real = getattr(DeviceBuffer, name)

        def patched(buffer, array, stream, real=real, name=name):
            found.append((name, array.nbytes))
            real(buffer, array, stream)

        monkeypatch.setattr(DeviceBuffer, name, patched)
    return found


@pytest.mark.parametrize("transfers", [False, True])
def test_a_worker_runs_one_shape_on_noise(load, tmp_path, copies, transfers):
    with Session(load()) as session:
        worker = Worker(session, FIXED[0], transfers=transfers)
        num_bytes = int(np.prod(FIXED[0])) * 4
        assert worker.batch == FIXED[0][0] and copies == [("upload", num_bytes)]
        copies.clear()
        for _ in range(2):
            worker.enqueue()
        session.stream.synchronize()
        assert copies == [("upload", num_bytes), ("download", num_bytes)] * 2 * transfers
        (result,) = worker._results.values()
        if not transfers:
            result[...] = 0
            (_, _, buffer) = worker.prepared.outputs["logits"]
            buffer.download(result, session.stream)
            session.stream.synchronize()
        np.testing.assert_array_equal(result, expected(tmp_path, noise(FIXED[0], np.dtype(np.float32))))


def test_noise_is_the_same_each_time_and_in_range():
    shape = (2, 64, 64, 3)
    pixels = noise(shape, np.dtype(np.uint8))
    assert pixels.shape == shape and pixels.dtype == np.uint8 and (pixels.min(), pixels.max()) == (0, 255)
    for dtype in (np.float32, np.float16):
        values = noise(shape, np.dtype(dtype))
        assert values.shape == shape and values.dtype == dtype and np.array_equal(values, noise(shape, np.dtype(dtype)))
        # uniform: of 24 576 values the mean lies within 5 standard errors, 5 · sqrt(1/3) / sqrt(24576) = 0.018, of 0
        assert -1 <= values.min() < -0.99 and 0.99 < values.max() <= 1 and abs(values.astype(np.float64).mean()) < 0.018
    assert np.array_equal(pixels, noise(shape, np.dtype(np.uint8)))
