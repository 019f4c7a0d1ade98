"""CUDA graphs: a recorded run that one launch repeats, and the names of the kernels in it."""

import ctypes
from collections.abc import Callable

from vit_convert.core.errors import BuildError
from vit_convert.engine.backend import cuda

_THREAD_LOCAL = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL: allocations by other threads do not end the capture
_KERNEL_NODE = 0  # CU_GRAPH_NODE_TYPE_KERNEL


class _KernelNodeParams(ctypes.Structure):
    """CUDA_KERNEL_NODE_PARAMS_v2 of cuda.h."""

    _fields_ = (
        ("func", ctypes.c_void_p),
        ("grid_and_block", ctypes.c_uint * 6),
        ("shared_bytes", ctypes.c_uint),
        ("kernel_params", ctypes.c_void_p),
        ("extra", ctypes.c_void_p),
        ("kern", ctypes.c_void_p),
        ("ctx", ctypes.c_void_p),
    )


class CudaGraph:
    """The work that a function queues on a stream, recorded once.

    Args:
        stream: the stream that `work` uses.
        work: queues the work; nothing in it may wait for the GPU or allocate its memory.

    Raises:
        BuildError: something in `work` cannot be recorded.
    """

    def __init__(self, stream: cuda.Stream, work: Callable[[], None]):
        handle, self._graph, self._exec = ctypes.c_void_p(stream.handle), ctypes.c_void_p(), ctypes.c_void_p()
        cuda.call("cuStreamBeginCapture_v2", handle, _THREAD_LOCAL)
        try:
            work()
        except BaseException:
            cuda.status_of("cuStreamEndCapture", handle, ctypes.byref(self._graph))  # the stream is unusable until then
            raise
        cuda.call("cuStreamEndCapture", handle, ctypes.byref(self._graph))
        try:
            cuda.call("cuGraphInstantiateWithFlags", ctypes.byref(self._exec), self._graph, ctypes.c_uint64(0))
        except BuildError:
            cuda.status_of("cuGraphDestroy", self._graph)
            raise

    def launch(self, stream: cuda.Stream) -> None:
        """Queues the recorded work on a stream."""
        cuda.call("cuGraphLaunch", self._exec, ctypes.c_void_p(stream.handle))

    def kernel_names(self) -> list[str]:
        """The name of each kernel in the graph, in no particular order.

        Raises:
            BuildError: the driver is older than CUDA 12.3, and cannot tell.
        """
        count = ctypes.c_size_t()
        cuda.call("cuGraphGetNodes", self._graph, None, ctypes.byref(count))
        nodes = (ctypes.c_uint64 * count.value)()  # handles, which are pointers
        cuda.call("cuGraphGetNodes", self._graph, nodes, ctypes.byref(count))
        return [_kernel_name(node) for node in nodes if _node_type(node) == _KERNEL_NODE]

    def close(self) -> None:
        """Destroys the graph."""
        statuses = cuda.status_of("cuGraphExecDestroy", self._exec), cuda.status_of("cuGraphDestroy", self._graph)
        if any(statuses):
            raise BuildError(f"a CUDA graph: not destroyed ({', '.join(map(str, statuses))})")


def _node_type(node: int) -> int:
    kind = ctypes.c_int()
    cuda.call("cuGraphNodeGetType", ctypes.c_uint64(node), ctypes.byref(kind))
    return kind.value


def _kernel_name(node: int) -> str:
    params, name = _KernelNodeParams(), ctypes.c_char_p()
    cuda.call("cuGraphKernelNodeGetParams_v2", ctypes.c_uint64(node), ctypes.byref(params))
    # A kernel of a library context has no function, but a kernel handle.
    if params.func:
        cuda.call("cuFuncGetName", ctypes.byref(name), ctypes.c_void_p(params.func))
    else:
        cuda.call("cuKernelGetName", ctypes.byref(name), ctypes.c_void_p(params.kern))
    if name.value is None:
        raise BuildError("a kernel of the graph has no name")
    return name.value.decode()
