"""Runs a stream of batches, copying one to the GPU while computing another."""

import contextlib
import itertools
import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from vit_convert.engine.backend import cuda
from vit_convert.engine.runtime.engine import Engine
from vit_convert.engine.runtime.pinned import is_pinned, pinned_array
from vit_convert.engine.runtime.profiles import Shape
from vit_convert.engine.runtime.session import Session


class PipelinedSession:
    """Several sessions that take turns with batches; results come in the order of the batches.

    Only one thread may use it, and for one `run` at a time; use one PipelinedSession per thread.

    Batches in page-locked memory (`pinned_array`, or another library's) are copied to the GPU straight from there;
    others pass through page-locked memory of its own, at the cost of one more copy on the CPU.

    Args:
        engine: the loaded engine.
        num_streams: batches in flight; with two, one is copied while the other is computed.
        cuda_graphs: as for Session.
    """

    def __init__(self, engine: Engine, *, num_streams: int = 2, cuda_graphs: bool = True):
        self._slots: list[_Slot] = []
        with contextlib.ExitStack() as held:
            for _ in range(num_streams):
                self._slots.append(_Slot(engine, cuda_graphs=cuda_graphs))
                held.callback(self._slots[-1].session.close)
            self._held = held.pop_all()

    def run(self, batches: Iterable[np.ndarray | Mapping[str, np.ndarray]]) -> Iterator[dict[str, np.ndarray]]:
        """Runs batches.

        Args:
            batches: arrays [batch, ...] of the engine's input type, or {input: array}, none larger than its largest
                profile. A page-locked one must not change until its result has arrived.

        Yields:
            {output: array [batch, ...]} for each batch, in order.

        Raises:
            BenchmarkError: wrong type or shape, or TensorRT fails; raised, like an error of `batches` itself, after the
                results of the batches before it. Or the session is closed; results in flight are lost.
        """
        cuda.use_context()
        busy: deque[_Slot] = deque()
        source = iter(batches)
        try:
            for slot in itertools.cycle(self._slots):
                try:
                    images = next(source)
                except StopIteration:
                    break
                except Exception:
                    yield from _finish_all(busy)
                    raise
                if busy and busy[0] is slot:
                    yield busy.popleft().finish()
                try:
                    slot.submit(images)
                except Exception:
                    yield from _finish_all(busy)
                    raise
                busy.append(slot)
            yield from _finish_all(busy)
        finally:
            for slot in busy:  # the caller stopped early and may now free its batches
                if not slot.session.closed:  # this waited for them
                    slot.session.wait()

    def close(self) -> None:
        """Frees all GPU memory and streams."""
        self._held.close()

    def __enter__(self) -> "PipelinedSession":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Slot:
    """One session, its page-locked memory, and the batch it is busy with."""

    def __init__(self, engine: Engine, *, cuda_graphs: bool):
        self.session = Session(engine, cuda_graphs=cuda_graphs)
        self._memory: dict[str, np.ndarray] = {}  # page-locked, by the name of the input or output
        self._inputs: Mapping[str, np.ndarray] = {}
        self._results: dict[str, np.ndarray] = {}

    def submit(self, inputs: np.ndarray | Mapping[str, np.ndarray]) -> None:
        session = self.session
        feeds = {name: np.ascontiguousarray(value) for name, value in session.by_name(inputs).items()}
        leading = feeds[session.engine.leading.name]
        session.require_one_run(leading.shape, leading.dtype)
        session.require_inputs(feeds)
        prepared = session.prepare(leading.shape)
        for name, value in feeds.items():
            if not is_pinned(value):
                feeds[name] = self._pinned(name, value.shape, value.dtype)
                feeds[name][...] = value
            session.input_buffers[name].upload(feeds[name], session.stream)
        self._inputs = feeds  # alive until they are copied
        session.launch(prepared)
        self._results = {}
        for name, (spec, shape, buffer) in prepared.outputs.items():
            self._results[name] = self._pinned(name, (len(leading), *shape[1:]), spec.dtype)  # further rows are padding
            buffer.download(self._results[name], session.stream)

    def finish(self) -> dict[str, np.ndarray]:
        self.session.wait()
        self._inputs = {}
        return {name: host.copy() for name, host in self._results.items()}

    def _pinned(self, name: str, shape: Shape, dtype: np.dtype[Any]) -> np.ndarray:
        # One block for all shapes, which only grows: separate blocks would fill the host's memory.
        num_bytes = math.prod(shape) * dtype.itemsize
        if name not in self._memory or self._memory[name].nbytes < num_bytes:
            self._memory[name] = pinned_array((num_bytes,), np.uint8)
        return self._memory[name][:num_bytes].view(dtype).reshape(shape)


def _finish_all(busy: deque[_Slot]) -> Iterator[dict[str, np.ndarray]]:
    while busy:
        yield busy.popleft().finish()
