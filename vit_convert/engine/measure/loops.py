"""The two measuring loops: one run at a time for latency, runs queued ahead for throughput, on any number of
streams."""

import concurrent.futures
import dataclasses
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from vit_convert.engine.backend import cuda
from vit_convert.engine.runtime.pinned import pinned_array
from vit_convert.engine.runtime.profiles import Shape
from vit_convert.engine.runtime.session import Session

MIN_RUNS = 10  # with fewer runs, percentiles are meaningless
QUEUED = 2  # runs queued while waiting for one, so that the GPU never waits for the CPU
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Latency:
    """The result of the closed loop, in which each run is submitted when the one before it on the stream is done.

    Attributes:
        wall_ms: from submitting a run to knowing that it is done, by the CPU's clock.
        gpu_ms: the same run between two events in its stream, by the GPU's clock.
    """

    wall_ms: np.ndarray
    gpu_ms: np.ndarray


class Worker:
    """One session and one shape to measure it with.

    Args:
        session: to run.
        shape: input shape, which a profile takes as it is.
        transfers: copy images in from page-locked memory and results back with every run; without, they stay in GPU
            memory.
    """

    def __init__(self, session: Session, shape: Shape, *, transfers: bool):
        self.session, self.transfers = session, transfers
        self.prepared = session.prepare(shape)
        self._inputs = {}
        for spec in session.engine.inputs:
            own = shape if spec is session.engine.leading else (shape[0], *spec.shape[1:])
            self._inputs[spec.name] = pinned_array(own, spec.dtype)
            self._inputs[spec.name][...] = noise(own, spec.dtype)  # power, and so the clock, depends on the values
        self._results = {
            name: pinned_array(found, spec.dtype) for name, (spec, found, _) in self.prepared.outputs.items()
        }
        self._upload()
        session.stream.synchronize()

    @property
    def batch(self) -> int:
        """Images per run."""
        return self.prepared.shape[0]

    def enqueue(self) -> None:
        """Queues one run."""
        session = self.session
        if self.transfers:
            self._upload()
        session.launch(self.prepared)
        if self.transfers:
            for name, (_, _, buffer) in self.prepared.outputs.items():
                buffer.download(self._results[name], session.stream)

    def _upload(self) -> None:
        for name, values in self._inputs.items():
            self.session.input_buffers[name].upload(values, self.session.stream)


def noise(shape: Shape, dtype: np.dtype[Any]) -> np.ndarray:
    """Seeded inputs for timing: pixels 0 to 255, values -1 to 1, or the integers 0 and 1 for anything else."""
    generator = np.random.default_rng(0)
    if dtype.kind in "iu" and dtype != np.uint8:
        return generator.integers(0, 2, shape).astype(dtype)
    if dtype == np.uint8:
        return generator.integers(0, 256, shape, np.uint8)
    return (2 * generator.random(shape, np.float32) - 1).astype(dtype)


def measure_latency(workers: Sequence[Worker], seconds: float) -> Latency:
    """Runs the closed loop on every stream at once.

    Args:
        workers: one for each stream.
        seconds: how long.

    Returns:
        The times of all runs on all streams.
    """
    parts = _at_once(workers, lambda worker: _closed_loop(worker, seconds))
    return Latency(np.concatenate([wall for wall, _ in parts]), np.concatenate([gpu for _, gpu in parts]))


def measure_throughput(workers: Sequence[Worker], seconds: float) -> float:
    """Runs as fast as the GPU can, on every stream at once.

    Args:
        workers: one for each stream.
        seconds: how long.

    Returns:
        Images per second, all streams together.
    """
    parts = _at_once(workers, lambda worker: _queued_loop(worker, seconds))
    runs = sum(runs * worker.batch for (runs, _, _), worker in zip(parts, workers))
    return runs / (max(end for _, _, end in parts) - min(start for _, start, _ in parts))


def _closed_loop(worker: Worker, seconds: float) -> tuple[np.ndarray, np.ndarray]:
    stream, begin, end = worker.session.stream, cuda.Event(), cuda.Event()
    wall: list[float] = []
    gpu: list[float] = []
    deadline = time.perf_counter() + seconds
    while len(wall) < MIN_RUNS or time.perf_counter() < deadline:
        started = time.perf_counter()
        begin.record(stream)
        worker.enqueue()
        end.record(stream)
        end.synchronize()
        wall.append(1e3 * (time.perf_counter() - started))
        gpu.append(begin.elapsed_ms(end))
    begin.close()
    end.close()
    return np.asarray(wall), np.asarray(gpu)


def _queued_loop(worker: Worker, seconds: float) -> tuple[int, float, float]:
    stream = worker.session.stream
    events = deque(cuda.Event() for _ in range(QUEUED))
    runs, started = 0, time.perf_counter()
    while runs < MIN_RUNS or time.perf_counter() < started + seconds:
        if runs >= QUEUED:
            events[0].synchronize()
        worker.enqueue()
        events[0].record(stream)
        events.rotate(-1)
        runs += 1
    stream.synchronize()
    ended = time.perf_counter()
    for event in events:
        event.close()
    return runs, started, ended


def _at_once(workers: Sequence[Worker], loop: Callable[[Worker], T]) -> list[T]:
    barrier = threading.Barrier(len(workers))

    def start(worker: Worker) -> T:
        barrier.wait()
        cuda.use_context()
        return loop(worker)

    with concurrent.futures.ThreadPoolExecutor(len(workers)) as pool:
        return list(pool.map(start, workers))
