"""How much memory an engine of a graph will need, before it is built."""

import dataclasses
from collections.abc import Mapping

from vit_convert.engine.inspection.onnx_wire import Graph
from vit_convert.engine.inspection.sides import solve_sides

_BUILD_FACTOR = 4  # times the weights, in host memory during a build; others report 3 to 4
_VIEWS = ("Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity")


@dataclasses.dataclass(frozen=True)
class Memory:
    """Estimated numbers of bytes.

    Attributes:
        weights: in the engine.
        activations: the most alive at any time at the largest batch if nothing is fused: an upper bound.
        largest: size of the largest value at the largest batch, to compare with a workspace.
        largest_name: name of that value.
        building: host memory while it is built.
    """

    weights: int
    activations: int
    largest: int
    largest_name: str
    building: int


def estimate(graph: Graph, sizes: Mapping[str, int], *, half: bool = False) -> Memory:
    """Adds up the sizes of weights and of values that are alive at the same time.

    Args:
        graph: of the ONNX file.
        sizes: of the dimensions that vary: {"batch": 64}.
        half: whether a builder flag will compute float32 in FP16 (TensorRT 8.6).
    """

    known = solve_sides(graph, sizes)

    def size(name: str) -> int:
        value = graph.value(name)
        return value.num_bytes(known) // (2 if half and value.dtype == "float32" else 1)

    owner = _owners(graph)
    last: dict[str, int] = {}
    for place, node in enumerate(graph.nodes):
        last |= dict.fromkeys((owner.get(name, name) for name in node.inputs), place)
    last |= dict.fromkeys((owner.get(name, name) for name in graph.outputs), len(graph.nodes))
    living = {name: size(name) for name in graph.inputs}
    most, largest, largest_name = sum(living.values()), 0, ""
    for place, node in enumerate(graph.nodes):
        for name in (name for name in node.outputs if name not in owner):
            living[name] = size(name)
            if living[name] > largest:
                largest, largest_name = living[name], name
        most = max(most, sum(living.values()))
        living = {name: count for name, count in living.items() if last.get(name, -1) > place}
    weights = sum(size(name) for name in graph.weights)
    stored = sum(graph.value(name).num_bytes({}) for name in graph.weights)
    return Memory(weights, most, largest, largest_name, _BUILD_FACTOR * stored)


def _owners(graph: Graph) -> dict[str, str]:
    """For each value that is a view of another, the one whose bytes it shares."""
    owner: dict[str, str] = {}
    for node in graph.nodes:
        if node.op in _VIEWS and node.inputs:
            owner[node.output(0)] = owner.get(node.input(0), node.input(0))
    return owner
