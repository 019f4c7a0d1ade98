"""Rotates the residual stream: weights are changed, exactly, until no channel stands out and INT8 has steps for all.

A trained transformer keeps a few channels of its stream far larger than the others. One scale for a LayerNorm's output
leaves the others a few steps. What the model computes does not change when
- a LayerNorm's scale and bias are multiplied into the linears that read it,
- what writes the stream writes no mean, which every LayerNorm takes off again,
- it writes Q x instead of x, and the linears behind the LayerNorms read Q y: of an orthogonal Q that keeps the vector
  of ones, mean and variance of Q x are those of x, so that the LayerNorm between gives Q y by itself.
The graph keeps its nodes. Only where something else than a linear reads the last LayerNorm, a product turns it back.

Source: Ashkboos et al., "SliceGPT", arXiv:2401.15024, section 3, and "QuaRot", arXiv:2404.00456; there LayerNorm
becomes RMSNorm, here Q keeps the mean.
"""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from vit_convert.core.onnx_file import ROTATED
from vit_convert.quantize.graph import derived, initializer, read_weight
from vit_convert.quantize.rotation import centred, rotate, weighted_rows
from vit_convert.quantize.shift import add_to_bias, own_bias
from vit_convert.quantize.stream import Constant, Declined, Norm, Other, Stream, is_norm, stream_of


@dataclasses.dataclass(frozen=True)
class RotatedGraph:
    """A graph whose residual stream is rotated.

    Attributes:
        model: computes what the given one does; its weights are computed while it is saved.
        widths: of each stream that is rotated.
        norms: names of the LayerNorms' outputs that spread their channels now.
        products: names of the values behind the last LayerNorm that a product of their own turns back.
        declined: for LayerNorms' outputs whose stream is left as it is, why; one for each stream.
    """

    model: ir.Model
    widths: tuple[int, ...]
    norms: tuple[str, ...]
    products: tuple[str, ...]
    declined: dict[str, str]


def rotate_streams(model: ir.Model) -> RotatedGraph:
    """Rotates every residual stream that is one.

    Args:
        model: an fp32 graph, its weights readable and its shapes known; left as it is.

    Returns:
        The RotatedGraph; where nothing is rotated, its model computes what it did by the same weights.
    """
    model = model.clone()
    nodes, seen = list(model.graph), set[ir.Node]()
    streams: list[Stream] = []
    declined: dict[str, str] = {}
    for node in nodes:
        if not is_norm(node) or node in seen:
            continue
        try:
            stream = stream_of(node, nodes)
        except Declined as e:
            declined.setdefault(str(e), node.outputs[-1].name or "")
            continue
        seen |= {norm.node for norm in stream.norms}
        streams.append(stream)
    norms = tuple(norm.output.name or "" for stream in streams for norm in stream.norms)
    products = [name for stream in streams for name in _rotate(model.graph, stream)]
    if streams:
        model.metadata_props[ROTATED] = "yes"
    return RotatedGraph(
        model=model,
        widths=tuple(stream.width for stream in streams),
        norms=norms,
        products=tuple(products),
        declined={name: reason for reason, name in declined.items()},
    )


def _rotate(graph: ir.Graph, stream: Stream) -> list[str]:
    """Changes the weights around one stream, in place; returns the values that products turn back."""
    products, writing = [], {constant.node for constant in stream.writers}
    for norm in stream.norms:
        scale, bias = _take_parameters(graph, norm, stream.width)
        for node in dict.fromkeys(norm.readers):
            _read_rotated(graph, node, scale, bias, writes=node in writing)
        for other in norm.others:
            products.append(other.value.name or "")
            _turn_back(graph, other, scale, bias)
    for constant in stream.writers:
        _change(graph, constant.node, constant.index, _written(constant))
    return products


