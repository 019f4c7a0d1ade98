"""Height and width that vary: a ViT traced at one size becomes a graph for all sizes, its position table resampled
inside.

jax2onnx cannot add a table to an unknown number of tokens, so one size is traced. After that, only the table and the
shapes of Reshapes depend on the number of tokens.
"""

import numpy as np
import onnx_ir as ir

from vit_convert.core.errors import ExportError
from vit_convert.export.passes.cleanup import clean
from vit_convert.export.passes.contract import GraphPass
from vit_convert.export.weights import add_constant, replace_weight, weight_of


def make_dynamic(model: ir.Model, grid: tuple[int, int], table: str, image: str) -> None:
    """Makes the height and width of the images symbolic, in place.

    The table is resampled by ONNX's Resize, linear with aligned corners, which reads position i·(old−1)/(new−1) of each
    axis, as in `families.vit.posemb.resample`. It is added before the patches are laid out as tokens.

    Args:
        model: a ViT's graph for one size, with image input [batch, height, width, 3] or [batch, 3, height, width];
            weights described.
        grid: (rows, columns) of patches that the position table is for.
        table: name of the position table's parameter.
        image: name of the image input.

    Raises:
        ExportError: the graph does not add a position table to the patches of a convolution.
    """
    add, reshape, transpose, conv = _embedding(model.graph, table)
    _resample(model, grid, add, reshape, transpose, conv)
    _copy_tokens(model.graph)
    _open_slices(model.graph)
    images = next(value for value in model.graph.inputs if value.name == image)
    assert images.shape is not None
    images.shape = ir.Shape(
        ["batch", "height", "width", 3] if images.shape[3] == 3 else ["batch", 3, "height", "width"]
    )
    _forget_shapes(model.graph, conv, reshape)
    clean(model)


def making_dynamic(grid: tuple[int, int], table: str, image: str) -> GraphPass:
    """`make_dynamic` with its contract: afterwards, only the images' channel axis has a fixed size."""

    def is_dynamic(model: ir.Model) -> str:
        images = next((value for value in model.graph.inputs if value.name == image), None)
        shape = images.shape if images is not None else None
        fixed = [side for side in shape or () if isinstance(side, int)]
        return "" if fixed == [3] else f"the input {image} is {shape}"

    return GraphPass(lambda model: make_dynamic(model, grid, table, image), name="make_dynamic", ensures=(is_dynamic,))


def _embedding(graph: ir.Graph, table: str) -> tuple[ir.Node, ir.Node, ir.Node, ir.Node]:
    """The nodes that make tokens: the addition of the table, and the Reshape, Transpose and Conv before it."""
    for node in graph:
        tables = [
            value for value in node.inputs if (weight := weight_of(value)) is not None and weight.sources == (table,)
        ]
        if node.op_type != "Add" or not tables:
            continue
        patches = next(value for value in node.inputs if value is not tables[0])
        reshape = patches.producer() if patches is not None else None
        transpose = reshape.predecessors()[0] if reshape is not None and reshape.op_type == "Reshape" else None
        conv = transpose.predecessors()[0] if transpose is not None and transpose.op_type == "Transpose" else None
        if conv is not None and conv.op_type == "Conv":
            assert reshape is not None and transpose is not None
            return node, reshape, transpose, conv
    raise ExportError(
        "the graph does not add a position table to the patches of a convolution, so its image size is fixed",
        fix="Give one image_size.",
    )


def _resample(
    model: ir.Model, grid: tuple[int, int], add: ir.Node, reshape: ir.Node, transpose: ir.Node, conv: ir.Node
) -> None:
    graph, patches = model.graph, conv.outputs[0]  # [B, D, h, w]
    (table,) = [value for value in add.inputs if weight_of(value) is not None]
    weight = weight_of(table)
    assert table is not None and weight is not None
    width = weight.shape[-1]
    planes = replace_weight(
        graph, table, weight.then((1, width, *grid), lambda a: a.reshape(1, *grid, width).transpose(0, 3, 1, 2))
    )
    shape = ir.node("Shape", [patches])
    sides = ir.node("Gather", [shape.outputs[0], add_constant(graph, "grid_axes", [2, 3])], {"axis": 0})
    sizes = ir.node("Concat", [add_constant(graph, "table_axes", [1, width]), sides.outputs[0]], {"axis": 0})
    resize = ir.node(
        "Resize",
        [planes, None, None, sizes.outputs[0]],
        {"coordinate_transformation_mode": "align_corners", "mode": "linear"},
    )
    total = ir.node("Add", [patches, resize.outputs[0]])
    graph.insert_after(conv, [shape, sides, sizes, resize, total])
    transpose.replace_input_with(0, total.outputs[0])
    reshape.replace_input_with(1, add_constant(graph, "token_axes", [0, -1, width]))
    ir.convenience.replace_all_uses_with(add.outputs[0], reshape.outputs[0])
    graph.remove(add, safe=True)


def _copy_tokens(graph: ir.Graph) -> None:
    """Makes Reshapes that keep the token axis copy its size instead of stating it."""
    for node in graph:
        source, target = node.inputs[:2] if node.op_type == "Reshape" else (None, None)
        if source is None or target is None or target.const_value is None or source.shape is None:
            continue
        numbers = target.const_value.numpy().tolist()
        if (
            len(numbers) > 2
            and len(source.shape) > 2
            and numbers[1] == source.shape[1]
            and isinstance(source.shape[1], int)
        ):
            node.replace_input_with(1, add_constant(graph, "token_axes", [numbers[0], 0, *numbers[2:]]))


def _open_slices(graph: ir.Graph) -> None:
    """Makes Slices that cut off a class token keep all tokens after it, however many there are."""
    for node in graph:
        source, ends = (node.inputs[0], node.inputs[2]) if node.op_type == "Slice" else (None, None)
        axes = node.inputs[3] if len(node.inputs) > 3 else None
        if source is None or ends is None or axes is None or source.shape is None or len(source.shape) != 3:
            continue
        if ends.const_value is None or axes.const_value is None or axes.const_value.numpy().tolist() != [1]:
            continue
        if ends.const_value.numpy().tolist() == [source.shape[1]]:
            node.replace_input_with(2, add_constant(graph, "to_the_end", [np.iinfo(np.int64).max]))


def _forget_shapes(graph: ir.Graph, conv: ir.Node, reshape: ir.Node) -> None:
    """Drops the shapes of the traced size, so that inference finds them anew; names dimensions that it cannot recognise
    as equal."""
    tokens = reshape.outputs[0]
    assert tokens.shape is not None
    width = tokens.shape[-1]
    for node in graph:
        for value in node.outputs:
            value.shape = None
    conv.outputs[0].shape = ir.Shape(["batch", width, "rows", "columns"])
    for node in graph:
        if node.op_type == "Concat" and tokens in node.inputs:  # after the class token
            node.outputs[0].shape = ir.Shape(["batch", "tokens", width])
    tokens.shape = ir.Shape(["batch", "patches", width])
