"""GELU: one operator from opset 20 on, and the shortest exact primitives before that."""

import math
from typing import Any

import onnx_ir as ir
from onnxscript.rewriter import pattern

from vit_convert.export.rules.rule import Decline, Mismatch, Rule, require_scalar

_TANH_SCALE = math.sqrt(2.0 / math.pi)  # arXiv:1606.08415, section 2: 0.5 x (1 + tanh(sqrt(2/π) (x + 0.044715 x³)))
_TANH_CUBIC = 0.044715


def _opset(context: Any) -> int:
    return context.model.graph.opset_imports[""]


class _HalfProduct(Rule):
    """0.5 x (1 + f(x)), the three factors multiplied in any order."""

    def patterns(self) -> list[Any]:
        return [
            self.half_inside,
            self.half_inside_first,
            self.half_first,
            self.half_first_last,
            self.half_last,
            self.half_last_swapped,
        ]

    def _share(self, op: Any, x: Any) -> Any:
        """1 + f(x)."""
        raise NotImplementedError

    def half_inside(self, op: Any, x: Any, half: Any) -> Any:
        return op.Mul(x, op.Mul(self._share(op, x), half))

    def half_inside_first(self, op: Any, x: Any, half: Any) -> Any:
        return op.Mul(op.Mul(self._share(op, x), half), x)

    def half_first(self, op: Any, x: Any, half: Any) -> Any:
        return op.Mul(op.Mul(x, half), self._share(op, x))

    def half_first_last(self, op: Any, x: Any, half: Any) -> Any:
        return op.Mul(self._share(op, x), op.Mul(x, half))

    def half_last(self, op: Any, x: Any, half: Any) -> Any:
        return op.Mul(op.Mul(x, self._share(op, x)), half)

    def half_last_swapped(self, op: Any, x: Any, half: Any) -> Any:
        return op.Mul(op.Mul(self._share(op, x), x), half)


class _TanhGelu(_HalfProduct):
    def _share(self, op: Any, x: Any) -> Any:
        cubic, scale, one, three = (pattern.Var(name) for name in ("cubic", "scale", "one", "three"))
        square = op.Mul(x, x)
        cube = pattern.OrValue([op.Mul(square, x), op.Mul(x, square), op.Pow(x, three)])
        term = op.Mul(cube, cubic)
        inner = op.Mul(pattern.OrValue([op.Add(x, term), op.Add(term, x)]), scale)  # sqrt(2/π) (x + 0.044715 x³)
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
        complement = op.Sub(one, op.Erf(op.Mul(op.Neg(x), inverse)))  # erfc(−x / √2), as in jax.nn.gelu
        return pattern.OrValue([op.Add(op.Erf(inner), one), complement])  # 1 + erf(x / √2)

    def check(self, context: Any, one: ir.Value, half: ir.Value, **rest: Any) -> None:
        if rest.get("root") is not None:
            require_scalar(rest["root"], math.sqrt(2.0), "the divisor")
        else:
            require_scalar(rest["inverse"], math.sqrt(0.5), "the inner scale")
        require_scalar(one, 1.0, "the addend")
        require_scalar(half, 0.5, "the outer scale")


class TanhGelu(_TanhGelu):
    """0.5 x (1 + tanh(…)) → Gelu(approximate="tanh"), if the opset has it."""

    def check(self, context: Any, **bindings: Any) -> None:  # type: ignore[override]
        super().check(context, **bindings)
        if _opset(context) < 20:
            raise Decline(f"opset {_opset(context)} has no Gelu")

    def rewrite(self, op: Any, x: ir.Value, **_: Any) -> Any:
        return op.Gelu(x, approximate="tanh")


class ErfGelu(_ErfGelu):
    """x (1 + erf(x/√2)) / 2 → Gelu, if the opset has it."""

    def check(self, context: Any, **bindings: Any) -> None:  # type: ignore[override]
        super().check(context, **bindings)
        if _opset(context) < 20:
            raise Decline(f"opset {_opset(context)} has no Gelu")

    def rewrite(self, op: Any, x: ir.Value, **_: Any) -> Any:
        return op.Gelu(x)


class TanhGeluToExp(_TanhGelu):
    """0.5 x (1 + tanh(z)) → x / (1 + exp(−2z)): the same function with one exponential and one division.

    Where exp overflows (in fp16 for −2z > 11), the quotient is −0, which is the function's value to within the type's
    precision.
    """

    def rewrite(self, op: Any, x: ir.Value, **_: Any) -> Any:
        # −2z = x (−2·sqrt(2/π) − 2·sqrt(2/π)·0.044715 x²)
        linear = op.Constant(value_float=-2.0 * _TANH_SCALE)
        cubic = op.Constant(value_float=-2.0 * _TANH_SCALE * _TANH_CUBIC)
        exponent = op.Mul(op.Add(op.Mul(op.Mul(x, x), cubic), linear), x)
        return op.Div(x, op.Add(op.Exp(exponent), op.Constant(value_float=1.0)))


class TanhGeluToPower(_TanhGelu):
    """0.5 x (1 + tanh(…)) with the cube as a power: the form that TensorRT 8.6 computes inside the preceding
    convolution."""

    def check(self, context: Any, **bindings: Any) -> None:  # type: ignore[override]
        super().check(context, **bindings)
        if bindings.get("three") is not None and context.root.inputs[1] is bindings["x"]:
            raise Mismatch("it already has this form")

    def rewrite(self, op: Any, x: ir.Value, **_: Any) -> Any:
        cube = op.Pow(x, op.Constant(value_float=3.0))
        inner = op.Mul(
            op.Add(x, op.Mul(cube, op.Constant(value_float=_TANH_CUBIC))), op.Constant(value_float=_TANH_SCALE)
        )
        return op.Mul(op.Mul(op.Add(op.Tanh(inner), op.Constant(value_float=1.0)), op.Constant(value_float=0.5)), x)
