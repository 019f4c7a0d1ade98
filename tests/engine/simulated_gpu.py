"""A GPU for machines without one: a CUDA driver whose device memory is the host's, and a TensorRT runtime that computes
with onnxruntime.

Work queued on a stream runs only when somebody waits for it, so that a forgotten wait shows as wrong values. What it
cannot show is whether the real libraries take the same calls; the tests marked `gpu` do.
"""

import ctypes
import dataclasses
import json
import pathlib
import threading
import time
import types

import numpy as np
import onnx
import onnxruntime

from vit_convert.engine.backend import cuda
from vit_convert.engine.backend.graph_file import graph_hashes
from vit_convert.engine.backend.sidecar import Sidecar, plan_file, read_sidecar, write_sidecar
from vit_convert.engine.backend.trt import Backend

GPU = cuda.Gpu("Simulated", "sm90", 8 << 30, "0", "12.4")
_NUMPY = {onnx.TensorProto.FLOAT: "FLOAT", onnx.TensorProto.UINT8: "UINT8", onnx.TensorProto.INT32: "INT32"}


def _number(value):
    return int(getattr(value, "value", value) or 0)


class Driver:
    """The functions of libcuda that engine/ calls, each returning a CUresult."""

    def __init__(self):
        self._lock = threading.RLock()
        self._next = 1
        self.queues, self.times, self.graphs, self.device, self.pinned = {}, {}, {}, {}, {}
        self.capturing = {}
        self.launches = 0

    def _new(self, table, value):
        with self._lock:
            self._next += 1
            table[self._next] = value
            return self._next

    def _queue(self, stream, work):
        stream = _number(stream)
        with self._lock:
            (self.capturing if stream in self.capturing else self.queues)[stream].append(work)
        return 0

    def _drain(self, stream):
        with self._lock:
            work, self.queues[stream] = self.queues[stream], []
            for item in work:
                item()

    def _nothing(self, *_):
        return 0

    cuInit = cuCtxSetCurrent = cuDeviceGet = cuDevicePrimaryCtxRetain = cuStreamWaitEvent = cuEventDestroy_v2 = _nothing

    def cuGetErrorString(self, status, text):
        text._obj.value = b"simulated failure"
        return 0

    def cuCtxGetCurrent(self, context):
        context._obj.value = 1
        return 0

    def cuMemGetInfo_v2(self, free, total):
        with self._lock:
            free._obj.value = GPU.memory_bytes - sum(len(block) for block in self.device.values())
        total._obj.value = GPU.memory_bytes
        return 0

    def _allocate(self, table, num_bytes):
        block = (ctypes.c_byte * num_bytes)()
        table[ctypes.addressof(block)] = block
        return ctypes.addressof(block)

    def cuMemAlloc_v2(self, pointer, num_bytes):
        if num_bytes.value > GPU.memory_bytes:
            return 2  # CUDA_ERROR_OUT_OF_MEMORY
        pointer._obj.value = self._allocate(self.device, num_bytes.value)
        return 0

    def cuMemFree_v2(self, pointer):
        del self.device[_number(pointer)]
        return 0

    def cuMemHostAlloc(self, pointer, num_bytes, flags):
        pointer._obj.value = self._allocate(self.pinned, num_bytes.value)
        return 0

    def cuMemFreeHost(self, pointer):
        del self.pinned[_number(pointer)]
        return 0

    def cuPointerGetAttribute(self, kind, attribute, pointer):
        kind._obj.value = 1
        return 0 if any(start <= pointer.value < start + len(block) for start, block in self.pinned.items()) else 1

    def _copy(self, target, source, num_bytes, stream):
        return self._queue(stream, lambda: ctypes.memmove(_number(target), _number(source), num_bytes.value))

    cuMemcpyHtoDAsync_v2 = cuMemcpyDtoHAsync_v2 = cuMemcpyDtoDAsync_v2 = _copy

    def cuStreamCreate(self, stream, flags):
        stream._obj.value = self._new(self.queues, [])
        return 0

    def cuStreamSynchronize(self, stream):
        self._drain(_number(stream))
        return 0

    def cuStreamDestroy_v2(self, stream):
        del self.queues[_number(stream)]
        return 0

    def cuEventCreate(self, event, flags):
        event._obj.value = self._new(self.times, None)
        return 0

    def cuEventRecord(self, event, stream):
        number = _number(event)
        return self._queue(stream, lambda: self.times.__setitem__(number, time.perf_counter()))

    def cuEventSynchronize(self, event):
        for stream in list(self.queues):
            self._drain(stream)
        return 0

    def cuEventElapsedTime(self, milliseconds, start, end):
        milliseconds._obj.value = 1e3 * (self.times[_number(end)] - self.times[_number(start)])
        return 0

    def cuStreamBeginCapture_v2(self, stream, mode):
        self.capturing[_number(stream)] = []
        return 0

    def cuStreamEndCapture(self, stream, graph):
        graph._obj.value = self._new(self.graphs, self.capturing.pop(_number(stream)))
        return 0

    def cuGraphInstantiateWithFlags(self, executable, graph, flags):
        executable._obj.value = self._new(self.graphs, self.graphs[_number(graph)])
        return 0

    def cuGraphLaunch(self, executable, stream):
        self.launches += 1
        for work in self.graphs[_number(executable)]:
            self._queue(stream, work)
        return 0

    kernels = ()  # what the nodes of every graph run; None is a copy

    def cuGraphGetNodes(self, graph, nodes, count):
        if nodes is None:
            count._obj.value = len(self.kernels)
        else:
            nodes[:] = range(1, len(self.kernels) + 1)
        return 0

    def cuGraphNodeGetType(self, node, kind):
        kind._obj.value = 0 if self.kernels[node.value - 1] is not None else 1
        return 0

    def cuGraphKernelNodeGetParams_v2(self, node, params):
        # Library kernels, every other one here, have a kernel handle instead of a function.
        setattr(params._obj, "func" if node.value % 2 else "kern", node.value)
        return 0

    def _name(self, name, handle):
        name._obj.value = self.kernels[handle.value - 1].encode()
        return 0

    cuFuncGetName = cuKernelGetName = _name

    def cuGraphExecDestroy(self, executable):
        del self.graphs[_number(executable)]
        return 0

    cuGraphDestroy = cuGraphExecDestroy  # both have numbers of their own


