"""Recording a run, and the names of its kernels: calls of the driver with the numbers of cuda.h."""

import pytest
from cuda_library import Library

from vit_convert.core.errors import BuildError
from vit_convert.engine.backend import cuda
from vit_convert.engine.runtime.cuda_graph import CudaGraph

GRAPH, EXECUTABLE, STREAM = 21, 22, 5


@pytest.fixture
def recorded(monkeypatch):
    """Records what a function does; with the driver."""

    def make(work=lambda: None, **answers):
        library = Library(
            {"cuStreamCreate": ((STREAM,), 0), "cuCtxGetCurrent": ((1,), 0), "cuStreamEndCapture": ((None, GRAPH), 0),
             "cuGraphInstantiateWithFlags": ((EXECUTABLE,), 0), **answers}
        )  # fmt: skip
        monkeypatch.setattr(cuda, "_driver", lambda: library)
        stream = cuda.Stream()
        library.calls.clear()
        return library, stream, lambda: CudaGraph(stream, lambda: work() or library.calls.append("work"))

    return make


def test_what_is_recorded_and_launched(recorded):
    library, stream, record = recorded()
    graph = record()
    graph.launch(stream)
    graph.close()
    assert library.calls == [
        ("cuStreamBeginCapture_v2", STREAM, 1),  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        "work",
        ("cuStreamEndCapture", STREAM, GRAPH),
        ("cuGraphInstantiateWithFlags", EXECUTABLE, GRAPH, 0),
        ("cuGraphLaunch", EXECUTABLE, STREAM),
        ("cuGraphExecDestroy", EXECUTABLE),
        ("cuGraphDestroy", GRAPH),
    ]


@pytest.mark.parametrize("error", [BuildError("not now"), KeyboardInterrupt()])
def test_a_recording_that_fails_is_ended(recorded, error):
    """The stream takes nothing else until then."""

    def work():
        raise error

    library, _, record = recorded(work)
    with pytest.raises(type(error)):
        record()
    assert library.calls[-1] == ("cuStreamEndCapture", STREAM, GRAPH)


def test_a_graph_that_cannot_be_instantiated_is_destroyed(recorded):
    library, _, record = recorded(cuGraphInstantiateWithFlags=((), 801))
    with pytest.raises(BuildError, match="cuGraphInstantiateWithFlags: CUDA error 801"):
        record()
    assert library.calls[-1] == ("cuGraphDestroy", GRAPH)


@pytest.mark.parametrize(("executable", "graph"), [(700, 0), (0, 700)])
def test_what_is_not_destroyed_is_said(recorded, executable, graph):
    library, _, record = recorded(cuGraphExecDestroy=((), executable), cuGraphDestroy=((), graph))
    with pytest.raises(BuildError, match=rf"not destroyed \({executable}, {graph}\)"):
        record().close()
    assert [call[0] for call in library.calls[-2:]] == ["cuGraphExecDestroy", "cuGraphDestroy"]


# node: its type (0 is a kernel), function, kernel handle
NODES = {101: (0, 7, 0), 102: (2, 0, 0), 103: (0, 0, 8), 104: (1, 0, 0)}


def with_nodes(library, names):
    def nodes(graph, found, count):
        assert graph.value == GRAPH
        count._obj.value = len(NODES)
        if found is not None:
            found[:] = [*NODES]
        return 0

    def kind(node, found):
        found._obj.value = NODES[node.value][0]
        return 0

    def params(node, found):
        _, found._obj.func, found._obj.kern = NODES[node.value]
        return 0

    def named(of):
        def name(found, handle):
            found._obj.value = names[of, handle.value]
            return 0

        return name

    library.cuGraphGetNodes, library.cuGraphNodeGetType, library.cuGraphKernelNodeGetParams_v2 = nodes, kind, params
    library.cuFuncGetName, library.cuKernelGetName = named("function"), named("kernel")


def test_names_of_kernels_of_both_kinds(recorded):
    library, _, record = recorded()
    with_nodes(library, {("function", 7): b"gemm", ("kernel", 8): b"softmax"})
    assert record().kernel_names() == ["gemm", "softmax"]


def test_a_kernel_without_a_name(recorded):
    library, _, record = recorded()
    with_nodes(library, {("function", 7): b"gemm", ("kernel", 8): None})
    with pytest.raises(BuildError, match="a kernel of the graph has no name"):
        record().kernel_names()
