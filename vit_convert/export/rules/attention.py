"""Attention: Flax's Einsums become the transposes and MatMuls that TensorRT fuses into one kernel."""

from typing import Any

import numpy as np
import onnx_ir as ir

from vit_convert.export.rules.rule import Decline, Rule, scalar

_SCORES = ("...qhd,...khd->...hqk", "bqhd,bkhd->bhqk")
_MIX = ("...hqk,...khd->...qhd", "bhqk,bkhd->bqhd")


class EinsumAttention(Rule):
    """Einsum(q/√d, k) → Softmax → Einsum(·, v) becomes 4-D MatMuls with the scale on the query, the form that TensorRT
    10 and later fuse."""

    def pattern(self, op: Any, query: Any, key: Any, value: Any, root: Any) -> Any:
        scores = op.Einsum(op.Div(query, root), key, _outputs=["scores"])  # q·kᵀ/√d: [B, H, Sq, Sk]
        weights = op.Softmax(scores, _outputs=["weights"])
        return op.Einsum(weights, value, _outputs=["mixed"])  # [B, Sq, H, d]

    def check(
        self,
        context: Any,
        query: ir.Value,
        root: ir.Value,
        scores: ir.Value,
        weights: ir.Value,
        mixed: ir.Value,
        **_: Any,
    ) -> None:
        for what, got, known in (("scores", _equation(scores), _SCORES), ("mix", _equation(mixed), _MIX)):
            if got not in known:
                raise Decline(f"the {what} Einsum is {got!r}")
        if query.shape is None or len(query.shape) != 4:
            raise Decline("the query is not [batch, tokens, heads, size]")
        if scalar(root) is None:
            raise Decline("the scale is not a constant")
        axis = _axis(weights)
        if axis not in (-1, 3):
            raise Decline(f"the softmax is over axis {axis}, not the keys")

    def rewrite(self, op: Any, query: ir.Value, key: ir.Value, value: ir.Value, root: ir.Value, **_: Any) -> Any:
        divisor = scalar(root)
        assert divisor is not None
        query = op.Mul(query, op.Constant(value_float=float(np.float32(1.0) / np.float32(divisor))))
        query = op.Transpose(query, perm=[0, 2, 1, 3])  # [B, H, Sq, d]
        key = op.Transpose(key, perm=[0, 2, 3, 1])  # [B, H, d, Sk]
        value = op.Transpose(value, perm=[0, 2, 1, 3])  # [B, H, Sk, d]
        mixed = op.MatMul(op.Softmax(op.MatMul(query, key), axis=-1), value)  # [B, H, Sq, d]
        return op.Transpose(mixed, perm=[0, 2, 1, 3])


class ScaleOnQuery(Rule):
    """Softmax(q·kᵀ · s), however the scale is written, → Softmax((q · s)·kᵀ): TensorRT 10 and later need the scale
    before the product."""

    def patterns(self) -> list[Any]:
        return [self.multiplied, self.divided]

    def multiplied(self, op: Any, query: Any, key: Any, scale: Any) -> Any:
        return op.Softmax(op.Mul(op.MatMul(query, key), scale), _outputs=["weights"])

    def divided(self, op: Any, query: Any, key: Any, root: Any) -> Any:
        return op.Softmax(op.Div(op.MatMul(query, key), root), _outputs=["weights"])

    def check(self, context: Any, scale: ir.Value | None = None, root: ir.Value | None = None, **_: Any) -> None:
        if scalar(scale or root) is None:
            raise Decline("the scale is not a constant")

    def rewrite(
        self,
        op: Any,
        query: Any,
        key: Any,
        weights: ir.Value,
        scale: ir.Value | None = None,
        root: ir.Value | None = None,
        **_: Any,
    ) -> Any:
        scores = op.MatMul(op.Mul(query, _factor(op, scale, root)), key)
        return op.Softmax(scores, axis=_axis(weights))


def _factor(op: Any, scale: ir.Value | None, root: ir.Value | None) -> Any:
    """The scale as a factor, a scalar constant."""
    given = scalar(scale or root)
    assert given is not None
    return op.Constant(value_float=given if root is None else float(np.float32(1.0) / np.float32(given)))


def _axis(weights: ir.Value) -> int:
    node = weights.producer()
    assert node is not None
    return node.attributes.get_int("axis", -1)


def _equation(value: ir.Value) -> str:
    node = value.producer()
    assert node is not None
    return node.attributes["equation"].as_string()
