"""What quantization reads from a graph: blocks, names of nodes, weights, tensors."""

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

import numpy as np
import onnx_ir as ir

from vit_convert.bundle import hash_file
from vit_convert.layer_names import block_of, kind_of

T = TypeVar("T")

DEQUANTIZED = "/dequantized"  # what a tensor's name ends in after its Q/DQ pair


def node_blocks(graph: ir.Graph) -> dict[ir.Node, str | None]:
    """Assigns each node to an encoder block.

    A node belongs to the block that its own name or its weights' names say; one that says nothing (a Softmax, a residual Add) to the latest
    block among those that feed it. Weights with a scope outside the blocks (encoder_norm, head) end the last block.

    Args:
        graph: in topological order.

    Returns:
        Block name, or None outside the blocks, for each node.
    """
    blocks: dict[ir.Node, str | None] = {}
    for node in graph:
        weights = [v.name or "" for v in node.inputs if v is not None and v.is_initializer()]
        said = [block for name in (node.name or "", *weights) if (block := block_of(name))]
        if said:
            blocks[node] = said[0]
        elif any("/" in name for name in weights):
            blocks[node] = None
        else:
            blocks[node] = max((b for p in node.predecessors() if (b := blocks[p])), default=None)
    return blocks


def names_by_node(blocks: Mapping[ir.Node, str | None]) -> dict[ir.Node, set[str]]:
    """Collects the names under which a pattern may mean each node: its own, its outputs', its weights' and "block_03", "block_03/fc2".

    Args:
        blocks: from `node_blocks`.
    """
    return {node: _names(node, block) for node, block in blocks.items()}


def _names(node: ir.Node, block: str | None) -> set[str]:
    weights = {v.name for v in node.inputs if v is not None and v.is_initializer() and v.name and "/" in v.name}
    names = {node.name, *(v.name for v in node.outputs), *weights}
    if block:
        names |= {block, *(f"{block}/{kind_of(name)}" for name in weights)}
    return {name for name in names if name}


def read_weight(tensor: ir.TensorProtocol, read: Callable[[np.ndarray], T]) -> T:
    """Computes something from a weight and lets go of it, so that only one weight of a model is in memory at a time.

    Args:
        tensor: in memory, lazy or in external data.
        read: what to compute; must not return a view.

    Returns:
        What `read` returns.
    """
    mapped_here = isinstance(tensor, ir.ExternalTensor) and tensor.raw is None
    try:
        return read(tensor.numpy())
    finally:
        if isinstance(tensor, ir.ExternalTensor) and mapped_here:  # a caller's own views of the mapping stay valid
            tensor.release()


def derived(tensor: ir.TensorProtocol, dtype: ir.DataType, compute: Callable[[np.ndarray], np.ndarray], name: str) -> ir.LazyTensor:
    """Makes a weight of the same shape that is computed from another one each time it is read, which is once, when it is saved."""
    return ir.LazyTensor(lambda: ir.tensor(read_weight(tensor, compute), dtype=dtype), dtype, ir.Shape(tensor.shape.numpy()), name=name)


def initializer(graph: ir.Graph, tensor: ir.TensorProtocol) -> ir.Value:
    """Registers a weight under the tensor's name and returns its value."""
    value = ir.Value(name=tensor.name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy()), const_value=tensor)
    graph.register_initializer(value)
    return value


def activations(graph: ir.Graph) -> list[str]:
    """Lists the float32 tensors that depend on the input, in graph order, the inputs first: what a full range scan measures."""
    reached = {v for v in graph.inputs if not v.is_initializer()}
    names = [v.name for v in graph.inputs if v in reached and v.dtype == ir.DataType.FLOAT]
    for node in graph:
        if any(v in reached for v in node.inputs if v is not None):
            reached.update(node.outputs)
            names += [v.name for v in node.outputs if v.dtype == ir.DataType.FLOAT]
    return [name for name in names if name]


def hash_model(path: str | os.PathLike[str]) -> str:
    """The sha256 of an ONNX file together with its external data."""
    digest = hashlib.sha256(hash_file(path).encode())
    for data in sorted({t.path for t in _tensors(ir.load(path)) if isinstance(t, ir.ExternalTensor)}):
        digest.update(hash_file(data).encode())
    return digest.hexdigest()


def _tensors(model: ir.Model) -> Iterator[ir.TensorProtocol]:
    return (v.const_value for v in model.graph.initializers.values() if v.const_value is not None)
