"""Slices: ends that jax2onnx computes at run time from the whole shape become constants on the axes that are cut."""

from typing import Any

import onnx_ir as ir

from vit_convert.export.rules.rule import Decline, Mismatch, Rule, static_shape


class ConstantSlice(Rule):
    """Slice(x, starts, Concat(Shape(x)[0], …), axes, 1) → Slice(x, …) on the axes that get shorter, with constant
    ends."""

    def pattern(self, op: Any, x: Any, starts: Any, ends: Any, axes: Any, steps: Any) -> Any:
        return op.Slice(x, starts, ends, axes, steps, _outputs=["y"])

    def check(self, context: Any, x: ir.Value, ends: ir.Value, y: ir.Value, **values: Any) -> None:
        if ends.const_value is not None:
            raise Mismatch("the ends are constant already")
        self._cut(x, y, **values)

    def _cut(
        self, x: ir.Value, y: ir.Value, starts: ir.Value, axes: ir.Value, steps: ir.Value, **_: Any
    ) -> dict[int, tuple[int, int]]:
        """Where each axis that gets shorter begins and ends.

        An end beyond the axis, or a negative one, needs no special care: the shape of the result gives the length of
        the slice.
        """
        before, after = static_shape(x, "the input"), static_shape(y, "the output")
        if starts.const_value is None or axes.const_value is None or steps.const_value is None:
            raise Decline("starts, axes or steps are not constant")
        if set(steps.const_value.numpy().tolist()) != {1}:
            raise Decline("not every step is 1")
        cut = {}
        for axis, start in zip(axes.const_value.numpy().tolist(), starts.const_value.numpy().tolist()):
            old, new = before[axis], after[axis]
            if old == new and start == 0:
                continue
            if not isinstance(old, int) or not isinstance(new, int):
                raise Decline(f"axis {axis} goes from {old} to {new}, which are not both known")
            begin = slice(start, None).indices(old)[0]  # a start before the axis is its first element
            cut[axis] = (begin, begin + new)
        if not cut:
            raise Decline("no axis gets shorter")
        return cut

    def rewrite(self, op: Any, x: ir.Value, ends: ir.Value, y: ir.Value, **values: Any) -> Any:
        cut = self._cut(x, y, **values)
        starts, new_ends = zip(*cut.values())
        return op.Slice(
            x, op.Constant(value_ints=starts), op.Constant(value_ints=new_ends), op.Constant(value_ints=list(cut))
        )
