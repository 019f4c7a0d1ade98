"""Shape arithmetic: a target shape computed at run time becomes a constant."""

from typing import Any

import onnx_ir as ir

from vit_convert.export.rules.rule import Decline, Mismatch, Rule, permutation, reshape_target, scalar, static_shape


class ConstantReshape(Rule):
    """Reshape(x, Concat(Slice(Shape(x)), …)) → Reshape(x, constant), 0 standing for the batch."""

    def pattern(self, op: Any, x: Any, shape: Any) -> Any:
        return op.Reshape(x, shape, _outputs=["y"])

    def check(self, context: Any, x: ir.Value, shape: ir.Value, y: ir.Value, **_: Any) -> None:
        if shape.const_value is not None:
            raise Mismatch("the shape is constant already")
        reshape_target(static_shape(x, "the input"), static_shape(y, "the output"))

    def rewrite(self, op: Any, x: ir.Value, shape: ir.Value, y: ir.Value, **_: Any) -> Any:
        assert x.shape is not None and y.shape is not None
        return op.Reshape(x, op.Constant(value_ints=reshape_target(tuple(x.shape), tuple(y.shape))))


class TokenGather(Rule):
    """Gather(Transpose(x, swap 0 and 1), i, axis=0) → Gather(x, i, axis=1): taking one token needs no transpose."""

    def pattern(self, op: Any, x: Any, index: Any) -> Any:
        return op.Gather(op.Transpose(x, _outputs=["turned"]), index, axis=0)

    def check(self, context: Any, turned: ir.Value, index: ir.Value, **_: Any) -> None:
        perm = permutation(turned)
        if perm != (1, 0, *range(2, len(perm))):
            raise Decline(f"the transpose is {perm}, not a swap of the first two axes")
        if index.shape is None or len(index.shape) != 0:
            raise Decline("more than one token is taken")

    def rewrite(self, op: Any, x: ir.Value, index: ir.Value, **_: Any) -> Any:
        return op.Gather(x, index, axis=1)


class TileToExpand(Rule):
    """Tile(tokens, [batch, 1, 1]) → Expand(tokens, the shape of one token of x): no arithmetic on shapes, nothing to
    multiply."""

    def pattern(self, op: Any, token: Any, x: Any, index: Any) -> Any:
        batch = op.Gather(op.Shape(x), index, axis=0)
        return op.Tile(token, op.Concat(batch, [1], [1], axis=0), _outputs=["y"])

    def check(self, context: Any, token: ir.Value, x: ir.Value, index: ir.Value, **_: Any) -> None:
        shape, like = static_shape(token, "the token"), static_shape(x, "what gives the batch")
        if scalar(index) != 0:
            raise Decline("the repeats do not begin with the first axis")
        if shape[0] != 1 or len(shape) != 3 or len(like) != 3 or shape[2:] != like[2:]:
            raise Decline(f"a token of shape {tuple(map(str, shape))} is not one of {tuple(map(str, like))}")

    def rewrite(self, op: Any, token: ir.Value, x: ir.Value, **_: Any) -> Any:
        return op.Expand(token, op.Shape(op.Gather(x, op.Constant(value_ints=[0]), axis=1)))


class NoDropout(Rule):
    """Dropout(x, …) → x: at inference it is the identity."""

    def pattern(self, op: Any, x: Any) -> Any:
        return op.Dropout(x, _allow_other_inputs=True, _outputs=["y"])

    def check(self, context: Any, y: ir.Value, **_: Any) -> None:
        training = y.producer().inputs[2:]  # type: ignore[union-attr]
        if training and (
            training[0] is None or training[0].const_value is None or bool(training[0].const_value.numpy())
        ):
            raise Decline("training mode is not the constant False")

    def rewrite(self, op: Any, x: ir.Value, **_: Any) -> Any:
        return op.Identity(x)
