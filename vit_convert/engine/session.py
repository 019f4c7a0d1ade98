"""Runs an engine on one stream: contexts and CUDA graphs by shape, arrays of the host or of the GPU in and out."""

import dataclasses
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np

from vit_convert.engine import cuda
from vit_convert.engine.device_array import DeviceArray, as_device_array
from vit_convert.engine.graphs import CudaGraph
from vit_convert.engine.profiles import Shape, choose_profile, largest_batch
from vit_convert.engine.runtime import Engine, TensorSpec
from vit_convert.errors import BenchmarkError, BuildError
from vit_convert.progress import Progress


@dataclasses.dataclass
class Prepared:
    """One input shape, ready to run.

    Attributes:
        index: of the optimization profile.
        shape: of the input.
        context: TensorRT's execution context, of this shape for good: a recorded graph holds its state.
        outputs: for each output its spec, its shape here and its GPU memory.
        graph: the recorded run; None where CUDA graphs are off or cannot record this engine.
        why_no_graph: why `graph` is None, else "".
    """

    index: int
    shape: Shape
    context: Any
    outputs: Mapping[str, tuple[TensorSpec, Shape, cuda.DeviceBuffer]]
    graph: CudaGraph | None
    why_no_graph: str


class Session:
    """Runs an engine on a stream of its own. One thread at a time; several threads take a session each.

    Args:
        engine: the loaded engine.
        cuda_graphs: record each shape's run once and replay it, which spares the CPU a launch for every kernel.

    Attributes:
        stream: its CUDA stream.
        input_buffer: GPU memory that every run reads its images from.

    Raises:
        BuildError: the GPU has not enough free memory.
    """

    def __init__(self, engine: Engine, *, cuda_graphs: bool = True):
        self.engine = engine
        self.stream = cuda.Stream()
        self._cuda_graphs = cuda_graphs
        self._lock = threading.Lock()
        self._prepared: dict[Shape, Prepared] = {}
        most = max(int(np.prod(candidate.largest)) for candidate in engine.ranges)
        self.input_buffer = cuda.DeviceBuffer(most * engine.images.dtype.itemsize)
        # Contexts of one stream never run at once, so they share what they work in; a size of 0 is no legal allocation.
        self._workspace = cuda.DeviceBuffer(max(engine.workspace_bytes, 1))

    def run(self, images: Any) -> dict[str, Any]:
        """Runs a batch of any size: it is split or padded where no profile takes it.

        Args:
            images: a numpy array, or an array of the GPU (`__cuda_array_interface__` or DLPack: PyTorch, CuPy, JAX); of the engine's
                input type, [batch, ...].

        Returns:
            {output: array [batch, ...]}: numpy arrays for a numpy array; otherwise finished DeviceArrays, which other libraries take
            without a copy and which this session's next run overwrites.

        Raises:
            BenchmarkError: wrong type or shape, or TensorRT fails.
        """
        with self._lock:
            cuda.use_context()
            if isinstance(images, np.ndarray):
                return self._run_host(np.ascontiguousarray(images))
            return self._run_device(images)

    def prepare(self, shape: Shape) -> Prepared:
        """Makes a shape ready: a context, output memory, one run to warm up, and the recorded graph.

        Args:
            shape: input shape that one of the profiles accepts after padding.

        Returns:
            What `launch` takes; the same for every call with this shape.

        Raises:
            BenchmarkError: no profile takes the shape, or TensorRT fails.
        """
        choice = choose_profile(self.engine.ranges, shape)
        if choice.shape not in self._prepared:
            self._prepared[choice.shape] = self._prepare(choice.index, choice.shape)
        return self._prepared[choice.shape]

    def launch(self, prepared: Prepared) -> None:
        """Queues one run on the stream, from `input_buffer` to the prepared outputs.

        Raises:
            BenchmarkError: TensorRT fails.
        """
        if prepared.graph is not None:
            prepared.graph.launch(self.stream)
        else:
            self._execute(prepared.context)

    def require_images(self, shape: Shape, dtype: np.dtype[Any]) -> None:
        """Refuses images that are not of the engine's input type.

        Raises:
            BenchmarkError: see above.
        """
        spec = self.engine.images
        if dtype != spec.dtype or len(shape) != len(spec.shape) or shape[0] < 1:
            raise BenchmarkError(
                f"{spec.name}: given {dtype} {list(shape)}, the engine takes {spec.dtype} {list(spec.shape)}",
                fix="Preprocess the images as the engine's sidecar says.",
            )

    def close(self) -> None:
        """Gives contexts, memory and the stream back."""
        self.stream.synchronize()
        for prepared in self._prepared.values():
            if prepared.graph is not None:
                prepared.graph.close()
            for _, _, buffer in prepared.outputs.values():
                buffer.close()
        self._prepared.clear()  # the contexts end here, before the memory that they work in
        self._workspace.close()
        self.input_buffer.close()
        self.stream.close()

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run_host(self, images: np.ndarray) -> dict[str, np.ndarray]:
        self.require_images(images.shape, images.dtype)
        most = largest_batch(self.engine.ranges, images.shape)
        parts = [self._run_part(images[start : start + most]) for start in range(0, len(images), most)]
        return parts[0] if len(parts) == 1 else {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _run_part(self, images: np.ndarray) -> dict[str, np.ndarray]:
        prepared = self.prepare(images.shape)
        self.input_buffer.upload(images, self.stream)
        self.launch(prepared)
        results = {}
        for name, (spec, shape, buffer) in prepared.outputs.items():
            results[name] = np.empty((len(images), *shape[1:]), spec.dtype)  # rows beyond are padding
            buffer.download(results[name], self.stream)
        self.stream.synchronize()
        return results

    def _run_device(self, images: Any) -> dict[str, DeviceArray]:
        source = as_device_array(images, self.stream)
        self.require_images(source.shape, source.dtype)
        if source.shape[0] > (most := largest_batch(self.engine.ranges, source.shape)):
            raise BenchmarkError(f"batch {source.shape[0]}: the engine takes {most} at most", fix="Split the batch.")
        prepared = self.prepare(source.shape)
        self.input_buffer.copy_from(source.pointer, source.num_bytes, self.stream)
        self.launch(prepared)
        # The source may be reused or freed as soon as this returns.
        self.stream.synchronize()
        return {
            name: DeviceArray(buffer.pointer, (source.shape[0], *shape[1:]), spec.dtype, owner=(self, buffer))
            for name, (spec, shape, buffer) in prepared.outputs.items()
        }

    def _prepare(self, index: int, shape: Shape) -> Prepared:
        engine, images = self.engine, self.engine.images
        execution_context = engine.make_context(index, self._workspace, self.stream)
        with engine.backend.logger.listening(Progress(quiet=True)):
            self._require(execution_context.set_input_shape(images.name, shape), f"{images.name} {list(shape)}")
            self._require(execution_context.set_tensor_address(images.name, self.input_buffer.pointer), images.name)
            outputs = {}
            for spec in engine.outputs:
                found = tuple(execution_context.get_tensor_shape(spec.name))
                buffer = cuda.DeviceBuffer(max(1, int(np.prod(found)) * spec.dtype.itemsize))
                self._require(execution_context.set_tensor_address(spec.name, buffer.pointer), spec.name)
                outputs[spec.name] = (spec, found, buffer)
            self._execute(execution_context)  # the first run allocates and loads, which cannot be recorded
            self.stream.synchronize()
            graph, why = None, "CUDA graphs are off"
            if self._cuda_graphs:
                try:
                    graph, why = CudaGraph(self.stream, lambda: self._execute(execution_context)), ""
                    graph.launch(self.stream)
                    self.stream.synchronize()
                except (BuildError, BenchmarkError) as e:
                    graph, why = None, str(e)
        return Prepared(index, shape, execution_context, outputs, graph, why)

    def _execute(self, execution_context: Any) -> None:
        self._require(execution_context.execute_async_v3(self.stream.handle), "a run")

    def _require(self, succeeded: bool, what: str) -> None:
        if not succeeded:
            raise BenchmarkError(f"{self.engine.path.name}: {what}: {self.engine.backend.logger.explain()}", fix="Build the engine again.")
