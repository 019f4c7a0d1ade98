"""Gather of whole rows, by indices as they are, without casting each to 64 bits."""

from typing import Any

import onnx_ir as ir

from vit_convert.export.rules.rule import Decline, Mismatch, Rule


class GatherByInt32(Rule):
    """Gather(x, Cast[int64](i)) → Gather(x, i) for 32-bit indices i: TensorRT indexes with 32 bits, but jax2onnx widens
    every index."""

    def pattern(self, op: Any, x: Any, index: Any) -> Any:
        return op.Gather(x, op.Cast(index, _outputs=["wide"]), _outputs=["y"])

    def check(self, context: Any, index: ir.Value, wide: ir.Value, **_: Any) -> None:
        if wide.dtype != ir.DataType.INT64:
            raise Mismatch(f"the index is cast to {wide.dtype}")
        if index.dtype != ir.DataType.INT32:
            raise Decline(f"the index is {index.dtype}, not INT32")

    def rewrite(self, op: Any, x: ir.Value, index: ir.Value, y: ir.Value, **_: Any) -> Any:
        node = y.producer()
        assert node is not None
        return op.Gather(x, index, axis=node.attributes.get_int("axis", 0))
