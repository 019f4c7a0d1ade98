"""Names that a person can follow from the checkpoint to a calibration table and an engine's layer list."""

import collections
import itertools

import onnx_ir as ir

from vit_convert.export.passes.unroll_blocks import between
from vit_convert.export.weights import weight_of


def name_nodes(model: ir.Model, taps: list[str]) -> None:
    """Names every node after the parameter it uses, or after its encoder block, and every value after its node, in place.

    Args:
        model: the graph.
        taps: names of the residual stream after each block, in order; these and the graph's inputs and outputs keep their names.
    """
    graph = model.graph
    kept = {*taps, *(v.name for v in graph.inputs), *(v.name for v in graph.outputs)}
    values = {value.name: value for node in graph for value in node.outputs if value.name in kept}
    scope: dict[ir.Node, str] = {}
    blocks = [values[tap] for tap in taps if tap in values and tap.startswith("block_")]
    for i, (start, end) in enumerate(itertools.pairwise(blocks), start=1):
        for node in between(start, end, graph):
            scope[node] = f"Transformer/encoderblock_{i}/"
    if blocks:
        first = [node for node in between(graph.inputs[0], blocks[0], graph) if node not in scope]
        for node in first[_entry(first) :]:
            scope[node] = "Transformer/encoderblock_0/"
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


def _entry(nodes: list[ir.Node]) -> int:
    """Where block 0 begins: behind the last value, before the block's first parameter, that alone carries the stream."""
    end = next((i for i, node in enumerate(nodes) if _path(node).startswith("Transformer/encoderblock_0/")), len(nodes))
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
