"""Names nodes so that a person can follow them from the checkpoint to a calibration table and an engine's layer
list."""

import collections
import itertools
from collections.abc import Mapping, Sequence

import onnx_ir as ir

from vit_convert.core.stack import Stack
from vit_convert.export.passes.contract import GraphPass, names_unique
from vit_convert.export.passes.unroll_blocks import between
from vit_convert.export.weights import weight_of


def name_nodes(model: ir.Model, taps: Sequence[str], stacks: Sequence[Stack] = ()) -> None:
    """Names every node after the parameter it uses, or after its block, and every value after its node, in place.

    Args:
        model: the graph.
        taps: names of inner values; these and the graph's inputs and outputs keep their names.
        stacks: the model's runs of blocks, in its order, whose taps are the residual streams.
    """
    graph = model.graph
    kept = {*taps, *(v.name for v in graph.inputs), *(v.name for v in graph.outputs)}
    scope = _scopes(
        graph, {value.name: value for node in graph for value in node.outputs if value.name in kept}, stacks
    )
    taken: collections.Counter[str] = collections.Counter()
    for node in graph:
        path = _path(node) or scope.get(node, "")
        name = f"{path}{node.op_type}"
        taken[name] += 1
        node.name = name if taken[name] == 1 else f"{name}_{taken[name] - 1}"
        for i, value in enumerate(node.outputs):
            if value.name not in kept:
                value.name = node.name if i == 0 else f"{node.name}.{i}"
    for i, value in enumerate([v for v in graph.initializers.values() if weight_of(v) is None]):
        value.name = f"constant_{i}"


def naming(taps: Sequence[str], stacks: Sequence[Stack] = ()) -> GraphPass:
    """`name_nodes` with its contract: the taps keep their names, and no two nodes or values share one."""

    def has_taps(model: ir.Model) -> str:
        there = {value.name for node in model.graph for value in node.outputs}
        lost = [tap for tap in taps if tap not in there]
        return f"no value is {lost[0]}" if lost else ""

    return GraphPass(
        lambda model: name_nodes(model, taps, stacks),
        name="name_nodes",
        requires=(has_taps,),
        ensures=(has_taps, names_unique),
    )


def _scopes(graph: ir.Graph, values: Mapping[str | None, ir.Value], stacks: Sequence[Stack]) -> dict[ir.Node, str]:
    """The block that a node is in, as the prefix of its parameters."""
    scope: dict[ir.Node, str] = {}
    before = graph.inputs[0]
    for stack in stacks:
        streams = [values.get(stack.tap(i)) for i in range(stack.depth)]
        for i, (start, end) in enumerate(itertools.pairwise(streams), start=1):
            if start is not None and end is not None:
                scope |= dict.fromkeys(_from_stream(start, between(start, end, graph), graph), stack.prefix(i))
        if streams[0] is not None:
            start = values.get(stack.start)
            first = [node for node in between(start or before, streams[0], graph) if node not in scope]
            own = _from_stream(start, first, graph) if start else first[_entry(first, stack.prefix(0)) :]
            scope |= dict.fromkeys(own, stack.prefix(0))
        before = streams[-1] or before
    return scope


def _from_stream(start: ir.Value, nodes: list[ir.Node], graph: ir.Graph) -> list[ir.Node]:
    """Excludes what is computed from the graph's inputs beside the stream that begins with `start`, such as a mask."""
    beside, found = set(graph.inputs) - {start}, []
    reached = {start}
    for node in nodes:
        inputs = [value for value in node.inputs if value is not None]
        if reached.isdisjoint(inputs) and not beside.isdisjoint(inputs):
            beside.update(node.outputs)
        else:
            reached.update(node.outputs)
            found.append(node)
    return found


def _entry(nodes: list[ir.Node], prefix: str) -> int:
    """Where block 0 begins: after the last value before its first parameter that alone carries the stream."""
    end = next((i for i, node in enumerate(nodes) if _path(node).startswith(prefix)), len(nodes))
    earlier = {value for value in nodes[0].inputs if value is not None} if nodes else set()
    entry = 0
    for i, node in enumerate(nodes[:end]):
        if not any(value in earlier for later in nodes[i + 1 :] for value in later.inputs):
            entry = i + 1
        earlier.update(node.outputs)
    return entry


def _path(node: ir.Node) -> str:
    """`…/query/` for a node that uses `…/query/kernel`, "" for one that uses no parameter."""
    for value in node.inputs:
        weight = weight_of(value)
        if weight is not None and "/" in weight.sources[0]:
            levels = 1 if len(weight.sources) == 1 else 2  # query, key and value merged belong to their attention
            return weight.sources[0].rsplit("/", levels)[0] + "/"
    return ""
