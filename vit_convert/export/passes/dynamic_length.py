"""Texts of varying length: a text tower traced at its longest becomes a graph for shorter texts too.

As with images, the trace has one length. In a tower that masks padding, or later tokens, only the constants with a
token axis and the shapes of Reshapes depend on it.
"""

import numpy as np
import onnx_ir as ir

from vit_convert.core.errors import ExportError
from vit_convert.export.passes.cleanup import clean
from vit_convert.export.passes.contract import GraphPass
from vit_convert.export.weights import add_constant, weight_of

_END = np.iinfo(np.int64).max


def make_lengths_dynamic(model: ir.Model, table: str, tokens: str) -> None:
    """Makes the length of the texts symbolic, in place.

    Constants with a row or a column for each token are cut to the number that the texts have: the first ones of the
    position table, of a causal mask and of the triangle that counts tokens; the last ones of the constant that marks
    the last token.

    Args:
        model: a text tower's graph of one length, its input [batch, length]; weights described.
        table: name of the position table's parameter.
        tokens: name of the input that takes texts.

    Raises:
        ExportError: the graph does not read the position table.
    """
    graph = model.graph
    given = next(value for value in graph.inputs if value.name == tokens)
    assert given.shape is not None
    length = given.shape[1]
    assert isinstance(length, int)
    _open_shapes(graph, length)
    _cut_constants(graph, given, length, table)
    given.shape = ir.Shape(["batch", "length"])
    for node in graph:
        for value in node.outputs:
            value.shape = None
    clean(model)


def making_lengths_dynamic(table: str, tokens: str) -> GraphPass:
    """`make_lengths_dynamic` with its contract: neither the texts nor any constant have a fixed number of tokens
    afterwards."""

    def is_dynamic(model: ir.Model) -> str:
        given = next((value for value in model.graph.inputs if value.name == tokens), None)
        fixed = [side for side in (given.shape if given is not None else None) or () if isinstance(side, int)]
        return f"the input {tokens} has {fixed}" if fixed or given is None else ""

    return GraphPass(
        lambda model: make_lengths_dynamic(model, table, tokens), name="make_lengths_dynamic", ensures=(is_dynamic,)
    )


def _open_shapes(graph: ir.Graph, length: int) -> None:
    """Lets Reshapes that keep the token axis copy its size, and those that turn it into a mask's axes infer it (-1)."""
    for node in graph:
        source, target = node.inputs[:2] if node.op_type == "Reshape" else (None, None)
        if source is None or target is None or target.const_value is None or source.shape is None:
            continue
        numbers = target.const_value.numpy().tolist()
        if len(source.shape) < 2 or source.shape[1] != length or length not in numbers:
            continue
        if len(numbers) > 1 and numbers[1] == length:
            numbers[1] = 0
        else:  # [batch, length] to [batch, 1, 1, length]
            numbers = [0 if side == -1 and place == 0 else side for place, side in enumerate(numbers)]
            numbers[numbers.index(length)] = -1
        node.replace_input_with(1, add_constant(graph, "token_axes", numbers))


def _cut_constants(graph: ir.Graph, given: ir.Value, length: int, table: str) -> None:
    shape = ir.node("Shape", [given])
    size = ir.node("Gather", [shape.outputs[0], add_constant(graph, "length_axis", [1])], {"axis": 0})
    zero = add_constant(graph, "zero", [0])
    from_end = ir.node("Sub", [zero, size.outputs[0]])
    added, found = [shape, size], False
    end = add_constant(graph, "to_the_end", [_END])
    for value in list(graph.initializers.values()):
        weight, constant = weight_of(value), value.const_value
        if weight is not None and weight.sources == (table,) and value.shape is not None:
            found, axes, starts, ends = True, [list(value.shape).index(length)], zero, size.outputs[0]
        elif constant is None or value.type != ir.TensorType(ir.DataType.FLOAT) or constant.shape[-1:] != (length,):
            continue
        elif len(constant.shape) > 1 and constant.shape[-2] == length:
            axes, starts, ends = [len(constant.shape) - 2, len(constant.shape) - 1], zero, size.outputs[0]
        else:
            axes, starts, ends = [len(constant.shape) - 1], from_end.outputs[0], end
            added += [] if from_end in added else [from_end]
        cut = _slice(graph, value, axes, starts, ends)
        added += cut
        ir.convenience.replace_all_uses_with(value, cut[-1].outputs[0])
        cut[0].replace_input_with(0, value)
    if not found:
        raise ExportError(
            "the graph does not add a position table to the tokens of a text, so its length is fixed",
            fix="Set text_length to one number.",
        )
    graph.insert_before(graph[0], added)


def _slice(graph: ir.Graph, value: ir.Value, axes: list[int], starts: ir.Value, ends: ir.Value) -> list[ir.Node]:
    """One Slice for each axis: TensorRT can read these if their sizes are known only at run time."""
    nodes: list[ir.Node] = []
    for axis in axes:
        source = nodes[-1].outputs[0] if nodes else value
        nodes.append(ir.node("Slice", [source, starts, ends, add_constant(graph, "cut_axis", [axis])]))
    return nodes
