"""Where with a constant condition, such as the guard around jnp.var's result."""

from typing import Any

import onnx_ir as ir

from vit_convert.export.rules.rule import Decline, Rule, static_shape


class ConstantWhere(Rule):
    """Where(True, x, y) → x."""

    def pattern(self, op: Any, x: Any, other: Any) -> Any:
        return op.Where(True, x, other, _outputs=["y"])

    def check(self, context: Any, x: ir.Value, y: ir.Value, **_: Any) -> None:
        if tuple(static_shape(x, "the first choice")) != tuple(static_shape(y, "the result")):
            raise Decline("the first choice is broadcast")

    def rewrite(self, op: Any, x: ir.Value, **_: Any) -> Any:
        return op.Identity(x)
