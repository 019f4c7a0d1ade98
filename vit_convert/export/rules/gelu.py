"""GELU: one operator from opset 20 on, and the shortest exact primitives before."""

import math
from typing import Any

import onnx_ir as ir

from vit_convert.export.rules.rule import Decline, Rule, require_scalar

_TANH_SCALE = math.sqrt(2.0 / math.pi)  # arXiv:1606.08415, section 2: 0.5 x (1 + tanh(sqrt(2/π) (x + 0.044715 x³)))
_TANH_CUBIC = 0.044715


def _opset(context: Any) -> int:
    return context.model.graph.opset_imports.get("", 0)


class _TanhGelu(Rule):
    def pattern(self, op: Any, x: Any, cubic: Any, scale: Any, one: Any, half: Any) -> Any:
        cube = op.Mul(op.Mul(x, x), x)
        inner = op.Mul(op.Add(x, op.Mul(cube, cubic)), scale)  # sqrt(2/π) (x + 0.044715 x³)
        return op.Mul(x, op.Mul(op.Add(op.Tanh(inner), one), half))

    def check(self, context: Any, cubic: ir.Value, scale: ir.Value, one: ir.Value, half: ir.Value, **_: Any) -> None:
        require_scalar(cubic, _TANH_CUBIC, "the cubic coefficient")
        require_scalar(scale, _TANH_SCALE, "the inner scale")
        require_scalar(one, 1.0, "the addend")
        require_scalar(half, 0.5, "the outer scale")


class _ErfGelu(Rule):
    def check(self, context: Any, root: ir.Value, one: ir.Value, half: ir.Value, **_: Any) -> None:
        require_scalar(root, math.sqrt(2.0), "the divisor")
        require_scalar(one, 1.0, "the addend")
        require_scalar(half, 0.5, "the outer scale")

    def pattern(self, op: Any, x: Any, root: Any, one: Any, half: Any) -> Any:
        return op.Mul(op.Mul(x, op.Add(op.Erf(op.Div(x, root)), one)), half)  # x (1 + erf(x / √2)) / 2


class TanhGelu(_TanhGelu):
    """0.5 x (1 + tanh(…)) → Gelu(approximate="tanh"), where the opset has it."""

    def check(self, context: Any, **bindings: Any) -> None:
        super().check(context, **bindings)
        if _opset(context) < 20:
            raise Decline(f"opset {_opset(context)} has no Gelu")

    def rewrite(self, op: Any, x: ir.Value, **_: Any) -> Any:
        return op.Gelu(x, approximate="tanh")


class ErfGelu(_ErfGelu):
    """x (1 + erf(x/√2)) / 2 → Gelu, where the opset has it."""

    def check(self, context: Any, **bindings: Any) -> None:
        super().check(context, **bindings)
        if _opset(context) < 20:
            raise Decline(f"opset {_opset(context)} has no Gelu")

    def rewrite(self, op: Any, x: ir.Value, **_: Any) -> Any:
        return op.Gelu(x)


class TanhGeluToSigmoid(_TanhGelu):
    """0.5 x (1 + tanh(z)) → x · sigmoid(2z): the same function, six operators instead of nine."""

    def rewrite(self, op: Any, x: ir.Value, **_: Any) -> Any:
        # 2z = x (2·sqrt(2/π) + 2·sqrt(2/π)·0.044715 x²)
        linear = op.Constant(value_float=2.0 * _TANH_SCALE)
        cubic = op.Constant(value_float=2.0 * _TANH_SCALE * _TANH_CUBIC)
        inner = op.Mul(op.Add(op.Mul(op.Mul(x, x), cubic), linear), x)
        return op.Mul(x, op.Sigmoid(inner))
