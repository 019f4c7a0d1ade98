"""LayerNorm: Flax's form becomes the LayerNormalization operator, or two-pass primitives where those are faster."""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript.rewriter import pattern

from vit_convert.export.rules.rule import Decline, Rule, axes_of, opset_of, require_scalar, scalar, static_shape


def _last_axis(value: ir.Value) -> None:
    """Declines unless `value` is a ReduceMean over the last axis that keeps it."""
    node, axes = value.producer(), axes_of(value)
    assert node is not None and node.inputs[0] is not None
    rank = len(static_shape(node.inputs[0], "the mean's input"))
    if axes not in ([-1], [rank - 1]):
        raise Decline(f"the mean is over axes {axes}, not the last one of {rank}")
    if node.attributes.get_int("keepdims", 1) != 1:
        raise Decline("the mean does not keep its axis")


class MeanOfSum(Rule):
    """ReduceSum over one axis, Reshape back and division by its size, as written by jnp.mean → ReduceMean that keeps
    the axis."""

    def patterns(self) -> list[Any]:
        return [self.reshaped_first, self.reshaped_last]

    def _total(self, op: Any, x: Any) -> Any:
        sums = [op.ReduceSum(x, _allow_other_inputs=True), op.ReduceSumSquare(x, _allow_other_inputs=True)]
        return pattern.OrValue(sums, name="total", tag_var="squared", tag_values=(False, True))

    def reshaped_first(self, op: Any, x: Any, shape: Any, count: Any) -> Any:
        return op.Div(op.Reshape(self._total(op, x), shape), count, _outputs=["mean"])

    def reshaped_last(self, op: Any, x: Any, shape: Any, count: Any) -> Any:
        return op.Reshape(op.Div(self._total(op, x), count), shape, _outputs=["mean"])

    def check(self, context: Any, x: ir.Value, total: ir.Value, count: ir.Value, mean: ir.Value, **_: Any) -> None:
        before, after = static_shape(x, "the input"), static_shape(mean, "the mean")
        axes = axes_of(total)
        if axes is None or len(axes) != 1:
            raise Decline(f"the sum is over axes {axes}, not a constant one")
        axis = axes[0] % len(before)
        kept = [1 if i == axis else dim for i, dim in enumerate(before)]
        if list(after) != kept:
            raise Decline(f"the mean has shape {tuple(map(str, after))}, not {tuple(map(str, kept))}")
        size = before[axis]
        if not isinstance(size, int):
            raise Decline("the summed axis is dynamic")
        require_scalar(count, size, "the divisor")

    def rewrite(self, op: Any, x: ir.Value, total: ir.Value, squared: bool, **_: Any) -> Any:
        values, axes = op.Mul(x, x) if squared else x, axes_of(total)
        if opset_of(total) < 18:
            return op.ReduceMean(values, axes=axes, keepdims=1)
        return op.ReduceMean(values, op.Constant(value_ints=axes), keepdims=1)


class DivideByRoot(Rule):
    """(x − mean) · (1/√v), and (x − mean) · (1/√v · scale), as written by jax.lax.rsqrt → (x − mean) / √v."""

    def patterns(self) -> list[Any]:
        return [self.inverse_last, self.inverse_first, self.factor_last, self.factor_first]

    def inverse_last(self, op: Any, x: Any, mean: Any, variance: Any) -> Any:
        return op.Mul(op.Sub(x, mean, _outputs=["deviation"]), op.Div(1.0, op.Sqrt(variance)))

    def inverse_first(self, op: Any, x: Any, mean: Any, variance: Any) -> Any:
        return op.Mul(op.Div(1.0, op.Sqrt(variance)), op.Sub(x, mean, _outputs=["deviation"]))

    def factor_last(self, op: Any, x: Any, mean: Any, variance: Any, scale: Any) -> Any:
        return op.Mul(op.Sub(x, mean, _outputs=["deviation"]), op.Mul(op.Div(1.0, op.Sqrt(variance)), scale))

    def factor_first(self, op: Any, x: Any, mean: Any, variance: Any, scale: Any) -> Any:
        return op.Mul(op.Mul(op.Div(1.0, op.Sqrt(variance)), scale), op.Sub(x, mean, _outputs=["deviation"]))

    def rewrite(self, op: Any, deviation: ir.Value, variance: ir.Value, scale: ir.Value | None = None, **_: Any) -> Any:
        normalized = op.Div(deviation, op.Sqrt(variance))
        return normalized if scale is None else op.Mul(normalized, scale)


