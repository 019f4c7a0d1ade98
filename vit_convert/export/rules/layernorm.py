"""LayerNorm: Flax's spelling becomes the LayerNormalization operator, or two-pass primitives where those are faster."""

from typing import Any

import onnx_ir as ir

from vit_convert.export.rules.rule import Decline, Rule, require_scalar, scalar


def _last_axis(value: ir.Value) -> None:
    """Declines unless `value` is a ReduceMean over the last axis that keeps it (axes are an attribute before opset 18)."""
    node = value.producer()
    assert node is not None
    source = node.inputs[0]
    axes = node.inputs[1].const_value.numpy().tolist() if len(node.inputs) > 1 and node.inputs[1] is not None else node.attributes["axes"].value  # type: ignore[union-attr]
    rank = len(source.shape) if source is not None and source.shape is not None else None
    if len(axes) != 1 or axes[0] not in (-1, rank and rank - 1):
        raise Decline(f"the mean is over axes {axes}, not the last one of {rank}")
    if "keepdims" in node.attributes and node.attributes["keepdims"].value != 1:
        raise Decline("the mean does not keep its axis")


class _LayerNorm(Rule):
    def check(self, context: Any, mean: ir.Value, second: ir.Value, epsilon: ir.Value, scale: ir.Value, bias: ir.Value, **rest: Any) -> None:
        _last_axis(mean)
        _last_axis(second)
        if scalar(epsilon) is None:
            raise Decline("epsilon is not a constant")
        if "zero" in rest:
            require_scalar(rest["zero"], 0.0, "the floor of the variance")
        for what, value in (("scale", scale), ("bias", bias)):
            if value.shape is None or len(value.shape) != 1:
                raise Decline(f"{what} is not a vector")

    def rewrite(self, op: Any, x: ir.Value, scale: ir.Value, bias: ir.Value, epsilon: ir.Value, **_: Any) -> Any:
        return op.LayerNormalization(x, scale, bias, axis=-1, epsilon=scalar(epsilon), stash_type=1)


class FastVarianceLayerNorm(_LayerNorm):
    """Flax's default: var = max(0, E[x²] − E[x]²), which fp16 ruins, → LayerNormalization."""

    def pattern(self, op: Any, x: Any, scale: Any, bias: Any, epsilon: Any, zero: Any) -> Any:
        mean = op.ReduceMean(x, _allow_other_inputs=True, _outputs=["mean"])  # E[x]
        second = op.ReduceMean(op.Mul(x, x), _allow_other_inputs=True, _outputs=["second"])  # E[x²]
        variance = op.Max(op.Sub(second, op.Mul(mean, mean)), zero)  # max(0, E[x²] − E[x]²)
        normalized = op.Div(op.Sub(x, mean), op.Sqrt(op.Add(variance, epsilon)))
        return op.Add(op.Mul(normalized, scale), bias)


class TwoPassLayerNorm(_LayerNorm):
    """The textbook form, var = E[(x − E[x])²] (Flax with use_fast_variance=False, hand-written modules), → LayerNormalization."""

    def pattern(self, op: Any, x: Any, scale: Any, bias: Any, epsilon: Any) -> Any:
        mean = op.ReduceMean(x, _allow_other_inputs=True, _outputs=["mean"])
        deviation = op.Sub(x, mean)
        second = op.ReduceMean(op.Mul(deviation, deviation), _allow_other_inputs=True, _outputs=["second"])
        normalized = op.Div(deviation, op.Sqrt(op.Add(second, epsilon)))
        return op.Add(op.Mul(normalized, scale), bias)


class LayerNormToPrimitives(Rule):
    """LayerNormalization → mean, deviation, mean of squares, division: TensorRT 8.6 runs the two-pass primitives faster."""

    def pattern(self, op: Any, x: Any, scale: Any, bias: Any) -> Any:
        return op.LayerNormalization(x, scale, bias, _outputs=["y"])

    def check(self, context: Any, y: ir.Value, **_: Any) -> None:
        node = y.producer()
        assert node is not None
        axis = node.attributes["axis"].as_int() if "axis" in node.attributes else -1
        if axis not in (-1, len(y.shape) - 1 if y.shape is not None else -1):
            raise Decline(f"it normalises axis {axis}, not the last one")
        if context.model.graph.opset_imports.get("", 0) >= 18:
            raise Decline("ReduceMean takes its axes as an input from opset 18 on, and only TensorRT 8 gains from the primitives")

    def rewrite(self, op: Any, x: ir.Value, scale: ir.Value, bias: ir.Value, y: ir.Value, **_: Any) -> Any:
        node = y.producer()
        assert node is not None
        epsilon = op.Constant(value_float=node.attributes["epsilon"].as_float())
        deviation = op.Sub(x, op.ReduceMean(x, axes=[-1], keepdims=1))
        variance = op.ReduceMean(op.Mul(deviation, deviation), axes=[-1], keepdims=1)
        normalized = op.Div(deviation, op.Sqrt(op.Add(variance, epsilon)))
        return op.Add(op.Mul(normalized, scale), bias)