def _take_parameters(graph: ir.Graph, norm: Norm, width: int) -> tuple[np.ndarray, np.ndarray]:
    """A LayerNorm's scale and bias, each float64 [width]; it is left with ones and zeros."""
    node = norm.node
    first = 1 if node.op_type == "LayerNormalization" else len(node.inputs) - 2
    found = [np.ones(width), np.zeros(width)]
    for i, neutral in enumerate(tuple(found)):
        value = node.inputs[first + i] if first + i < len(node.inputs) else None
        if value is not None and value.const_value is not None:
            found[i] = read_weight(value.const_value, lambda array: array.astype(np.float64).reshape(-1))
            _change(graph, node, first + i, functools.partial(_in_place_of, neutral))
    return found[0], found[1]


def _in_place_of(new: np.ndarray, old: np.ndarray) -> np.ndarray:
    return new.reshape(old.shape)


def _read_rotated(graph: ir.Graph, node: ir.Node, scale: np.ndarray, bias: np.ndarray, *, writes: bool) -> None:
    """Has a linear read Q y, where it read scale · y + bias; one that writes the stream too gets Q of what it adds."""
    weight = node.inputs[1]
    assert weight is not None and weight.const_value is not None
    if bias.any():
        extra = read_weight(weight.const_value, lambda array: weighted_rows(bias, _matrix(array)))
        if writes and own_bias(node, len(extra)) is None:  # a bias of its own is rotated with all that writes
            extra = rotate(centred(extra, 0), 0)
        add_to_bias(graph, node, extra.astype(np.float32))

    def changed(array: np.ndarray) -> np.ndarray:
        axis = 1 if array.ndim == 4 else 0
        along = scale.reshape([-1 if i == axis else 1 for i in range(array.ndim)])
        return rotate(array.astype(np.float64) * along, axis)

    _change(graph, node, 1, changed)


def _matrix(array: np.ndarray) -> np.ndarray:
    """A linear's weight as [K, N]."""
    return array.reshape(array.shape[:2]).T if array.ndim == 4 else array


def _written(constant: Constant) -> Callable[[np.ndarray], np.ndarray]:
    return lambda array: rotate(centred(array, constant.axis), constant.axis)


def _turn_back(graph: ir.Graph, other: Other, scale: np.ndarray, bias: np.ndarray) -> None:
    """Gives what is no linear scale · Qᵀ x + bias instead of x, under the value's name."""
    value, name = other.value, other.value.name or ""
    convolution = other.axis != len(value.shape or ()) - 1
    matrix, offset = rotate(np.diag(scale)), bias
    if convolution:
        matrix, offset = matrix.T[:, :, None, None], offset[:, None, None]
    weights = [
        initializer(graph, ir.tensor(np.ascontiguousarray(array, dtype=np.float32), name=f"{name}/rotated/{word}"))
        for array, word in ((matrix, "kernel"), (offset, "bias"))
    ]
    product = ir.node("Conv" if convolution else "MatMul", [value, weights[0]], name=f"{name}/rotated/product")
    sum_ = ir.node("Add", [product.outputs[0], weights[1]], name=f"{name}/rotated/Add")
    result, producer = sum_.outputs[0], value.producer()
    for output in (product.outputs[0], result):
        output.type, output.shape = value.type, value.shape
    product.outputs[0].name, value.name, result.name = f"{name}/rotated/product", f"{name}/rotated", name
    for node, index in other.uses:
        node.replace_input_with(index, result)
    for index, given in enumerate(graph.outputs):
        if given is value:
            graph.outputs[index] = result
    assert producer is not None
    graph.insert_after(producer, [product, sum_])


def _change(graph: ir.Graph, node: ir.Node, index: int, compute: Callable[[np.ndarray], np.ndarray]) -> None:
    """Gives a node its constant changed, float32; other readers keep it as it was."""
    value = node.inputs[index]
    assert value is not None and value.const_value is not None
    name = value.name or ""
    shared = len(value.uses()) > 1
    tensor = derived(
        value.const_value,
        ir.DataType.FLOAT,
        lambda array: np.ascontiguousarray(compute(array), dtype=np.float32),
        f"{node.name}/{name}" if shared else name,
    )
    if shared:
        node.replace_input_with(index, initializer(graph, tensor))
    else:
        value.const_value = tensor
