"""SmoothQuant: moves the scale of outlier channels from a LayerNorm's output into the weights that read it, which int8
tolerates better.

Activations have one scale per tensor, weights one per column, so a few large channels of a LayerNorm's output leave
only a few of the 255 steps to all others. Dividing each channel by s and multiplying the weights' rows by s changes
nothing in fp32, but evens out the channels. Linears that do not read a LayerNorm (the attention's projection, fc2) are
left alone: they follow a nonlinearity or a product of activations.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from vit_convert.core.errors import UsageError
from vit_convert.core.operators import ADD_NORM, NORM
from vit_convert.quantize.graph import derived, initializer, linear_weight, read_weight
from vit_convert.quantize.placement import Site
from vit_convert.quantize.qdq import channel_axis


@dataclasses.dataclass(frozen=True)
class Norm:
    """A LayerNorm that only linears read.

    Attributes:
        tensor: name of its output.
        parameters: (node, index of its input) of the scale and, if there is one, the bias.
        readers: the MatMuls and convolutions.
    """

    tensor: str
    parameters: tuple[tuple[ir.Node, int], ...]
    readers: tuple[ir.Node, ...]


@dataclasses.dataclass(frozen=True)
class Smoothed:
    """A smoothed graph.

    Attributes:
        model: equivalent to the given one; its weights are computed while it is saved.
        factors: for each LayerNorm's output, the divisors of its channels: [channels] float32.
        declined: for each LayerNorm's output that was left unchanged, why.
    """

    model: ir.Model
    factors: dict[str, np.ndarray]
    declined: dict[str, str]


def find_norms(model: ir.Model, sites: Sequence[Site]) -> tuple[list[Norm], dict[str, str]]:
    """Finds the LayerNorms whose output is quantized, whether they are one operator or several.

    Args:
        model: the fp32 graph.
        sites: what `placement.place` chose.

    Returns:
        The norms in graph order; and for each norm that cannot be smoothed, why.
    """
    values = {v.name: v for node in model.graph for v in node.outputs}
    norms, declined = [], {}
    for name in dict.fromkeys(
        _source(values[site.tensor]).name for site in sites if site.weight and site.tensor in values
    ):
        parameters = _parameters(values[name])
        if parameters is None:
            continue
        readers = _readers(values[name])
        if isinstance(readers, str):
            declined[name or ""] = readers
        else:
            norms.append(Norm(name or "", parameters, readers))
    return norms, declined


def smooth(
    model: ir.Model, sites: Sequence[Site], amax: Mapping[str, np.ndarray], *, strength: float = 0.5
) -> Smoothed:
    """Smooths a graph.

    Args:
        model: the fp32 graph; left as it is.
        sites: what will be quantized.
        amax: largest |x| of each channel for the outputs of `find_norms`' norms: [channels] (`ranges.largest`).
        strength: share of the difficulty that moves to the weights, 0 < strength < 1; α in the paper.

    Returns:
        The Smoothed.

    Raises:
        UsageError: strength out of range.

    Source: Xiao et al., "SmoothQuant", arXiv:2211.10438, eq. 4: s_j = max|X_j|^α / max|W_j|^(1-α).
    """
    if not 0 < strength < 1:
        raise UsageError(
            f"calibration.smooth is {strength:g}, it must lie between 0 and 1", fix="0.5 suits most; 0 turns it off."
        )
    model = model.clone()
    norms, declined = find_norms(model, sites)
    factors = {}
    for norm in norms:
        rows = np.max([_read(node, 1, _largest_of_inputs) for node in norm.readers], axis=0)
        channels = amax[norm.tensor]
        usable = (channels > 0) & (rows > 0)
        s = np.ones_like(channels)
        s[usable] = channels[usable] ** strength / rows[usable] ** (1 - strength)
        factors[norm.tensor] = s
        for node, index in norm.parameters:
            _rescale(model.graph, node, index, functools.partial(_divided, s))
        for node in norm.readers:
            _rescale(model.graph, node, 1, functools.partial(_multiplied, s))
    return Smoothed(model, factors, declined)


def _divided(factors: np.ndarray, vector: np.ndarray) -> np.ndarray:
    return np.asarray(vector / factors.reshape(vector.shape))


def _multiplied(factors: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return np.asarray(weight * _along_inputs(factors, weight.ndim))


def _largest_of_inputs(weight: np.ndarray) -> np.ndarray:
    """The largest |w| of each input channel of a matrix [K, N] or a convolution [N, K, 1, 1]: [K]."""
    return np.abs(weight).max(axis=tuple(axis for axis in range(weight.ndim) if axis != _input_axis(weight.ndim)))


def _along_inputs(factors: np.ndarray, rank: int) -> np.ndarray:
    return factors.reshape([-1 if axis == _input_axis(rank) else 1 for axis in range(rank)])


def _input_axis(rank: int) -> int:
    return 1 - channel_axis(rank)


def _source(value: ir.Value) -> ir.Value:
    """What a linear reads: the value itself, or the one from which it is made by reshaping or selecting tokens."""
    while (node := value.producer()) is not None and _keeps_channels(node) and node.inputs[0] is not None:
        value = node.inputs[0]
    return value


def _keeps_channels(node: ir.Node) -> bool:
    """Whether a node selects tokens, or merges them with the batch or splits them again, and leaves channels
    unchanged."""
    if node.op_type == "Gather":
        return node.attributes["axis"].as_int() == 1
    before, after = node.inputs[0] if node.op_type == "Reshape" else None, node.outputs[0]
    if before is None or before.shape is None or after.shape is None or {len(before.shape), len(after.shape)} != {3, 4}:
        return False
    tokens, flat = (before, after) if len(before.shape) == 3 else (after, before)
    assert tokens.shape is not None and flat.shape is not None
    return tuple(flat.shape)[1:] == (tokens.shape[2], 1, 1)


def _readers(value: ir.Value) -> tuple[ir.Node, ...] | str:
    """The linears that multiply a value by a weight; or, if it has other readers, one of these."""
    if value.is_graph_output():
        return "it is an output of the graph"
    found: list[ir.Node] = []
    for node, index in value.uses():
        if index == 0 and linear_weight(node) is not None and _groups(node) == 1:
            found.append(node)
        elif index == 0 and _keeps_channels(node):
            behind = _readers(node.outputs[0])
            if isinstance(behind, str):
                return behind
            found += behind
        else:
            return f"{node.op_type} {node.name} reads it too"
    return tuple(found)


def _groups(convolution: ir.Node) -> int:
    return convolution.attributes.get_int("group", 1)


def _parameters(value: ir.Value) -> tuple[tuple[ir.Node, int], ...] | None:
    """Where the scale and bias of the LayerNorm that makes a value are; None if no LayerNorm makes it."""
    node = value.producer()
    if node is None:
        return None
    if node.op_type in (ADD_NORM, NORM):  # of the lowering "fused": scale and bias are the last inputs
        return ((node, len(node.inputs) - 2), (node, len(node.inputs) - 1)) if value is node.outputs[-1] else None
    if node.op_type == "LayerNormalization":
        return tuple((node, index) for index, v in enumerate(node.inputs) if index > 0 and v is not None)
    bias = _constant_operand(node, "Add")
    if bias is None:
        return None
    normalized = node.inputs[1 - bias]
    multiply = normalized.producer() if normalized is not None else None
    scale = _constant_operand(multiply, "Mul") if multiply is not None else None
    if multiply is None or scale is None or not _divides_by_deviation(multiply.inputs[1 - scale]):
        return None
    return ((multiply, scale), (node, bias))


def _constant_operand(node: ir.Node, op_type: str) -> int | None:
    if node.op_type != op_type:
        return None
    constant = (v is not None and v.const_value is not None and v.const_value.size > 1 for v in node.inputs)
    return next((index for index, found in enumerate(constant) if found), None)


def _divides_by_deviation(value: ir.Value | None) -> bool:
    node = value.producer() if value is not None else None
    divisor = (
        node.inputs[1].producer() if node is not None and node.op_type == "Div" and node.inputs[1] is not None else None
    )
    return divisor is not None and divisor.op_type == "Sqrt"


def _read(node: ir.Node, index: int, compute: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    value = node.inputs[index]
    assert value is not None and value.const_value is not None
    return read_weight(value.const_value, compute)


def _rescale(graph: ir.Graph, node: ir.Node, index: int, compute: Callable[[np.ndarray], np.ndarray]) -> None:
    """Gives a node a rescaled weight; other readers of the same weight keep the original."""
    value = node.inputs[index]
    assert value is not None and value.const_value is not None
    if len(value.uses()) == 1:
        value.const_value = derived(value.const_value, ir.DataType.FLOAT, compute, value.name or "")
    else:
        name = f"{node.outputs[0].name}/{value.name}"
        node.replace_input_with(index, initializer(graph, derived(value.const_value, ir.DataType.FLOAT, compute, name)))
