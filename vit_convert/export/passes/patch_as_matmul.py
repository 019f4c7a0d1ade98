"""The patch embedding as a matrix product: patches do not overlap, so the convolution is one GEMM over reordered
pixels."""

import math

import onnx_ir as ir

from vit_convert.export.passes.contract import GraphPass
from vit_convert.export.weights import Weight, add_constant, replace_weight, weight_of


def patch_to_matmul(model: ir.Model) -> int:
    """Turns Transpose → Conv → Transpose → Reshape → Add(position table) into Reshape → Transpose → Reshape → MatMul →
    Add, in place.

    The bias moves into the position table, which is added anyway. TensorRT 8.6 on Hopper has no fast kernel for a
    convolution with three input channels, and reformats its input and output.

    Args:
        model: the graph, input [batch, height, width, channels] of fixed size; weights described.

    Returns:
        1 if there was such an embedding, else 0.
    """
    graph = model.graph
    conv = next((node for node in graph if node.op_type == "Conv"), None)
    chain = _chain(conv) if conv is not None else None
    if conv is None or chain is None:
        return 0
    before, after, reshape, add = chain
    pixels, kernel, bias, table = (
        before.inputs[0],
        weight_of(conv.inputs[1]),
        weight_of(conv.inputs[2]),
        weight_of(add.inputs[1]),
    )
    assert (
        pixels is not None
        and pixels.shape is not None
        and kernel is not None
        and bias is not None
        and table is not None
    )
    assert conv.inputs[1] is not None and add.inputs[1] is not None
    width, channels, patch, _ = kernel.shape
    _, height_pixels, width_pixels, _ = pixels.shape
    assert isinstance(height_pixels, int) and isinstance(width_pixels, int)
    rows, columns = height_pixels // patch, width_pixels // patch

    depth = patch * patch * channels
    matrix = replace_weight(
        graph, conv.inputs[1], kernel.then((depth, width), lambda k: k.transpose(2, 3, 1, 0).reshape(depth, width))
    )
    count = len(bias.sources)
    combined = Weight(
        (*bias.sources, *table.sources),
        table.shape,
        lambda *parameters: bias.compute(*parameters[:count]) + table.compute(*parameters[count:]),
        num_read=sum(math.prod(part.shape) if part.num_read is None else part.num_read for part in (bias, table)),
    )
    positions = replace_weight(graph, add.inputs[1], combined)
    split = ir.node("Reshape", [pixels, add_constant(graph, "patch_grid", [0, rows, patch, columns, patch * channels])])
    order = ir.node("Transpose", [split.outputs[0]], {"perm": [0, 1, 3, 2, 4]})
    flat = ir.node("Reshape", [order.outputs[0], add_constant(graph, "patch_rows", [0, rows * columns, depth])])
    product = ir.node("MatMul", [flat.outputs[0], matrix])
    total = ir.node("Add", [product.outputs[0], positions])
    total.outputs[0].shape, total.outputs[0].type = add.outputs[0].shape, add.outputs[0].type
    graph.insert_before(before, [split, order, flat, product, total])
    ir.convenience.replace_all_uses_with(add.outputs[0], total.outputs[0])
    shared = any(user is not conv for user, _ in before.outputs[0].uses())  # another embedding reads the images too
    graph.remove([add, reshape, after, conv, *([] if shared else [before])], safe=True)
    return 1


PATCH_TO_MATMUL = GraphPass(patch_to_matmul)


def _chain(conv: ir.Node) -> tuple[ir.Node, ir.Node, ir.Node, ir.Node] | None:
    """The nodes around a patch convolution: Transpose to NCHW, Transpose back, Reshape to tokens and Add; None if the
    convolution is a different one."""
    source, kernel = conv.inputs[0], weight_of(conv.inputs[1])
    before = source.producer() if source is not None else None
    strides = tuple(conv.attributes["strides"].as_ints()) if "strides" in conv.attributes else ()
    if (
        before is None
        or before.op_type != "Transpose"
        or kernel is None
        or strides != kernel.shape[2:]
        or len(conv.inputs) < 3
    ):
        return None
    if tuple(before.attributes["perm"].as_ints()) != (0, 3, 1, 2) or weight_of(conv.inputs[2]) is None:
        return None
    pixels = before.inputs[0]
    if (
        pixels is None
        or pixels.shape is None
        or any(not isinstance(dim, int) or dim % strides[0] for dim in tuple(pixels.shape)[1:3])
    ):
        return None
    found, value = [], conv.outputs[0]
    for op_type in ("Transpose", "Reshape", "Add"):
        uses = [user for user, _ in value.uses()]
        if len(uses) != 1 or uses[0].op_type != op_type:
            return None
        found.append(uses[0])
        value = uses[0].outputs[0]
    return (before, found[0], found[1], found[2]) if weight_of(found[2].inputs[1]) is not None else None
