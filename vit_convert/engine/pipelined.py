"""Runs a stream of batches so that copying one to the GPU hides behind computing another."""

from collections import deque
from collections.abc import Iterable, Iterator

import numpy as np

from vit_convert.engine import cuda
from vit_convert.engine.pinned import is_pinned, pinned_array
from vit_convert.engine.profiles import Shape, largest_batch
from vit_convert.engine.runtime import Engine
from vit_convert.engine.session import Prepared, Session
from vit_convert.errors import BenchmarkError


class PipelinedSession:
    """Several sessions that take batches in turn; results come in the order of the batches.

    Batches in page-locked memory (`pinned_array`, or another library's) are copied to the GPU straight from there; others pass through
    page-locked memory of its own, at the price of one more copy on the CPU.

    Args:
        engine: the loaded engine.
        num_streams: batches in flight; with two, one is copied while the other is computed.
        cuda_graphs: as for Session.
    """

    def __init__(self, engine: Engine, *, num_streams: int = 2, cuda_graphs: bool = True):
        self._slots = [_Slot(engine, cuda_graphs=cuda_graphs) for _ in range(num_streams)]

    def run(self, batches: Iterable[np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
        """Runs batches.

        Args:
            batches: arrays [batch, ...] of the engine's input type, none larger than its largest profile. A page-locked one must stay
                as it is until its result is there.

        Yields:
            {output: array [batch, ...]} for each batch, in order.

        Raises:
            BenchmarkError: wrong type or shape, or TensorRT fails.
        """
        cuda.use_context()
        busy: deque[_Slot] = deque()
        try:
            for i, images in enumerate(batches):
                slot = self._slots[i % len(self._slots)]
                if busy and busy[0] is slot:
                    yield busy.popleft().finish()
                slot.submit(np.ascontiguousarray(images))
                busy.append(slot)
            while busy:
                yield busy.popleft().finish()
        finally:
            for slot in busy:  # the caller stopped early: its batches may go now
                slot.session.stream.synchronize()

    def close(self) -> None:
        """Gives all GPU memory and streams back."""
        for slot in self._slots:
            slot.session.close()

    def __enter__(self) -> "PipelinedSession":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Slot:
    """One session, its page-locked memory, and the batch it is busy with."""

    def __init__(self, engine: Engine, *, cuda_graphs: bool):
        self.session = Session(engine, cuda_graphs=cuda_graphs)
        self._staging: dict[Shape, np.ndarray] = {}
        self._results: dict[Shape, dict[str, np.ndarray]] = {}
        self._shape: Shape = ()
        self._count = 0
        self._images: np.ndarray | None = None

    def submit(self, images: np.ndarray) -> None:
        session = self.session
        session.require_images(images.shape, images.dtype)
        if len(images) > (most := largest_batch(session.engine.ranges, images.shape)):
            raise BenchmarkError(f"batch {len(images)}: the engine takes {most} at most", fix="Give smaller batches.")
        prepared = session.prepare(images.shape)
        if not is_pinned(images):
            images = self._stage(images)
        self._images, self._shape, self._count = images, prepared.shape, len(images)
        session.input_buffer.upload(images, session.stream)
        session.launch(prepared)
        for name, host in self._host_results(prepared).items():
            prepared.outputs[name][2].download(host, session.stream)

    def finish(self) -> dict[str, np.ndarray]:
        self.session.stream.synchronize()
        self._images = None
        return {name: host[: self._count].copy() for name, host in self._results[self._shape].items()}

    def _stage(self, images: np.ndarray) -> np.ndarray:
        if images.shape not in self._staging:
            self._staging[images.shape] = pinned_array(images.shape, images.dtype)
        self._staging[images.shape][...] = images
        return self._staging[images.shape]

    def _host_results(self, prepared: Prepared) -> dict[str, np.ndarray]:
        if prepared.shape not in self._results:
            self._results[prepared.shape] = {name: pinned_array(shape, spec.dtype) for name, (spec, shape, _) in prepared.outputs.items()}
        return self._results[prepared.shape]