class Context:
    def __init__(self, engine):
        self._engine, self._shapes, self._addresses = engine, {}, {}
        self.device_memory = 0

    def set_optimization_profile_async(self, index, stream):
        self._range = self._engine.profiles[index]
        return True

    def set_input_shape(self, name, shape):
        self._shapes[name] = shape
        if len(shape) != len(self._range[0]):  # of another input than the one that the profiles are of
            return True
        return all(low <= size <= high for low, size, high in zip(self._range[0], shape, self._range[2]))

    def set_tensor_address(self, name, pointer):
        self._addresses[name] = pointer
        return True

    def get_tensor_shape(self, name):
        return [
            size if size != -1 else next(iter(self._shapes.values()))[0] for size in self._engine.get_tensor_shape(name)
        ]

    def execute_async_v3(self, stream):
        if self._engine.broken:
            self._engine.logger.errors.append("simulated: a kernel failed")
            return False
        return self._engine.driver._queue(stream, self._compute) == 0

    def _compute(self):
        session = self._engine.session
        feeds = {name: self._view(name, shape, self._engine.types[name]).copy() for name, shape in self._shapes.items()}
        for output, value in zip(session.get_outputs(), session.run(None, feeds)):
            self._view(output.name, value.shape, np.float32)[...] = value + self._error(value)

    def _error(self, value):
        """What was put in on purpose: for every row the same, or more for those behind."""
        places = np.arange(len(value), dtype=np.float32).reshape(-1, *[1] * (value.ndim - 1))
        return self._engine.error + self._engine.by_place * places

    def _view(self, name, shape, dtype):
        num_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return np.frombuffer((ctypes.c_byte * num_bytes).from_address(self._addresses[name]), dtype).reshape(shape)


