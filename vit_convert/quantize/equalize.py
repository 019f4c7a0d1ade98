"""One INT8 scale for queries, keys and values: weights are changed, without changing the function, until all channels
have the same range.

An INT8 attention kernel reads all three with one scale. A model's function does not change when
- a channel of the queries is multiplied by a factor and that of the keys divided by it,
- a constant is added to a channel of all keys: it adds the same to all scores of a query, which softmax cancels,
- a channel of the values is multiplied by a factor, or a constant added: the projection divides its weight by the
  factor, or subtracts the constant's contribution from its bias.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from vit_convert.core.operators import ATTENTION
from vit_convert.quantize.graph import derived

_PARTS = 3  # order of queries, keys and values within a head's channels


@dataclasses.dataclass(frozen=True)
class Factors:
    """The changes at one attention, each float32 [heads, head size].

    Attributes:
        query: factor of the queries, 1 / factor of the keys.
        value: factor of the values.
        key_shift: added to the keys, before their factor.
        value_shift: added to the values, before their factor.
    """

    query: np.ndarray
    value: np.ndarray
    key_shift: np.ndarray
    value_shift: np.ndarray


def attention_inputs(model: ir.Model) -> list[str]:
    """Names of the convolutions' outputs that hold queries, keys and values."""
    return [
        value.name or ""
        for node in model.graph
        if node.op_type == ATTENTION
        for value in node.inputs[:1]
        if value is not None
    ]


def factors(low: np.ndarray, high: np.ndarray, heads: int) -> Factors:
    """Finds the factors that give all channels of an attention's input the same range.

    Args:
        low: the smallest value of each channel, [heads · 3 · head size].
        high: the largest.
        heads: of the attention.
    """
    low, high = (x.reshape(heads, _PARTS, -1).astype(np.float64) for x in (low, high))
    middle, reach = (low + high) / 2, np.maximum((high - low) / 2, np.finfo(np.float32).tiny)
    query = np.maximum(np.maximum(high[:, 0], -low[:, 0]), np.finfo(np.float32).tiny)
    ratio = np.sqrt(reach[:, 1] / query)
    most = (query * ratio).max()
    parts = (ratio, most / reach[:, 2], -middle[:, 1], -middle[:, 2])
    return Factors(*(np.asarray(x, np.float32) for x in parts))


def equalize(model: ir.Model, extremes: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> int:
    """Changes the weights of the convolutions around each attention, in place; the graph still computes the same.

    Args:
        model: in the lowering "fused", with readable weights.
        extremes: for each of `attention_inputs`, the smallest and the largest value of each channel.

    Returns:
        The number of changed attentions: those followed by a convolution as their projection.
    """
    changed = 0
    for node in list(model.graph):
        before = node.inputs[0].producer() if node.op_type == ATTENTION and node.inputs[0] is not None else None
        users = [user for user, _ in node.outputs[0].uses()] if before is not None else []
        if before is None or len(users) != 1 or users[0].op_type != "Conv" or before.op_type != "Conv":
            continue
        low, high = extremes[before.outputs[0].name or ""]
        found = factors(low, high, node.attributes["heads"].as_int())
        scale = np.stack([found.query, 1 / found.query, found.value], 1).reshape(-1)
        shift = np.stack([np.zeros_like(found.query), found.key_shift, found.value_shift], 1).reshape(-1)
        value = found.value.reshape(-1)
        taken = _array(users[0], 1)[:, :, 0, 0] @ found.value_shift.reshape(-1)
        _change(before, 1, factor=scale[:, None, None, None])
        _change(before, 2, shift=shift, factor=scale)
        _change(users[0], 1, factor=1 / value[None, :, None, None])
        _change(users[0], 2, shift=-taken)
        changed += 1
    return changed


def _array(node: ir.Node, index: int) -> np.ndarray:
    value = node.inputs[index]
    assert value is not None and value.const_value is not None
    return value.const_value.numpy()


def _change(node: ir.Node, index: int, *, shift: np.ndarray | float = 0.0, factor: np.ndarray | float = 1.0) -> None:
    """Replaces a weight by (weight + shift) · factor, computed when it is saved."""
    value = node.inputs[index]
    assert value is not None and value.const_value is not None and len(value.uses()) == 1
    tensor = value.const_value
    value.const_value = derived(
        tensor, ir.DataType.FLOAT, lambda array: ((array + shift) * factor).astype(np.float32), value.name or ""
    )
