"""What quantization reads from a graph: blocks, names of nodes, weights, tensors."""

import collections
import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

import numpy as np
import onnx_ir as ir

from vit_convert.core.bundle import hash_file
from vit_convert.core.layer_names import block_of, kind_of, layer_of, within_block

T = TypeVar("T")

_MOVING = frozenset({"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Identity"})

DEQUANTIZED = "/dequantized"  # suffix of a tensor's name after its Q/DQ pair


@dataclasses.dataclass(frozen=True)
class Layer:
    """The name of a linear.

    Attributes:
        block: "block_03"; for a model without blocks, and outside them, the scope that contains the layer, or the layer
            itself.
        kind: "fc1", "qkv", …, or the layer's own name.
    """

    block: str
    kind: str

    @property
    def name(self) -> str:
        """ "block_03/fc2"."""
        return f"{self.block}/{self.kind}"


def linear_weight(node: ir.Node) -> ir.Value | None:
    """The weight of a linear: a MatMul, Gemm or Conv of an activation with a constant; None for any other node.

    The weight of a matrix product is a matrix [K, N], that of a convolution has any kernel. A weight after a Q/DQ pair
    counts too.
    """
    if node.op_type not in ("MatMul", "Gemm", "Conv"):
        return None
    x, weight = node.inputs[:2]
    if x is None or x.is_initializer() or weight is None or _stored(weight) is None:
        return None
    if node.op_type != "Conv" and (weight.shape is None or len(weight.shape) != 2):
        return None
    turned = node.op_type == "Gemm" and any(
        node.attributes[key].as_int() for key in ("transA", "transB") if key in node.attributes
    )
    return None if turned else weight


def weight_name(weight: ir.Value) -> str:
    """The name of a linear's weight, even if the linear reads it through a Q/DQ pair."""
    return (weight.name or "").removesuffix(DEQUANTIZED)


def _stored(value: ir.Value) -> ir.Value | None:
    """The initializer that a value is, or is dequantized from."""
    while (
        (node := value.producer()) is not None
        and node.op_type in ("QuantizeLinear", "DequantizeLinear")
        and node.inputs[0] is not None
    ):
        value = node.inputs[0]
    return value if value.const_value is not None else None


def linear_layers(graph: ir.Graph) -> dict[ir.Node, Layer]:
    """Names the linears of a graph; two of them share a name only if they read the same weight.

    Args:
        graph: any.

    Returns:
        The Layer of each linear, in graph order.
    """
    weights = {node: weight_name(weight) for node in graph if (weight := linear_weight(node)) is not None}
    found = {node: _short_name(name) for node, name in weights.items()}
    for name_longer in (_long_name, _full_name):
        readers: dict[Layer, set[str]] = collections.defaultdict(set)
        for node, layer in found.items():
            readers[layer].add(weights[node])
        found = {
            node: name_longer(weights[node]) if len(readers[layer]) > 1 else layer for node, layer in found.items()
        }
    return found


def _short_name(weight: str) -> Layer:
    if block := block_of(weight):
        return Layer(block, kind_of(weight))
    return _scoped(layer_of(weight))


def _long_name(weight: str) -> Layer:
    """The name with the path within the block: "block_00/attn/out", if the block has another "out"."""
    block = block_of(weight)
    return _scoped(f"{block}/{within_block(layer_of(weight))}") if block else _scoped(layer_of(weight))


def _full_name(weight: str) -> Layer:
    return _scoped(weight)


def _scoped(layer: str) -> Layer:
    scope, _, kind = layer.rpartition("/")
    return Layer(scope or layer, kind)


def node_blocks(graph: ir.Graph) -> dict[ir.Node, str | None]:
    """Assigns each node to a block.

    A node belongs to the block in its own or its weights' names; a node without one (a Softmax, a residual Add) belongs
    to the latest block among those that feed it. Weights with a scope outside the blocks (encoder_norm, head) end the
    last block. If no name contains a block, as in a model with arbitrary layer names, the scopes of its layers serve as
    blocks.

    Args:
        graph: in topological order.

    Returns:
        Block name, or None outside the blocks, for each node.
    """
    said = {node: _said(node) for node in graph}
    has_blocks = any(block for block, _ in said.values())
    order: dict[str, int] = {}  # the order of blocks, by their first node
    blocks: dict[ir.Node, str | None] = {}
    for node, (block, scopes) in said.items():
        if block:
            blocks[node] = block
        elif scopes:
            blocks[node] = None if has_blocks else _scoped(layer_of(scopes[0])).block
        else:
            blocks[node] = max(
                (b for p in node.predecessors() if (b := blocks[p])), key=order.__getitem__, default=None
            )
        if found := blocks[node]:
            order.setdefault(found, len(order))
    return blocks


