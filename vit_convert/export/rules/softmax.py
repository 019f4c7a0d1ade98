"""Softmax written out, as traced after `from jax.nn import softmax` (jax2onnx knows it only as an attribute of
jax.nn)."""

from typing import Any

import numpy as np
import onnx_ir as ir

from vit_convert.export.rules.rule import Decline, Rule, axes_of, scalar, static_shape


class ExpToSoftmax(Rule):
    """exp(x − max x) / Σ exp(x − max x) → Softmax(x)."""

    def pattern(self, op: Any, x: Any, floor: Any, peak_shape: Any, total_shape: Any) -> Any:
        peak = op.ReduceMax(x, _allow_other_inputs=True, _outputs=["peak"])
        power = op.Exp(op.Sub(x, op.Reshape(op.Max(floor, peak), peak_shape, _outputs=["kept_peak"])))
        total = op.ReduceSum(power, _allow_other_inputs=True, _outputs=["total"])
        return op.Div(power, op.Reshape(total, total_shape, _outputs=["kept_total"]))

    def check(self, context: Any, x: ir.Value, floor: ir.Value, peak: ir.Value, total: ir.Value, **kept: Any) -> None:
        rank = len(static_shape(x, "the input"))
        if scalar(floor) != -np.inf:
            raise Decline(f"the maximum has the floor {scalar(floor)}, not minus infinity")
        for what, reduction in (("maximum", peak), ("sum", total)):
            if axes_of(reduction) not in ([-1], [rank - 1]):
                raise Decline(f"the {what} is over axes {axes_of(reduction)}, not the last one of {rank}")
        for value in (kept["kept_peak"], kept["kept_total"]):
            shape = tuple(static_shape(value, "the reduction"))
            if shape != (*static_shape(x, "the input")[:-1], 1):
                raise Decline(f"a reduction is given the shape {tuple(map(str, shape))}")

    def rewrite(self, op: Any, x: ir.Value, **_: Any) -> Any:
        return op.Softmax(x, axis=-1)
