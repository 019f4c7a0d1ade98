"""Zero points for symmetric INT8: half of a one-sided tensor's steps represent values that it never takes, so its
middle is subtracted.

GELU never returns less than -0.17, but has a few large positive values; in symmetric INT8, the only kind that TensorRT
multiplies fast, 120 of its 127 negative steps are never used. The constant c in the middle of the range is subtracted
before the tensor is quantized, and restored by the bias of the linears that read it: x W + b = (x - c) W + (b + c · the
sum of W's rows). Steps become up to half as large, and the squared error a quarter. This is exact if the sums are of
the quantized weights.

Source: the zero point of asymmetric quantization, Jacob et al., arXiv:1712.05877, moved into the graph; shifts moved
into the next layer's bias: Wei et al., "Outlier Suppression+", arXiv:2304.09145.
"""

from collections.abc import Collection, Sequence

import numpy as np
import onnx_ir as ir

from vit_convert.quantize.graph import derived, initializer
from vit_convert.quantize.guard import is_product
from vit_convert.quantize.placement import Site

SHIFTED = "/shifted"  # suffix of the name of a tensor minus its constant


def shiftable(model: ir.Model, sites: Sequence[Site]) -> tuple[set[str], set[str]]:
    """Finds the tensors whose quantized readers are all products with a weight, so that the readers' biases can restore
    a constant.

    Args:
        model: the fp32 graph.
        sites: what may be quantized.

    Returns:
        Those where the constant is subtracted from their producer's bias, for free; and those where it needs a
        subtraction.
    """
    values = {v.name: v for node in model.graph for v in node.outputs}
    able: dict[str, bool] = {}
    for site in sites:
        node = values[site.node].producer()
        able[site.tensor] = able.get(site.tensor, True) and bool(site.weight) and _takes_it_back(node, site.tensor)
    readers = {
        name: {site.node for site in sites if site.tensor == name}
        for name, found in able.items()
        if found and name in values
    }
    free = {name for name, nodes in readers.items() if _is_free(values[name], nodes)}
    return free, readers.keys() - free


def _takes_it_back(node: ir.Node | None, tensor: str) -> bool:
    """Whether a node multiplies the tensor itself by a weight, with a bias added only to the product."""
    if node is None or node.inputs[0] is None or node.inputs[0].name != tensor or not is_product(node):
        return False
    return all(node.attributes[key].as_float() == 1 for key in ("alpha", "beta") if key in node.attributes)


def _is_free(x: ir.Value, readers: set[str]) -> bool:
    """Whether a bias can absorb the constant, because only these nodes read the tensor."""
    return (
        _bias_of(x.producer()) is not None
        and not x.is_graph_output()
        and {user.outputs[0].name for user, _ in x.uses()} <= readers
    )


def subtract(graph: ir.Graph, x: ir.Value, offset: float) -> tuple[ir.Value, list[ir.Node]]:
    """x minus a constant, and the node that computes it, which belongs after x."""
    constant = initializer(graph, ir.tensor(np.array(offset, np.float32), name=f"{x.name}{SHIFTED}/offset"))
    node = ir.node("Sub", [x, constant], name=f"{x.name}{SHIFTED}")
    result = node.outputs[0]
    result.name, result.dtype, result.shape = f"{x.name}{SHIFTED}", ir.DataType.FLOAT, x.shape
    return result, [node]


def add_back(graph: ir.Graph, x: ir.Value, shifted: ir.Value, name: str) -> tuple[ir.Value, ir.Node]:
    """Adds the constant of x back after quantization, under a name, if no bias may change; returns the value and the
    node."""
    node = ir.node("Add", [shifted, graph.initializers[f"{x.name}{SHIFTED}/offset"]], name=name)
    node.outputs[0].name, node.outputs[0].dtype, node.outputs[0].shape = name, ir.DataType.FLOAT, x.shape
    return node.outputs[0], node


def fold_into_producers(graph: ir.Graph, tensors: Collection[str]) -> None:
    """Subtracts the constants of tensors from their producers' biases if there are no other readers, so that no
    subtraction remains."""
    values = {v.name: v for node in graph for v in node.outputs}
    for name in tensors:
        sub, x = values[f"{name}{SHIFTED}"].producer(), values[name]
        assert sub is not None and sub.inputs[1] is not None and sub.inputs[1].const_value is not None
        bias = _bias_of(x.producer())
        if bias is not None and not x.is_graph_output() and [user for user, _ in x.uses()] == [sub]:
            bias.const_value = _plus(bias, -sub.inputs[1].const_value.numpy())
            for user, index in tuple(sub.outputs[0].uses()):
                user.replace_input_with(index, x)


def _bias_of(node: ir.Node | None) -> ir.Value | None:
    """The bias of a LayerNorm or linear, if only this node reads it."""
    if node is None:
        return None
    inputs = node.inputs[2:3] if node.op_type == "LayerNormalization" else node.inputs if node.op_type == "Add" else []
    found = [
        v
        for v in inputs
        if v is not None and v.is_initializer() and v.const_value is not None and v.const_value.size > 1
    ]
    return found[0] if len(found) == 1 and len(found[0].uses()) == 1 else None


def add_to_bias(graph: ir.Graph, node: ir.Node, extra: np.ndarray) -> None:
    """Adds to a linear's bias.

    Args:
        graph: of the node.
        node: MatMul, Gemm or Conv.
        extra: [N] float32.
    """
    value = own_bias(node, len(extra))
    if value is not None:
        value.const_value = _plus(value, extra)
        return
    output = node.outputs[0]
    along = extra.reshape(-1, 1, 1) if node.op_type == "Conv" else extra  # has two axes, see is_product
    constant = initializer(graph, ir.tensor(along, name=f"{output.name}{SHIFTED}/bias"))
    readers = tuple(output.uses())
    name, output.name = output.name, f"{output.name}{SHIFTED}"
    add = ir.node("Add", [output, constant], name=f"{name}{SHIFTED}/Add")
    result = add.outputs[0]
    result.name, result.dtype, result.shape = name, ir.DataType.FLOAT, output.shape
    for user, index in readers:
        user.replace_input_with(index, result)
    graph.insert_after(node, add)
    for index, value in enumerate(graph.outputs):
        if value is output:
            graph.outputs[index] = result


def own_bias(node: ir.Node, size: int) -> ir.Value | None:
    """The bias [size] that a linear (MatMul, Gemm or Conv) alone reads; None if it has none."""
    if node.op_type == "MatMul":
        users = [user for user, _ in node.outputs[0].uses()]
        alone = len(users) == 1 and users[0].op_type == "Add" and not node.outputs[0].is_graph_output()
        candidates: Sequence[ir.Value | None] = users[0].inputs if alone else ()
    else:
        candidates = node.inputs[2:3]
    for value in candidates:
        fits = value is not None and value.is_initializer() and value.const_value is not None and len(value.uses()) == 1
        if fits and value.const_value.size == size:  # type: ignore[union-attr]
            return value
    return None


def _plus(value: ir.Value, extra: np.ndarray) -> ir.TensorProtocol:
    tensor = value.const_value
    assert tensor is not None
    shape = tensor.shape.numpy() if extra.size > 1 else ()
    return derived(
        tensor, ir.DataType.FLOAT, lambda bias: (bias + extra.reshape(shape)).astype(np.float32), value.name or ""
    )
