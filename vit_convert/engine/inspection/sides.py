"""Sizes of the dimensions that vary: those that are given, and those that follow from them."""

import math
from collections.abc import Iterator, Mapping, Sequence

from vit_convert.engine.inspection.onnx_wire import Graph, Shape

_ELEMENTWISE = ("Add", "Sub", "Mul", "Div", "Pow", "Max", "Min", "Sum", "Mean", "Where")


def solve_sides(graph: Graph, given: Mapping[str, int]) -> dict[str, int]:
    """Solves for dimensions that shape inference gave new names, such as batch times tokens after a Reshape, and those
    that depend on them.

    Args:
        graph: of the ONNX file.
        given: the sizes that are known: {"batch": 64}.

    Returns:
        These sizes, and all that follow: a Reshape keeps the number of elements, and values that are added have the
        same shape.
    """
    sizes = dict(given)
    for node in graph.nodes:
        shapes = [shape for name in node.inputs if (shape := graph.value(name).shape) is not None]
        after = graph.value(node.output(0)).shape
        if after is None or not shapes or not list(_unknown(after, sizes)):
            continue
        if node.op == "Reshape":
            _by_elements(shapes[0], after, sizes)
        elif node.op in _ELEMENTWISE:
            _by_broadcast(shapes, after, sizes)
    return sizes


def _unknown(shape: Shape, sizes: Mapping[str, int]) -> Iterator[str]:
    yield from (side for side in shape if isinstance(side, str) and side not in sizes)


def _count(shape: Sequence[int | str], sizes: Mapping[str, int]) -> int:
    return math.prod(side if isinstance(side, int) else sizes[side] for side in shape)


def _by_elements(before: Shape, after: Shape, sizes: dict[str, int]) -> None:
    (name, *more) = _unknown(after, sizes)
    if more or name == "?" or list(_unknown(before, sizes)):
        return
    others = _count([side for side in after if side != name], sizes)
    if others:
        sizes[name] = _count(before, sizes) // others


def _by_broadcast(shapes: Sequence[Shape], after: Shape, sizes: dict[str, int]) -> None:
    for place in range(1, len(after) + 1):
        name, sides = after[-place], [shape[-place] for shape in shapes if len(shape) >= place]
        if isinstance(name, str) and name not in (*sizes, "?") and not list(_unknown(tuple(sides), sizes)):
            sizes[name] = max(_count([side], sizes) for side in sides)