class _Normalize(Rule):
    """Normalisation without scale and bias → LayerNormalization with ones and zeros, which the rules below replace."""

    def check(
        self, context: Any, x: ir.Value, mean: ir.Value, second: ir.Value, epsilon: ir.Value, **rest: Any
    ) -> None:
        _last_axis(mean)
        _last_axis(second)
        if not isinstance(static_shape(x, "the input")[-1], int):
            raise Decline("the last axis is dynamic")
        if scalar(epsilon) is None:
            raise Decline("epsilon is not a constant")
        for name in ("zero", "guard"):
            if name in rest:
                require_scalar(rest[name], 0.0, f"the {name}")

    def rewrite(self, op: Any, x: ir.Value, epsilon: ir.Value, **_: Any) -> Any:
        assert x.shape is not None
        width = int(x.shape[-1])  # type: ignore[arg-type]
        ones = op.Constant(value=ir.tensor(np.ones(width, np.float32)))
        zeros = op.Constant(value=ir.tensor(np.zeros(width, np.float32)))
        return op.LayerNormalization(x, ones, zeros, axis=-1, epsilon=scalar(epsilon), stash_type=1)


class FastVarianceLayerNorm(_Normalize):
    """Flax's default, var = max(0, E[x²] − E[x]²), which is useless in fp16 → LayerNormalization."""

    def patterns(self) -> list[Any]:
        return [self.floor_last, self.floor_first]

    def floor_last(self, op: Any, x: Any, epsilon: Any, zero: Any) -> Any:
        return self._divide(op, x, epsilon, lambda variance: op.Max(variance, zero))

    def floor_first(self, op: Any, x: Any, epsilon: Any, zero: Any) -> Any:
        return self._divide(op, x, epsilon, lambda variance: op.Max(zero, variance))

    def _divide(self, op: Any, x: Any, epsilon: Any, floor: Callable[[Any], Any]) -> Any:
        mean = op.ReduceMean(x, _allow_other_inputs=True, _outputs=["mean"])  # E[x]
        second = op.ReduceMean(op.Mul(x, x), _allow_other_inputs=True, _outputs=["second"])  # E[x²]
        variance = floor(op.Sub(second, op.Mul(mean, mean)))  # max(0, E[x²] − E[x]²)
        return op.Div(op.Sub(x, mean), op.Sqrt(op.Add(variance, epsilon)))


class TwoPassLayerNorm(_Normalize):
    """The textbook form, var = E[(x − E[x])²] (Flax with use_fast_variance=False, hand-written modules), →
    LayerNormalization."""

    def pattern(self, op: Any, x: Any, epsilon: Any) -> Any:
        mean = op.ReduceMean(x, _allow_other_inputs=True, _outputs=["mean"])
        deviation = op.Sub(x, mean)
        second = op.ReduceMean(op.Mul(deviation, deviation), _allow_other_inputs=True, _outputs=["second"])
        return op.Div(deviation, op.Sqrt(op.Add(second, epsilon)))


class GuardedLayerNorm(_Normalize):
    """nnx.LayerNorm with use_fast_variance=False: two passes in float64, and zero for a row of equal numbers →
    LayerNormalization."""

    def pattern(self, op: Any, x: Any, epsilon: Any, zero: Any, guard: Any) -> Any:
        mean = op.ReduceMean(x, _allow_other_inputs=True, _outputs=["mean"])
        constant = op.Equal(op.ReduceMin(x, _allow_other_inputs=True), op.ReduceMax(x, _allow_other_inputs=True))
        finite = op.Equal(op.Sub(mean, mean), zero)
        deviation = op.Where(op.And(constant, finite), guard, op.Sub(x, mean))
        second = op.ReduceMean(op.Cast(op.Mul(deviation, deviation)), _allow_other_inputs=True, _outputs=["second"])
        return op.Div(deviation, op.Sqrt(op.Add(op.Cast(second), epsilon)))


