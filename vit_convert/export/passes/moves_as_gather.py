"""Replaces chains of Reshape, Transpose, Slice and Concat that only move tokens with one Gather: each link of a chain
copies all tokens.

A Swin shifts its windows with two Concats and two Transposes, and back with as many; its merging splits windows and
pairs neighbours.
"""

import math
from typing import Any

import numpy as np
import onnx_ir as ir

from vit_convert.core.errors import ExportError
from vit_convert.export.passes.contract import GraphPass
from vit_convert.export.weights import add_constant

_COPIES = frozenset({"Transpose", "Concat"})
_MOVES = _COPIES | {"Reshape", "Slice"}
# values of an image whose indices are traced through a chain; a Swin-L at 384 pixels has 2^21 in its first stage
_MAX_ELEMENTS = 1 << 24


def moves_to_gather(model: ir.Model) -> int:
    """Replaces chains of two or more copies that reorder whole tokens [batch, tokens, width], in place.

    Args:
        model: a graph whose shapes are constant, except for the batch.

    Returns:
        The number of chains.

    Raises:
        ExportError: there was none, so the graph would be the same without this lowering.
    """
    replaced = 0
    for node in list(model.graph):
        value = node.outputs[0]
        is_end = node.op_type in _MOVES and (
            value.is_graph_output() or any(user.op_type not in _MOVES for user, _ in value.uses())
        )
        if (is_end or _is_tokens(value)) and node.op_type in _MOVES:
            replaced += _replace(model.graph, node)
    if not replaced:
        raise ExportError("lowering gather: the model moves no tokens", fix="Leave it out of `lowerings`.")
    return replaced


MOVES_TO_GATHER = GraphPass(moves_to_gather)


def _is_tokens(value: ir.Value) -> bool:
    """Whether a value is [batch, tokens, width] with only the batch unknown."""
    shape = value.shape
    return (
        shape is not None
        and len(shape) == 3
        and not isinstance(shape[0], int)
        and all(isinstance(side, int) for side in shape[1:])
    )


def _replace(graph: ir.Graph, end: ir.Node) -> bool:
    chain = _chain(end)
    if chain is None or sum(node.op_type in _COPIES for node in chain[1]) < 2:
        return False
    source, nodes = chain
    assert source.shape is not None
    _, tokens, width = (int(side) if isinstance(side, int) else -1 for side in source.shape)
    result = end.outputs[0]
    order = _order(source, nodes, result, tokens, width)
    if order is None:
        return False
    gather = ir.node("Gather", [source, add_constant(graph, "order", order)], {"axis": 1})
    moved = gather.outputs[0]
    moved.shape, moved.type = source.shape, result.type
    added = [gather]
    assert result.shape is not None
    if tuple(result.shape)[1:] != tuple(source.shape)[1:]:
        shape = [-1, *(int(side) for side in result.shape[1:] if isinstance(side, int))]
        added.append(ir.node("Reshape", [moved, add_constant(graph, "order_shape", shape)]))
        added[-1].outputs[0].shape, added[-1].outputs[0].type = result.shape, result.type
    graph.insert_before(end, added)
    last = added[-1].outputs[0]
    last.name, result.name = result.name, None
    ir.convenience.replace_all_uses_with(result, last, replace_graph_outputs=True)
    graph.remove(end, safe=True)
    return True


def _chain(end: ir.Node) -> tuple[ir.Value, list[ir.Node]] | None:
    """The value [batch, tokens, width] from which a node's output is made by moves only, and these moves in order; None
    if there is none."""
    found: dict[ir.Node, None] = {}
    sources: dict[ir.Value, None] = {}

    def visit(node: ir.Node) -> None:
        if node in found:
            return
        data = node.inputs if node.op_type == "Concat" else node.inputs[:1]
        for value in data:
            producer = value.producer() if value is not None else None
            if value is None or (producer is not None and producer.op_type in _MOVES and not _is_tokens(value)):
                if producer is not None:
                    visit(producer)
            else:
                sources[value] = None
        found[node] = None

    visit(end)
    source = next(iter(sources), None)
    return (source, list(found)) if len(sources) == 1 and source is not None and _is_tokens(source) else None


def _order(source: ir.Value, nodes: list[ir.Node], result: ir.Value, tokens: int, width: int) -> np.ndarray | None:
    """The source token of each place of the result, found by tracing indices; None if tokens are split or lost, or a
    shape is unknown."""
    size = tokens * width
    if (
        size > _MAX_ELEMENTS
        or result.shape is None
        or math.prod(s for s in result.shape[1:] if isinstance(s, int)) != size
    ):
        return None
    # For two images: a chain that mixes them is not a reordering of tokens.
    values: dict[ir.Value | None, np.ndarray] = {source: np.arange(2 * size, dtype=np.int32).reshape(2, tokens, width)}
    for node in nodes:
        moved = _moved(node, [values.get(value) for value in node.inputs])
        if moved is None:
            return None
        values[node.outputs[0]] = moved
    rows = values[result].reshape(2, -1, width)
    order = rows[0, :, 0] // width
    expected = (order[:, None] * width + np.arange(width, dtype=np.int32))[None] + np.array([[[0]], [[size]]], np.int32)
    return order.astype(np.int64) if rows.shape == expected.shape and np.array_equal(rows, expected) else None


def _moved(node: ir.Node, inputs: list[np.ndarray | None]) -> np.ndarray | None:
    """Applies a move to an array of indices; None if a parameter of the move is not constant or depends on the number
    of images."""
    data = inputs[0]
    if data is None:
        return None
    if node.op_type == "Transpose":
        return np.transpose(data, node.attributes["perm"].as_ints())
    if node.op_type == "Concat":
        parts = [part for part in inputs if part is not None]
        return np.concatenate(parts, node.attributes["axis"].as_int()) if len(parts) == len(inputs) else None
    numbers: list[Any] = [
        None if v is None or v.const_value is None else v.const_value.numpy().tolist() for v in node.inputs[1:]
    ]
    if any(number is None for number in numbers):
        return None
    if node.op_type == "Reshape":
        is_open = -1 in numbers[0] or numbers[0][0] == 0
        return (
            data.reshape([data.shape[i] if side == 0 else side for i, side in enumerate(numbers[0])])
            if is_open
            else None
        )
    starts, ends, axes = numbers[:3] if len(numbers) > 2 else (*numbers, range(len(numbers[0])))
    steps = numbers[3] if len(numbers) > 3 else [1] * len(starts)
    cut: list[slice] = [slice(None)] * data.ndim
    for start, stop, axis, step in zip(starts, ends, axes, steps):
        cut[axis] = slice(start, stop, step)
    return data[tuple(cut)]
