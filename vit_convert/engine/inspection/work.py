"""Counts what a graph computes and moves."""

import math
from collections.abc import Mapping

from vit_convert.core.roofline import Work
from vit_convert.engine.inspection.onnx_wire import Graph, Node
from vit_convert.engine.inspection.sides import solve_sides

_PRODUCTS = ("MatMul", "Gemm", "Conv", "Attention")


def count_work(graph: Graph, given: Mapping[str, int]) -> Work | None:
    """Counts for one image.

    Args:
        graph: of the ONNX file, before any fusion.
        given: sizes of the dimensions that vary: {"batch": 1, "height": 224, "width": 224}.

    Returns:
        The Work; None if the file does not give the shape of a product.

    Example:
        >>> from vit_convert.engine.inspection.onnx_wire import read_graph
        >>> count_work(read_graph("out/tiny/model.onnx"), {"batch": 1}).weights > 0
        True
    """
    flop, weights, values, sizes = 0, 0, 0, solve_sides(graph, given)
    read: set[str] = set()

    def shape(name: str) -> list[int] | None:
        found = graph.value(name).shape
        if found is None or any(isinstance(side, str) and side not in sizes for side in found):
            return None
        return [side if isinstance(side, int) else sizes[side] for side in found]

    for node in graph.nodes:
        if node.op not in _PRODUCTS or node.domain:
            continue
        shapes = [shape(name) for name in (*node.inputs[:3], node.output(0)) if name]
        if any(side is None for side in shapes):
            return None
        flop += _flop(node, [side for side in shapes if side is not None])
        weight = _weight(graph, node)
        if weight:
            weights += 0 if weight in read else math.prod(shape(weight) or ())
            read.add(weight)
            values += math.prod(shape(_activation(graph, node)) or ()) + math.prod(shape(node.output(0)) or ())
    return Work(gflop_per_image=round(flop / 1e9, 6), weights=weights, values_per_image=values) if flop else None


def _flop(node: Node, shapes: list[list[int]]) -> int:
    """Multiplications and additions of one product; the last shape is that of its output."""
    if node.op == "Attention":  # queries [batch, (heads,) length, width] with keys, and attention weights with values
        query, key = shapes[0], shapes[1]
        heads = query[1] if len(query) == 4 else 1
        return 4 * query[0] * heads * query[-2] * key[-2] * query[-1]
    if node.op == "Conv":
        return 2 * math.prod(shapes[-1]) * math.prod(shapes[1][1:])  # channels of a group, height, width
    inner = shapes[0][0] if node.op == "Gemm" and node.attributes.get("transA") else shapes[0][-1]
    return 2 * math.prod(shapes[-1]) * inner


def _origin(graph: Graph, name: str) -> str:
    """The weight that a value comes from, perhaps quantized, cast or transposed on the way; "" for a computed value."""
    for _ in range(8):
        if name in graph.weights:
            return name
        node = graph.producers.get(name)
        if node is None or node.op not in (
            "QuantizeLinear",
            "DequantizeLinear",
            "Cast",
            "Transpose",
            "Identity",
            "Reshape",
        ):
            return ""
        name = node.input(0)
    return ""


def _weight(graph: Graph, node: Node) -> str:
    """The weight of a product of a value and a weight; "" for a product of two values."""
    return next((found for name in node.inputs[:2] if (found := _origin(graph, name))), "")


def _activation(graph: Graph, node: Node) -> str:
    return next((name for name in node.inputs[:2] if not _origin(graph, name)), node.input(0))
