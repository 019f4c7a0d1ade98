"""Dense layers: Reshape–Gemm–Reshape becomes MatMul + Add, which TensorRT turns into one GEMM with its bias."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from vit_convert.export.rules.rule import Decline, Mismatch, Rule, reshape_target, static_shape


class DenseToMatMul(Rule):
    """Reshape(Gemm(Reshape(x), W, b)) → MatMul(x, W) + b, the leading axes kept as they are."""

    attributes: ClassVar[dict[str, float]] = {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 0}

    def pattern(self, op: Any, x: Any, rows: Any, kernel: Any, bias: Any, shape: Any) -> Any:
        flat = op.Reshape(x, rows)  # [B, S, …] -> [B·S, K]
        product = op.Gemm(flat, kernel, bias, _outputs=["product"])  # [B·S, N]
        return op.Reshape(product, shape, _outputs=["y"])  # -> [B, S, …]

    def check(self, context: Any, x: ir.Value, kernel: ir.Value, product: ir.Value, y: ir.Value, **_: Any) -> None:
        node = product.producer()
        assert node is not None
        for name, expected in self.attributes.items():
            attribute = node.attributes.get(name)
            got = expected if attribute is None else attribute.value
            if got != expected:
                raise Decline(f"Gemm has {name}={got}, not {expected}")
        self._plan(x, kernel, y)

    def _plan(self, x: ir.Value, kernel: ir.Value, y: ir.Value) -> tuple[list[int] | None, list[int] | None]:
        """The constant shapes of the Reshapes before and after the MatMul; None if none is needed."""
        before, after = static_shape(x, "the input"), static_shape(y, "the output")
        k, n = static_shape(kernel, "the kernel")
        rank, folded = len(before), 1
        while folded != k:  # number of trailing axes of x that the kernel contracts: one, or heads and head size
            rank -= 1
            size = before[rank]
            if rank < 1 or not isinstance(size, int):
                raise Decline(f"the input {tuple(map(str, before))} does not end in the kernel's {k} rows")
            folded *= size
        lead = before[:rank]
        if not _same_axes(lead, after[:rank], math.prod(dim for dim in after[rank:] if isinstance(dim, int)) == n):
            raise Decline(
                f"the output {tuple(map(str, after))} does not keep the input's leading axes {tuple(map(str, lead))}"
            )
        inner = (*lead, k)
        turn_in = None if len(before) == len(inner) else reshape_target(before, inner)
        turn_out = None if len(after) == len(inner) else reshape_target((*lead, n), after)
        return turn_in, turn_out

    def rewrite(self, op: Any, x: ir.Value, kernel: ir.Value, bias: ir.Value, y: ir.Value, **_: Any) -> Any:
        turn_in, turn_out = self._plan(x, kernel, y)
        if turn_in is not None:
            x = op.Reshape(x, op.Constant(value_ints=turn_in))
        y = op.Add(op.MatMul(x, kernel), bias)
        return y if turn_out is None else op.Reshape(y, op.Constant(value_ints=turn_out))


def _same_axes(before: Sequence[Any], after: Sequence[Any], same_width: bool) -> bool:
    """Whether leading axes are the same: by their names, or because all but one are known, so that the number of
    elements determines it."""
    if tuple(before) == tuple(after):
        return True
    unknown = [i for i, (a, b) in enumerate(zip(before, after)) if a != b]
    named = [dim for dim in (*before, *after) if not isinstance(dim, int)]
    same_place = (
        len(unknown) == 1
        and len(named) == 2
        and not isinstance(before[unknown[0]], int)
        and not isinstance(after[unknown[0]], int)
    )
    return same_place and same_width and len(before) == len(after)


class DenseNoBiasToMatMul(DenseToMatMul):
    """Reshape(Gemm(Reshape(x), W)) → MatMul(x, W): a Dense layer without a bias."""

    # without a bias, beta multiplies nothing
    attributes: ClassVar[dict[str, float]] = {"alpha": 1.0, "transA": 0, "transB": 0}

    def pattern(self, op: Any, x: Any, rows: Any, kernel: Any, shape: Any) -> Any:  # type: ignore[override]
        product = op.Gemm(op.Reshape(x, rows), kernel, _outputs=["product"])
        return op.Reshape(product, shape, _outputs=["y"])

    def rewrite(self, op: Any, x: ir.Value, kernel: ir.Value, y: ir.Value, **_: Any) -> Any:  # type: ignore[override]
        turn_in, turn_out = self._plan(x, kernel, y)
        if turn_in is not None:
            x = op.Reshape(x, op.Constant(value_ints=turn_in))
        y = op.MatMul(x, kernel)
        return y if turn_out is None else op.Reshape(y, op.Constant(value_ints=turn_out))


class NoZeroBias(Rule):
    """MatMul(x, W) + 0 → MatMul(x, W): jax2onnx gives a DenseGeneral without a bias one of zeros."""

    def pattern(self, op: Any, x: Any, kernel: Any, bias: Any) -> Any:
        return op.Add(op.MatMul(x, kernel), bias)

    def check(self, context: Any, kernel: ir.Value, bias: ir.Value, **_: Any) -> None:
        if bias.const_value is None or np.any(bias.const_value.numpy()):
            raise Mismatch("the bias is not zero")
        if tuple(static_shape(bias, "the bias")) != tuple(static_shape(kernel, "the kernel"))[-1:]:
            raise Decline("the bias is not a vector of the product's width")

    def rewrite(self, op: Any, x: ir.Value, kernel: ir.Value, **_: Any) -> Any:
        return op.MatMul(x, kernel)
