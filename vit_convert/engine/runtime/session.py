"""Runs an engine on one stream, with a context and a CUDA graph per shape, on arrays of the host or the GPU."""

import contextlib
import math
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np

from vit_convert.core.errors import BenchmarkError, BuildError
from vit_convert.engine.backend import cuda
from vit_convert.engine.runtime.cuda_graph import CudaGraph
from vit_convert.engine.runtime.device_array import DeviceArray, as_device_array, queue_copy
from vit_convert.engine.runtime.engine import Engine
from vit_convert.engine.runtime.prepared import Prepared
from vit_convert.engine.runtime.profiles import Shape, choose_profile, largest_batch


class Session:
    """Runs an engine on a stream of its own. Only one thread at a time may use it; use one session per thread.

    Args:
        engine: the loaded engine.
        cuda_graphs: record each shape's run once and replay it, which saves the CPU launching every kernel.
        max_shapes: how many shapes stay ready, each with a context, a graph and output memory; the least recently used
            is dropped first, so that requests of ever new sizes do not fill the GPU. A dropped shape is prepared again
            when needed.

    Attributes:
        stream: its CUDA stream.
        input_buffers: by name, the GPU memory from which every run reads its inputs.
        input_buffer: that of the leading input.
        closed: whether `close` was called.

    Raises:
        BuildError: the GPU has not enough free memory.
    """

    def __init__(self, engine: Engine, *, cuda_graphs: bool = True, max_shapes: int = 16):
        self.engine = engine
        self._cuda_graphs, self._max_shapes = cuda_graphs, max_shapes
        self.closed = False
        self._lock = threading.RLock()  # `run` prepares
        self._prepared: dict[Shape, Prepared] = {}  # most recently used last
        most = max(int(np.prod(candidate.largest)) for candidate in engine.ranges)
        with contextlib.ExitStack() as held:
            self.stream = cuda.Stream()
            held.callback(self.stream.close)
            self.input_buffers = {engine.leading.name: cuda.DeviceBuffer(most * engine.leading.dtype.itemsize)}
            self.input_buffer = self.input_buffers[engine.leading.name]
            held.callback(self.input_buffer.close)
            largest = max(candidate.largest[0] for candidate in engine.ranges)
            for spec in engine.inputs:
                if spec is not engine.leading:
                    buffer = cuda.DeviceBuffer(max(1, math.prod((largest, *spec.shape[1:])) * spec.dtype.itemsize))
                    held.callback(buffer.close)
                    self.input_buffers[spec.name] = buffer
            # Contexts of one stream never run at once, so they share a workspace; an allocation of size 0 is illegal.
            self._workspace = cuda.DeviceBuffer(max(engine.workspace_bytes, 1))
            held.callback(self._workspace.close)
            held.callback(self._prepared.clear)  # contexts must end before their workspace
            held.callback(self.stream.synchronize)
            held.callback(cuda.use_context)  # any thread may call close
            self._held = held.pop_all()

    def run(self, inputs: Any) -> dict[str, Any]:
        """Runs a batch of any size, split or padded if no profile takes it.

        Args:
            inputs: a numpy array, or an array of the GPU (`__cuda_array_interface__` or DLPack: PyTorch, CuPy, JAX); of
                the engine's input type, [batch, ...]. For an engine of several inputs, {input: array}, all of one kind.

        Returns:
            {output: array [batch, ...]}: numpy arrays for numpy arrays; otherwise finished DeviceArrays, which belong
            to the caller (a copy within the GPU, a small part of the run's time) and which other libraries take without
            a copy.

        Raises:
            BenchmarkError: wrong type or shape, TensorRT fails, or the session is closed.
            BuildError: the GPU has not enough free memory.
        """
        with self._lock:
            self._require_open()
            cuda.use_context()
            feeds = self.by_name(inputs)
            if any(isinstance(value, np.ndarray) for value in feeds.values()):
                return self._run_host({name: np.ascontiguousarray(value) for name, value in feeds.items()})
            return self._run_device(feeds)

    def prepare(self, shape: Shape) -> Prepared:
        """Makes a shape ready: a context, output memory, one run to warm up, and the recorded graph.

        Args:
            shape: input shape that one of the profiles accepts after padding.

        Returns:
            The argument for `launch`; the same object for every call with this shape, until `max_shapes` others have
            been prepared since the last.

        Raises:
            BenchmarkError: no profile takes the shape, TensorRT fails, or the session is closed.
        """
        choice = choose_profile(self.engine.ranges, shape)
        with self._lock:
            self._require_open()
            prepared = self._prepared.pop(choice.shape, None)
            if prepared is None:
                while self._prepared and len(self._prepared) >= self._max_shapes:
                    self.stream.synchronize()  # its last run may still be queued
                    del self._prepared[next(iter(self._prepared))]
                prepared = self._prepare(choice.index, choice.shape)
            self._prepared[choice.shape] = prepared
            return prepared

    def launch(self, prepared: Prepared) -> None:
        """Queues one run on the stream, from `input_buffer` to the prepared outputs.

        Raises:
            BenchmarkError: TensorRT fails.
        """
        if prepared.graph is not None:
            prepared.graph.launch(self.stream)
        else:
            with self.engine.backend.logger.listening():
                self._execute(prepared.context)

    def wait(self) -> None:
        """Waits until all that is queued on the stream is done.

        Raises:
            BenchmarkError: the session is closed.
            BuildError: the GPU failed.
        """
        self._require_open()
        self.stream.synchronize()

    def require_images(self, shape: Shape, dtype: np.dtype[Any]) -> int:
        """Refuses images that are not of the engine's input type, or of a size that no profile takes.

        Args:
            shape: of the images, batch first.
            dtype: of the images.

        Returns:
            The largest batch of such images that runs at once.

        Raises:
            BenchmarkError: see above.
        """
        spec = self.engine.leading
        if dtype != spec.dtype or len(shape) != len(spec.shape) or shape[0] < 1:
            raise BenchmarkError(
                f"{spec.name}: given {dtype} {list(shape)}, the engine takes {spec.dtype} {list(spec.shape)}",
                fix="Preprocess the images as the engine's sidecar says.",
            )
        return largest_batch(self.engine.ranges, shape, spec.name)

    def require_one_run(self, shape: Shape, dtype: np.dtype[Any]) -> None:
        """Refuses what `require_images` refuses, and batches that do not fit into one run.

        Raises:
            BenchmarkError: see above.
        """
        if (most := self.require_images(shape, dtype)) < shape[0]:
            raise BenchmarkError(f"batch {shape[0]}: the engine takes {most} at most", fix="Give smaller batches.")

    def require_inputs(self, inputs: Any) -> int:
        """Refuses inputs that do not fit the engine: an array, or {input: array}.

        Returns:
            The largest batch of such inputs that runs at once.

        Raises:
            BenchmarkError: see above.
        """
        feeds = self.by_name(inputs)
        leading = feeds[self.engine.leading.name]
        most = self.require_images(leading.shape, leading.dtype)
        for spec in self.engine.inputs:
            given = feeds[spec.name]
            if given.dtype != spec.dtype or (
                tuple(given.shape[1:]) != spec.shape[1:] and spec is not self.engine.leading
            ):
                raise BenchmarkError(
                    f"{spec.name}: given {given.dtype} {list(given.shape)}, the engine takes {spec.dtype} "
                    f"{list(spec.shape)}",
                    fix="Prepare the inputs as the bundle's signature.json says.",
                )
            if given.shape[0] != leading.shape[0]:
                raise BenchmarkError(
                    f"{spec.name}: batch {given.shape[0]}, {self.engine.leading.name} has {leading.shape[0]}"
                )
        return most

    def by_name(self, inputs: Any) -> dict[str, Any]:
        """The inputs by name; a bare array is accepted if the engine has one input.

        Raises:
            BenchmarkError: one is missing, or the engine has none of that name.
        """
        names = [spec.name for spec in self.engine.inputs]
        given = inputs if isinstance(inputs, Mapping) else {names[0]: inputs} if len(names) == 1 else {}
        if {*given} != {*names}:
            found = ", ".join(map(str, given)) or "one array"
            raise BenchmarkError(f"the engine takes {', '.join(names)}; given {found}", fix="Give {input: array}.")
        return {name: given[name] for name in names}

    def close(self) -> None:
        """Frees contexts, memory and the stream, after a run in another thread has finished; the session cannot be used
        any more."""
        with self._lock:
            self.closed = True
            self._held.close()

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _require_open(self) -> None:
        if self.closed:
            raise BenchmarkError(f"{self.engine.path.name}: the session is closed", fix="Make a new one.")

    def _run_host(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        most, count = self.require_inputs(feeds), len(feeds[self.engine.leading.name])
        parts = [
            self._run_part({name: value[start : start + most] for name, value in feeds.items()})
            for start in range(0, count, most)
        ]
        return (
            parts[0] if len(parts) == 1 else {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        )

    def _run_part(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        leading = feeds[self.engine.leading.name]
        prepared = self.prepare(leading.shape)
        for name, value in feeds.items():
            self.input_buffers[name].upload(value, self.stream)
        self.launch(prepared)
        results = {}
        for name, (spec, shape, buffer) in prepared.outputs.items():
            results[name] = np.empty((len(leading), *shape[1:]), spec.dtype)  # rows beyond are padding
            buffer.download(results[name], self.stream)
        self.stream.synchronize()
        return results

    def _run_device(self, feeds: Mapping[str, Any]) -> dict[str, DeviceArray]:
        sources = {name: as_device_array(value, self.stream) for name, value in feeds.items()}
        leading = sources[self.engine.leading.name]
        self.require_one_run(leading.shape, leading.dtype)
        self.require_inputs(sources)
        prepared = self.prepare(leading.shape)
        results = {}
        try:
            for name, source in sources.items():
                self.input_buffers[name].copy_from(source.pointer, source.num_bytes, self.stream)
            self.launch(prepared)
            # Consumers read on streams of their own at any time, so the next run must not write to what they hold.
            for name, (spec, shape, buffer) in prepared.outputs.items():
                results[name] = queue_copy(buffer.pointer, (leading.shape[0], *shape[1:]), spec.dtype, self.stream)
        finally:
            # sources may be reused or freed as soon as this returns, as may the results of a failed run
            self.stream.synchronize()
        return results

    def _prepare(self, index: int, shape: Shape) -> Prepared:
        engine = self.engine
        execution_context = engine.make_context(index, self._workspace, self.stream)
        with engine.backend.logger.listening(), contextlib.ExitStack() as held:
            for spec in engine.inputs:
                own = shape if spec is engine.leading else (shape[0], *spec.shape[1:])
                self._require(execution_context.set_input_shape(spec.name, own), f"{spec.name} {list(own)}")
                self._require(
                    execution_context.set_tensor_address(spec.name, self.input_buffers[spec.name].pointer), spec.name
                )
            outputs = {}
            for spec in engine.outputs:
                found = tuple(execution_context.get_tensor_shape(spec.name))
                buffer = cuda.DeviceBuffer(max(1, int(np.prod(found)) * spec.dtype.itemsize))
                held.callback(buffer.close)
                self._require(execution_context.set_tensor_address(spec.name, buffer.pointer), spec.name)
                outputs[spec.name] = (spec, found, buffer)
            self._execute(execution_context)  # the first run allocates and loads, which cannot be recorded
            self.stream.synchronize()
            graph, why = self._record(execution_context)
            if graph is not None:
                held.callback(graph.close)
            return Prepared(index, shape, execution_context, outputs, graph, why, held.pop_all())

    def _record(self, execution_context: Any) -> tuple[CudaGraph | None, str]:
        if not self._cuda_graphs:
            return None, "CUDA graphs are off"
        graph = None
        try:
            graph = CudaGraph(self.stream, lambda: self._execute(execution_context))
            graph.launch(self.stream)
            self.stream.synchronize()
        except (BuildError, BenchmarkError) as e:
            if graph is not None:
                graph.close()
            return None, str(e)
        return graph, ""

    def _execute(self, execution_context: Any) -> None:
        self._require(execution_context.execute_async_v3(self.stream.handle), "a run")

    def _require(self, succeeded: bool, what: str) -> None:
        if not succeeded:
            raise BenchmarkError(
                f"{self.engine.path.name}: {what}: {self.engine.backend.logger.explain()}",
                fix="Build the engine again.",
            )