def _said(node: ir.Node) -> tuple[str | None, list[str]]:
    """The block in a node's names, and the names of its weights: those with a scope, and a linear's."""
    if node.op_type in ("QuantizeLinear", "DequantizeLinear"):  # whose scale and zero point are named after the tensor
        tensor = node.inputs[0]
        weights = (
            [weight_name(node.outputs[0]).removesuffix("/quantized")]
            if tensor is not None and _stored(tensor) is not None
            else []
        )
    else:
        weights = [
            v.name or "" for v in node.inputs if v is not None and v.is_initializer() and v.name and "/" in v.name
        ]
    if (linear := linear_weight(node)) is not None and weight_name(linear) not in weights:
        weights.insert(0, weight_name(linear))
    block = next((found for name in (node.name or "", *weights) if (found := block_of(name))), None)
    return block, weights


def names_by_node(graph: ir.Graph, blocks: Mapping[ir.Node, str | None]) -> dict[ir.Node, set[str]]:
    """Collects the names by which a pattern may refer to each node: its own, its outputs', its weights', "block_03" and
    "block_03/fc2".

    Args:
        graph: any.
        blocks: from `node_blocks`.
    """
    layers = linear_layers(graph)
    return {node: _names(node, block, layers.get(node)) for node, block in blocks.items()}


def _names(node: ir.Node, block: str | None, layer: Layer | None) -> set[str]:
    weights = {v.name for v in node.inputs if v is not None and v.is_initializer() and v.name and "/" in v.name}
    names = {node.name, *(v.name for v in node.outputs), *weights}
    if block:
        names |= {block, *(f"{block}/{kind_of(name)}" for name in weights if block_of(name))}
    if layer:
        weight = linear_weight(node)
        names |= {layer.block, layer.name, weight_name(weight) if weight is not None else None}
    return {name for name in names if name}


def read_weight(tensor: ir.TensorProtocol, read: Callable[[np.ndarray], T]) -> T:
    """Computes something from a weight and releases it, so that only one weight of a model is in memory at a time.

    Args:
        tensor: in memory, lazy or in external data.
        read: what to compute; must not return a view.

    Returns:
        What `read` returns.
    """
    mapped_here = isinstance(tensor, ir.ExternalTensor) and tensor.raw is None
    # if this fails, even by Ctrl-C, its traceback holds the weight, which then cannot be released
    result = read(tensor.numpy())
    if isinstance(tensor, ir.ExternalTensor) and mapped_here:  # a caller's own views of the mapping stay valid
        tensor.release()
    return result


def derived(
    tensor: ir.TensorProtocol, dtype: ir.DataType, compute: Callable[[np.ndarray], np.ndarray], name: str
) -> ir.LazyTensor:
    """Makes a weight that is computed from another one of the same shape each time it is read, which happens once, on
    saving."""
    return ir.LazyTensor(
        lambda: ir.tensor(read_weight(tensor, compute), dtype=dtype), dtype, ir.Shape(tensor.shape.numpy()), name=name
    )


def initializer(graph: ir.Graph, tensor: ir.TensorProtocol) -> ir.Value:
    """Registers a weight under the tensor's name and returns its value."""
    value = ir.Value(
        name=tensor.name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy()), const_value=tensor
    )
    graph.register_initializer(value)
    return value


def activations(graph: ir.Graph) -> list[str]:
    """Lists the float32 tensors that depend on the input, in graph order, inputs first: everything that a full range
    scan measures."""
    reached = {v for v in graph.inputs if not v.is_initializer()}
    names = [v.name for v in graph.inputs if v in reached and v.dtype == ir.DataType.FLOAT]
    for node in graph:
        if any(v in reached for v in node.inputs if v is not None):
            reached.update(node.outputs)
            names += [v.name for v in node.outputs if v.dtype == ir.DataType.FLOAT]
    return [name for name in names if name]


def moved(graph: ir.Graph) -> dict[str, str]:
    """The values that hold the numbers of another one in another shape or order: by name, the name of the first such
    one."""
    found: dict[str, str] = {}
    for node in graph:
        source = node.inputs[0] if node.op_type in _MOVING else None
        if source is not None and source.name and node.outputs[0].name:
            found[node.outputs[0].name] = found.get(source.name, source.name)
    return found


def distinct_activations(graph: ir.Graph) -> list[str]:
    """The activations but for those that hold the numbers of another one; see `moved`."""
    same = moved(graph)
    return [name for name in activations(graph) if name not in same]


def hash_model(path: str | os.PathLike[str]) -> str:
    """The sha256 of an ONNX file together with its external data."""
    digest = hashlib.sha256(hash_file(path).encode())
    for data in sorted({t.path for t in _tensors(ir.load(path)) if isinstance(t, ir.ExternalTensor)}):
        digest.update(hash_file(data).encode())
    return digest.hexdigest()


def _tensors(model: ir.Model) -> Iterator[ir.TensorProtocol]:
    return (v.const_value for v in model.graph.initializers.values() if v.const_value is not None)