class CudaEngine:
    """What deserialising a plan of `write_plan` gives."""

    device_memory_size = 1 << 20

    def __init__(self, driver, logger, plan):
        found = json.loads(bytes(plan))
        self.driver, self.logger, self.profiles = driver, logger, found["profiles"]
        self.error, self.broken, self.by_place = found["error"], found["broken"], found["by_place"]
        options = onnxruntime.SessionOptions()
        # integer kernels saturate on some processors, TensorRT's do not
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        self.session = onnxruntime.InferenceSession(found["onnx"], options, providers=["CPUExecutionProvider"])
        graph = onnx.load(found["onnx"], load_external_data=False).graph
        tensors = [*graph.input, *graph.output]
        self._names = [tensor.name for tensor in tensors]
        self._inputs = {tensor.name for tensor in graph.input}
        kinds = {tensor.name: _NUMPY[tensor.type.tensor_type.elem_type] for tensor in tensors}
        self._kinds = {name: types.SimpleNamespace(name=kind) for name, kind in kinds.items()}
        self.types = {
            name: {"FLOAT": np.float32, "UINT8": np.uint8, "INT32": np.int32}[kind] for name, kind in kinds.items()
        }
        self._shapes = {
            tensor.name: [dim.dim_value or -1 for dim in tensor.type.tensor_type.shape.dim] for tensor in tensors
        }
        self.num_io_tensors, self.num_optimization_profiles = len(tensors), len(self.profiles)

    def get_tensor_name(self, i):
        return self._names[i]

    def get_tensor_dtype(self, name):
        return self._kinds[name]

    def get_tensor_shape(self, name):
        return self._shapes[name]

    def get_tensor_mode(self, name):
        return "INPUT" if name in self._inputs else "OUTPUT"

    def get_tensor_profile_shape(self, name, index):
        return self.profiles[index]

    def create_execution_context_without_device_memory(self):
        return Context(self)


def install(monkeypatch):
    """Puts the simulated driver in the real one's place for one test; returns the backend."""
    driver = Driver()
    monkeypatch.setattr(cuda, "_driver", lambda: driver)
    monkeypatch.setattr(cuda, "gpu", lambda: GPU)

    class ILogger:
        ERROR, INTERNAL_ERROR, WARNING = range(3)

    class Runtime:
        def __init__(self, logger):
            self._logger = logger

        def deserialize_cuda_engine(self, plan):
            return CudaEngine(driver, self._logger, plan) if plan.startswith(b"{") else None

    module = types.SimpleNamespace(
        __name__="tensorrt",
        __version__="8.6.0",
        ILogger=ILogger,
        Runtime=Runtime,
        TensorIOMode=types.SimpleNamespace(INPUT="INPUT", OUTPUT="OUTPUT"),
        BuilderFlag=types.SimpleNamespace(FP16=0),
        ICudaEngine=CudaEngine,
    )
    from vit_convert.engine.backend.log_capture import make_logger

    return Backend("tensorrt", "8.6.0", module, GPU, make_logger(module)), driver


def write_plan(path, graph, ranges, *, precision="fp32", error=0.0, broken=False, by_place=0.0, content=None):
    """Writes a plan for the simulated TensorRT, with its sidecar.

    Args:
        path: the plan.
        graph: the ONNX file that it computes.
        ranges: (smallest, optimal, largest input shape) of each profile.
        precision: as the sidecar says.
        error: added to every output.
        by_place: added once for each row before it in the batch.
        broken: runs fail.
        content: the plan's bytes instead.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    plan = {
        "onnx": str(graph),
        "profiles": [[list(shape) for shape in triple] for triple in ranges],
        "error": error,
        "by_place": by_place,
        "broken": broken,
    }
    path.write_bytes(content or json.dumps(plan).encode())
    options = {"version_compatible": False, "hardware_compatible": False, "tf32": False}
    about = {"backend": "tensorrt", "version": "8.6.0", "targets": ["sm90"], "precision": precision, "options": options}
    graph_record = {"path": pathlib.Path(graph).name, **graph_hashes(graph)}
    record = {**about, "gpu": dataclasses.asdict(GPU), "onnx": graph_record, "build_seconds": 1.5, "attentions": 1}
    put_sidecar(path, **record)
    return path


def put_sidecar(path, **record):
    """Writes the sidecar of a plan that a test made."""
    write_sidecar(path, Sidecar.from_dict({**record, "plan": plan_file(path).to_dict()}))


def change_sidecar(path, **record):
    """Changes some entries of a sidecar."""
    write_sidecar(path, Sidecar.from_dict({**read_sidecar(path).to_dict(), **record}))
