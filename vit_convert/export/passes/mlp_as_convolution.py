"""MLPs as 1 × 1 convolutions over tokens [batch · tokens, width, 1, 1]: TensorRT 8.6 computes GELU inside the kernel of
such a convolution.

After a matrix product, GELU is a kernel of its own that reads and writes the widest tensors of the model. The residual
stream and the LayerNorms use the same layout, so that nothing is copied in between; attention remains a product over
[batch, tokens, width], the form that TensorRT fuses.
"""

import math
from typing import Any

import onnx_ir as ir

from vit_convert.export.passes.contract import GraphPass, needed_nodes
from vit_convert.export.passes.prune_to_pooled_token import ELEMENTWISE
from vit_convert.export.weights import add_constant, convolution_kernel, replace_weight, weight_of

_TOKENS = "vit_convert.tokens"  # metadata key: the number of tokens of an image, stored with a flat value


def mlps_to_convolutions(model: ir.Model) -> int:
    """Turns fc1 → activation → fc2 after a LayerNorm into convolutions, and everything between them into their layout,
    in place.

    Args:
        model: a ViT whose Dense layers are MatMul + Add over [batch, tokens, width] with a fixed number of tokens;
            weights described.

    Returns:
        The number of MLPs.
    """
    graph, nodes = model.graph, list(model.graph)
    mlps = [mlp for node in nodes if _reads_norm_alone(node) and (mlp := _mlp(node)) is not None]
    dense = {layer: bias for mlp in mlps for layer, bias in mlp.items()}
    if not mlps:
        return 0
    layout = _Layout(graph)
    for node in nodes:
        if node in dense:
            _dense_to_convolution(layout, node, dense[node])
        elif _is_norm_of_dense(node):
            _flatten_norm(layout, node)
        elif layout.reads_flat(node) and _is_elementwise(node):
            layout.rewrite(node, node.op_type, list(node.inputs), dict(node.attributes))
    return len(mlps)


def flat_is_flat(model: ir.Model) -> str:
    """Every value in the layout of convolutions has four axes, the last two of length 1."""
    for node in needed_nodes(model):
        for value in node.outputs:
            flat = value.shape is not None and len(value.shape) == 4 and tuple(value.shape[2:]) == (1, 1)
            if _TOKENS in value.meta and not flat:
                return f"{value.name} {value.shape} is not [batch · tokens, width, 1, 1]"
    return ""


MLPS_TO_CONVOLUTIONS = GraphPass(mlps_to_convolutions, ensures=(flat_is_flat,))


def as_tokens(graph: ir.Graph, value: ir.Value) -> ir.Value:
    """A flat value as [batch, tokens, width], under its own name; any other value as it is."""
    producer = value.producer()
    if _TOKENS not in value.meta or producer is None or value.shape is None:
        return value
    shape = add_constant(graph, "tokens", [-1, value.meta[_TOKENS], value.shape[1]])  # type: ignore[list-item]
    node = ir.node("Reshape", [value, shape], name=f"{value.name}/Reshape")
    result = node.outputs[0]
    result.type, result.shape = value.type, ir.Shape(["batch", value.meta[_TOKENS], value.shape[1]])
    result.name, value.name = value.name, f"{value.name}/flat"
    graph.insert_after(producer, node)
    return result


def _mlp(first: ir.Node) -> dict[ir.Node, ir.Node] | None:
    """The MatMuls of fc1 and fc2 with their bias Adds; None unless a single Dense follows fc1 through elementwise
    nodes."""
    add = _bias(first)
    inside: set[ir.Node] = set()
    ends: set[ir.Node] = set()
    stack = [user for user, _ in add.outputs[0].uses()] if add is not None else []
    while stack:
        node = stack.pop()
        if not _is_elementwise(node):
            ends.add(node)
        elif node not in inside:
            inside.add(node)
            stack += [user for user, _ in node.outputs[0].uses()]
    second = ends.pop() if len(ends) == 1 else None
    after = _bias(second) if second is not None else None
    if add is None or second is None or after is None or not inside:
        return None
    return {first: add, second: after}


def _reads_norm_alone(node: ir.Node) -> bool:
    source = node.inputs[0] if node.op_type == "MatMul" else None
    norm = source.producer() if source is not None else None
    if source is None or norm is None or norm.op_type != "LayerNormalization":
        return False
    return len(source.uses()) == 1 and _has_fixed_tokens(source)


def _has_fixed_tokens(value: ir.Value) -> bool:
    return (
        value.shape is not None
        and len(value.shape) == 3
        and all(isinstance(dim, int) for dim in tuple(value.shape)[1:])
    )


def _sizes(value: ir.Value) -> tuple[int, int]:
    """Tokens and width of [batch, tokens, width]."""
    assert value.shape is not None
    _, tokens, width = value.shape
    assert isinstance(tokens, int) and isinstance(width, int)
    return tokens, width


def _is_norm_of_dense(node: ir.Node) -> bool:
    if (
        node.op_type != "LayerNormalization"
        or not _has_fixed_tokens(node.outputs[0])
        or not all(map(weight_of, node.inputs[1:]))
    ):
        return False
    return any(user.op_type == "MatMul" and weight_of(user.inputs[1]) is not None for user, _ in node.outputs[0].uses())