class LayerNormScale(Rule):
    """LayerNormalization(x, 1, 0) · scale → LayerNormalization(x, scale, 0)."""

    def pattern(self, op: Any, x: Any, ones: Any, zeros: Any, scale: Any) -> Any:
        return op.Mul(op.LayerNormalization(x, ones, zeros, _outputs=["normalized"]), scale)

    def check(self, context: Any, ones: ir.Value, zeros: ir.Value, scale: ir.Value, **_: Any) -> None:
        _require_all(ones, 1.0, "the scale so far")
        _require_all(zeros, 0.0, "the bias so far")
        _require_vector(scale, ones, "the scale")

    def rewrite(self, op: Any, x: ir.Value, zeros: ir.Value, scale: ir.Value, normalized: ir.Value, **_: Any) -> Any:
        return op.LayerNormalization(x, _vector(op, scale), zeros, **_attributes(normalized))


class LayerNormBias(Rule):
    """LayerNormalization(x, scale, 0) + bias → LayerNormalization(x, scale, bias)."""

    def pattern(self, op: Any, x: Any, scale: Any, zeros: Any, bias: Any) -> Any:
        return op.Add(op.LayerNormalization(x, scale, zeros, _outputs=["normalized"]), bias)

    def check(self, context: Any, zeros: ir.Value, bias: ir.Value, **_: Any) -> None:
        _require_all(zeros, 0.0, "the bias so far")
        _require_vector(bias, zeros, "the bias")

    def rewrite(self, op: Any, x: ir.Value, scale: ir.Value, bias: ir.Value, normalized: ir.Value, **_: Any) -> Any:
        return op.LayerNormalization(x, scale, _vector(op, bias), **_attributes(normalized))


def _require_all(value: ir.Value, expected: float, what: str) -> None:
    if value.const_value is None or not np.all(value.const_value.numpy() == expected):
        raise Decline(f"{what} is not {expected:g} everywhere")


def _require_vector(value: ir.Value, like: ir.Value, what: str) -> None:
    """Declines unless `value` is a weight that is a vector, up to leading axes of one."""
    if not value.is_initializer() and value.const_value is None:
        raise Decline(f"{what} is not a weight")
    shape, wanted = tuple(static_shape(value, what)), tuple(static_shape(like, "the vector so far"))
    if shape[-1:] != wanted or any(dim != 1 for dim in shape[:-1]):
        raise Decline(f"{what} has shape {tuple(map(str, shape))}, not {tuple(map(str, wanted))}")


def _vector(op: Any, value: ir.Value) -> Any:
    assert value.shape is not None
    return value if len(value.shape) == 1 else op.Reshape(value, op.Constant(value_ints=[-1]))


def _attributes(normalized: ir.Value) -> dict[str, Any]:
    node = normalized.producer()
    assert node is not None
    return {name: attribute.value for name, attribute in node.attributes.items()}


class LayerNormToPrimitives(Rule):
    """LayerNormalization → mean, deviation, mean of squares, division: TensorRT 8.6 runs the two-pass primitives
    faster."""

    def pattern(self, op: Any, x: Any, scale: Any, bias: Any) -> Any:
        return op.LayerNormalization(x, scale, bias, _outputs=["y"])

    def check(self, context: Any, y: ir.Value, **_: Any) -> None:
        node = y.producer()
        assert node is not None
        axis = node.attributes.get_int("axis", -1)
        if axis not in (-1, len(y.shape) - 1 if y.shape is not None else -1):
            raise Decline(f"it normalises axis {axis}, not the last one")
        if context.model.graph.opset_imports[""] >= 18:
            raise Decline(
                "ReduceMean takes its axes as an input from opset 18 on, and only TensorRT 8 gains from the primitives"
            )

    def rewrite(self, op: Any, x: ir.Value, scale: ir.Value, bias: ir.Value, y: ir.Value, **_: Any) -> Any:
        node = y.producer()
        assert node is not None
        epsilon = op.Constant(value_float=node.attributes.get_float("epsilon", 1e-5))  # ONNX's default
        deviation = op.Sub(x, op.ReduceMean(x, axes=[-1], keepdims=1))
        variance = op.ReduceMean(op.Mul(deviation, deviation), axes=[-1], keepdims=1)
        normalized = op.Div(deviation, op.Sqrt(op.Add(variance, epsilon)))
        return op.Add(op.Mul(normalized, scale), bias)
