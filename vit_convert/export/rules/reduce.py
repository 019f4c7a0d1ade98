"""ReduceMean before opset 18, where its axes are an attribute."""

from typing import Any

import onnx_ir as ir

from vit_convert.export.rules.rule import Decline, Rule


class ReduceAxesToAttribute(Rule):
    """ReduceMean(x, axes) → ReduceMean[axes](x): jax2onnx writes jnp.mean in opset 18's form, whatever opset is
    requested."""

    def pattern(self, op: Any, x: Any, axes: Any) -> Any:
        return op.ReduceMean(x, axes, _outputs=["y"])

    def check(self, context: Any, axes: ir.Value, **_: Any) -> None:
        if context.model.graph.opset_imports[""] >= 18:
            raise Decline("from opset 18 on the axes are an input")
        if axes.const_value is None:
            raise Decline("the axes are not constant")

    def rewrite(self, op: Any, x: ir.Value, axes: ir.Value, y: ir.Value, **_: Any) -> Any:
        node = y.producer()
        assert node is not None and axes.const_value is not None
        keepdims = node.attributes.get_int("keepdims", 1)
        return op.ReduceMean(x, axes=axes.const_value.numpy().tolist(), keepdims=keepdims)
