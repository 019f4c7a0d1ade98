"""A loaded engine: checked before TensorRT reads it, with its tensors by name, its profiles, and execution contexts."""

import dataclasses
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from vit_convert.core.errors import BuildError
from vit_convert.engine.backend import cuda
from vit_convert.engine.backend.sidecar import Sidecar, check_sidecar
from vit_convert.engine.backend.trt import DTYPES, Backend
from vit_convert.engine.runtime.profiles import Shape, ShapeRange


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """One input or output of an engine.

    Attributes:
        name: its name.
        dtype: its numpy type.
        shape: batch first, -1 for dynamic dimensions.
    """

    name: str
    dtype: np.dtype[Any]
    shape: Shape


class Engine:
    """An engine in GPU memory, shared by the sessions that run it.

    Args:
        backend: the TensorRT that built it.
        plan_path: the engine; its sidecar lies beside it.
        onnx_path: the graph that the engine must have been built from; None for any.
        record: in place of a sidecar, for an engine built elsewhere, which has none; None reads the sidecar.

    Attributes:
        record: the sidecar.
        inputs: its inputs, in order.
        leading: the input whose shape selects the profile; all others have the same batch, and otherwise fixed shapes.
        outputs: its outputs, in order.
        ranges: what each of its optimization profiles accepts.
        memory_bytes: GPU memory that loading took.

    Raises:
        BuildError: the sidecar does not fit this host, or TensorRT does not load the engine; the message says what to
            rebuild.
    """

    def __init__(
        self,
        backend: Backend,
        plan_path: str | os.PathLike[str],
        *,
        onnx_path: str | os.PathLike[str] | None = None,
        record: Sidecar | None = None,
    ):
        self.record = check_sidecar(plan_path, backend, onnx_path=onnx_path) if record is None else record
        self.backend, self.path = backend, pathlib.Path(plan_path)
        if backend.gpu is None:
            raise BuildError(
                f"{plan_path}: engines run only on a GPU, and this host has none",
                fix="Run it on a host with an NVIDIA GPU.",
            )
        free = cuda.free_memory_bytes()
        portable = bool(self.record.options.version_compatible)
        with backend.logger.listening():
            runtime, cuda_engine = _deserialise(backend, self.path.read_bytes(), version_compatible=portable)
            if cuda_engine is None:
                raise BuildError(
                    f"{plan_path}: does not load: {backend.logger.explain()}",
                    fix="Build the engine again on this host.",
                )
        self._runtime, self._cuda_engine = runtime, cuda_engine
        self.memory_bytes = max(0, free - cuda.free_memory_bytes())
        inputs, self.outputs = _tensors(backend, cuda_engine)
        self.inputs = tuple(inputs)
        self.leading = _leading(self.inputs, self.path)
        self.ranges = _ranges(cuda_engine, self.leading)

    @property
    def workspace_bytes(self) -> int:
        """GPU memory needed by an execution context for its largest shape."""
        cuda_engine = self._cuda_engine
        if self.backend.find("ICudaEngine.device_memory_size_v2") is not None:
            return int(cuda_engine.device_memory_size_v2)
        return int(cuda_engine.device_memory_size)

    @property
    def information(self) -> str:
        """Its layers, as TensorRT's inspector writes them in JSON; "" without an inspector."""
        inspector = self._cuda_engine.create_engine_inspector()
        form = self.backend.module.LayerInformationFormat.JSON
        return (inspector.get_engine_information(form) or "") if inspector is not None else ""

    def make_context(self, index: int, workspace: cuda.DeviceBuffer, stream: cuda.Stream) -> Any:
        """Makes an execution context for one profile, with workspace memory shared by the contexts of a stream.

        Args:
            index: of the optimization profile.
            workspace: at least `workspace_bytes`.
            stream: the stream that it will run on.

        Returns:
            TensorRT's IExecutionContext.

        Raises:
            BuildError: TensorRT refuses.
        """
        cuda_engine, backend = self._cuda_engine, self.backend
        strategy = backend.find("ExecutionContextAllocationStrategy.USER_MANAGED")
        with backend.logger.listening():
            if strategy is None:
                execution_context = cuda_engine.create_execution_context_without_device_memory()
            else:
                execution_context = cuda_engine.create_execution_context(strategy)
            if execution_context is None:
                raise BuildError(
                    f"{self.path}: no execution context: {backend.logger.explain()}", fix="Free GPU memory."
                )
            if strategy is None:
                execution_context.device_memory = workspace.pointer
            else:
                execution_context.set_device_memory(workspace.pointer, workspace.num_bytes)
            if not execution_context.set_optimization_profile_async(index, stream.handle):
                raise BuildError(
                    f"{self.path}: profile {index} cannot be used: {backend.logger.explain()}",
                    fix="Build the engine again.",
                )
        stream.synchronize()  # selecting a profile is itself queued work
        return execution_context


def _deserialise(backend: Backend, serialized: bytes, *, version_compatible: bool) -> tuple[Any, Any]:
    """The runtime, which must outlive the engine, and the engine, or None if the plan does not load."""
    runtime = backend.module.Runtime(backend.logger)
    if version_compatible:
        runtime.engine_host_code_allowed = True  # such a plan contains the runtime that can read it
    return runtime, runtime.deserialize_cuda_engine(serialized)


def _tensors(backend: Backend, cuda_engine: Any) -> tuple[list[TensorSpec], list[TensorSpec]]:
    inputs: list[TensorSpec] = []
    outputs: list[TensorSpec] = []
    for i in range(cuda_engine.num_io_tensors):
        name = cuda_engine.get_tensor_name(i)
        dtype = np.dtype(DTYPES[cuda_engine.get_tensor_dtype(name).name])
        spec = TensorSpec(name, dtype, tuple(cuda_engine.get_tensor_shape(name)))
        (inputs if cuda_engine.get_tensor_mode(name) == backend.module.TensorIOMode.INPUT else outputs).append(spec)
    return inputs, outputs


def _leading(inputs: Sequence[TensorSpec], path: pathlib.Path) -> TensorSpec:
    varying = [spec for spec in inputs if -1 in spec.shape[1:]] or list(inputs[:1])
    if len(varying) != 1:
        names = ", ".join(f"{spec.name} {list(spec.shape)}" for spec in varying)
        raise BuildError(
            f"{path}: more than one input has sides that vary: {names or 'it has none'}", fix="Export with fixed sizes."
        )
    return varying[0]


def _ranges(cuda_engine: Any, leading: TensorSpec) -> list[ShapeRange]:
    if -1 not in leading.shape:
        return [ShapeRange(leading.shape, leading.shape, leading.shape)]
    shapes = (
        cuda_engine.get_tensor_profile_shape(leading.name, i) for i in range(cuda_engine.num_optimization_profiles)
    )
    return [ShapeRange(*(tuple(shape) for shape in triple)) for triple in shapes]
