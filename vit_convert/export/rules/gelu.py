"""GELU: one operator from opset 20 on, and the shortest exact primitives before."""

import math
from typing import Any

import onnx_ir as ir
from onnxscript.rewriter import pattern

from vit_convert.export.rules.rule import Decline, Rule, require_scalar

_TANH_SCALE = math.sqrt(2.0 / math.pi)  # arXiv:1606.08415, section 2: 0.5 x (1 + tanh(sqrt(2/π) (x + 0.044715 x³)))
_TANH_CUBIC = 0.044715


def _opset(context: Any) -> int:
    return context.model.graph.opset_imports.get("", 0)


class _HalfProduct(Rule):
    """0.5 x (1 + f(x)), the three factors multiplied in any order."""

    commute = True

    def patterns(self) -> list[Any]:
        return [self.half_inside, self.half_first, self.half_last]

    def _share(self, op: Any, x: Any) -> Any:
        """1 + f(x)."""
        raise NotImplementedError

    def half_inside(self, op: Any, x: Any, half: Any) -> Any:
        return op.Mul(x, op.Mul(self._share(op, x), half))

    def half_first(self, op: Any, x: Any, half: Any) -> Any:
        return op.Mul(op.Mul(x, half), self._share(op, x))

    def half_last(self, op: Any, x: Any, half: Any) -> Any:
        return op.Mul(op.Mul(x, self._share(op, x)), half)


class _TanhGelu(_HalfProduct):
    def _share(self, op: Any, x: Any) -> Any:
        cubic, scale, one, three = (pattern.Var(name) for name in ("cubic", "scale", "one", "three"))
        cube = pattern.OrValue([op.Mul(op.Mul(x, x), x), op.Pow(x, three)])
        inner = op.Mul(op.Add(x, op.Mul(cube, cubic)), scale)  # sqrt(2/π) (x + 0.044715 x³)
        return op.Add(op.Tanh(inner), one)

    def check(self, context: Any, cubic: ir.Value, scale: ir.Value, one: ir.Value, half: ir.Value, **rest: Any) -> None:
        require_scalar(cubic, _TANH_CUBIC, "the cubic coefficient")
        require_scalar(scale, _TANH_SCALE, "the inner scale")
        require_scalar(one, 1.0, "the addend")
        require_scalar(half, 0.5, "the outer scale")
        if rest.get("three") is not None:
            require_scalar(rest["three"], 3.0, "the power")


class _ErfGelu(_HalfProduct):
    def _share(self, op: Any, x: Any) -> Any:
        root, one, inverse = (pattern.Var(name) for name in ("root", "one", "inverse"))
        inner = pattern.OrValue([op.Div(x, root), op.Mul(x, inverse)])
        return op.Add(op.Erf(inner), one)  # 1 + erf(x / √2)

    def check(self, context: Any, one: ir.Value, half: ir.Value, **rest: Any) -> None:
        if rest.get("root") is not None:
            require_scalar(rest["root"], math.sqrt(2.0), "the divisor")
        else:
            require_scalar(rest["inverse"], math.sqrt(0.5), "the inner scale")
        require_scalar(one, 1.0, "the addend")
        require_scalar(half, 0.5, "the outer scale")


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