def _is_elementwise(node: ir.Node) -> bool:
    """Whether a node computes [batch, tokens, width] element by element from such tensors and scalars."""
    shape = node.outputs[0].shape
    return (
        node.op_type in ELEMENTWISE
        and _has_fixed_tokens(node.outputs[0])
        and all(
            value is not None
            and (value.shape == shape or (value.const_value is not None and value.const_value.size == 1))
            for value in node.inputs
        )
    )


def _bias(node: ir.Node) -> ir.Node | None:
    """The Add that gives a weight's MatMul its bias, if that is the product's only reader."""
    weight = weight_of(node.inputs[1]) if node.op_type == "MatMul" else None
    uses = [user for user, _ in node.outputs[0].uses()]
    if weight is None or len(weight.shape) != 2 or len(uses) != 1 or uses[0].op_type != "Add":
        return None
    bias = weight_of(uses[0].inputs[1])
    is_vector = bias is not None and bias.shape[-1:] == weight.shape[1:] and math.prod(bias.shape) == weight.shape[1]
    return uses[0] if is_vector else None  # [N], or [1, 1, N] for a bias that is added by hand


def _dense_to_convolution(layout: "_Layout", product: ir.Node, add: ir.Node) -> None:
    kernel, bias = product.inputs[1], add.inputs[1]
    weight = weight_of(kernel)
    assert kernel is not None and weight is not None
    columns = weight.shape[1]
    if (vector := weight_of(bias)) is not None and bias is not None and len(vector.shape) > 1:
        bias = replace_weight(layout.graph, bias, vector.then((columns,), lambda array: array.reshape(columns)))
    turned = replace_weight(layout.graph, kernel, convolution_kernel(weight))
    layout.rewrite(add, "Conv", [product.inputs[0], turned, bias], {"kernel_shape": [1, 1]})


def _flatten_norm(layout: "_Layout", norm: ir.Node) -> None:
    parameters = []
    for value in norm.inputs[1:]:
        weight = weight_of(value)
        assert value is not None and weight is not None
        parameters.append(
            replace_weight(
                layout.graph, value, weight.then((*weight.shape, 1, 1), lambda vector: vector[:, None, None])
            )
        )
    epsilon = norm.attributes["epsilon"].as_float() if "epsilon" in norm.attributes else 1e-5
    layout.rewrite(norm, "LayerNormalization", [norm.inputs[0], *parameters], {"axis": 1, "epsilon": epsilon})


class _Layout:
    """Puts nodes into the flat layout [batch · tokens, width, 1, 1], each between two Reshapes, and skips pairs of
    Reshapes that cancel.

    Args:
        graph: the graph to rewrite.

    Attributes:
        graph: the same.
    """

    def __init__(self, graph: ir.Graph):
        self.graph = graph
        self._flat: dict[ir.Value, ir.Value] = {}  # flat values, by the value in its own layout

    def reads_flat(self, node: ir.Node) -> bool:
        """Whether an operand of a node exists in the flat layout."""
        return any(value in self._flat for value in node.inputs if value is not None)

    def rewrite(self, old: ir.Node, op_type: str, inputs: list[ir.Value | None], attributes: dict[str, Any]) -> None:
        """Computes in the flat layout what `old` did.

        Args:
            old: the node to replace; its output is [batch, tokens, width].
            op_type: of the new node.
            inputs: of the new node; those of the shape [batch, tokens, width] are flattened.
            attributes: of the new node.
        """
        tokens_of = {value for value in (*old.inputs, inputs[0]) if value is not None and _has_fixed_tokens(value)}
        flattened = [
            self._flatten(value, old) if value is not None and value in tokens_of else value for value in inputs
        ]
        node = ir.node(op_type, flattened, attributes)
        result, flat = old.outputs[0], node.outputs[0]
        tokens, width = _sizes(result)
        flat.shape, flat.type, flat.meta[_TOKENS] = ir.Shape([None, width, 1, 1]), result.type, tokens
        back = ir.node("Reshape", [flat, add_constant(self.graph, "tokens", [-1, tokens, width])])
        back.outputs[0].shape, back.outputs[0].type = result.shape, result.type
        # the graph's output keeps its layout; a tap need not
        named = back.outputs[0] if result.is_graph_output() else flat
        named.name, result.name = result.name, None
        self.graph.insert_before(old, [node, back])
        ir.convenience.replace_all_uses_with(result, back.outputs[0], replace_graph_outputs=True)
        self.graph.remove(old, safe=True)
        self._flat[back.outputs[0]] = flat

    def _flatten(self, value: ir.Value, before: ir.Node) -> ir.Value:
        if value not in self._flat:
            _, width = _sizes(value)
            node = ir.node("Reshape", [value, add_constant(self.graph, "flat", [-1, width, 1, 1])])
            node.outputs[0].shape, node.outputs[0].type = ir.Shape([None, width, 1, 1]), value.type
            self.graph.insert_before(before, node)
            self._flat[value] = node.outputs[0]
        return self._flat[value]
