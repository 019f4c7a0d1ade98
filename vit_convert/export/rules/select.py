"""Where on a condition that is known, such as the guard that jnp.var puts around its result."""

from typing import Any

import numpy as np
import onnx_ir as ir

from vit_convert.export.rules.rule import Decline, Rule, static_shape


class ConstantWhere(Rule):
    """Where(True, x, y) → x."""

    def pattern(self, op: Any, condition: Any, x: Any, other: Any) -> Any:
        return op.Where(condition, x, other, _outputs=["y"])

    def check(self, context: Any, condition: ir.Value, x: ir.Value, y: ir.Value, **_: Any) -> None:
        if condition.const_value is None or not np.all(condition.const_value.numpy()):
            raise Decline("the condition is not the constant True")
        if tuple(static_shape(x, "the first choice")) != tuple(static_shape(y, "the result")):
            raise Decline("the first choice is broadcast")

    def rewrite(self, op: Any, x: ir.Value, **_: Any) -> Any:
        return op.Identity(x)
