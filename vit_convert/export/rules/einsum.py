"""Einsums that jax2onnx leaves behind (`x @ w`, jnp.einsum) become MatMuls, which TensorRT plans far better."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir

from vit_convert.export.rules.rule import Decline, Rule, reshape_target, static_shape

Shape = Sequence[int | ir.SymbolicDim]
Sizes = Mapping[str, int | ir.SymbolicDim]  # by label


def terms(value: ir.Value) -> tuple[str, str, str]:
    """The two operands' and the result's labels of the two-operand Einsum that makes `value`."""
    node = value.producer()
    assert node is not None
    operands, arrow, result = node.attributes["equation"].as_string().replace(" ", "").partition("->")
    left, comma, right = operands.partition(",")
    if not arrow or not comma:
        raise Decline(f"the equation {operands}{arrow}{result} does not spell two operands and a result")
    return left, right, result


class EinsumWithoutExpand(Rule):
    """Einsum(x, Expand(Unsqueeze(w))) with an ellipsis → Einsum(x, w): jax2onnx repeats the weight for every token."""

    def pattern(self, op: Any, x: Any, weight: Any, axes: Any, shape: Any) -> Any:
        return op.Einsum(x, op.Expand(op.Unsqueeze(weight, axes), shape), _outputs=["y"])

    def check(self, context: Any, x: ir.Value, weight: ir.Value, y: ir.Value, **_: Any) -> None:
        self._equation(x, weight, y)

    def _equation(self, x: ir.Value, weight: ir.Value, y: ir.Value) -> str:
        left, right, result = terms(y)
        if not all(term.startswith("...") for term in (left, right, result)):
            raise Decline(f"the equation {left},{right}->{result} does not begin every term with an ellipsis")
        right = right[3:]
        if len(static_shape(weight, "the weight")) != len(right):
            raise Decline(
                f"the weight has {len(static_shape(weight, 'the weight'))} axes, its term {right!r} has {len(right)}"
            )
        unused = [letter for letter in "abcdefghijklmnopqrstuvwxyz" if letter not in left + right + result]
        lead = "".join(unused[: len(static_shape(x, "the input")) - len(left[3:])])
        return f"{lead}{left[3:]},{right}->{lead}{result[3:]}"

    def rewrite(self, op: Any, x: ir.Value, weight: ir.Value, y: ir.Value, **_: Any) -> Any:
        return op.Einsum(x, weight, equation=self._equation(x, weight, y))


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Transpose and Reshape of each operand, then of the product; None where nothing needs to be done."""

    swapped: bool
    left: tuple[list[int] | None, list[int] | None]
    right: tuple[list[int] | None, list[int] | None]
    result: tuple[list[int] | None, list[int] | None]  # here, Reshape comes first


class EinsumToMatMul(Rule):
    """Einsum of two operands with a contraction → MatMul between the necessary transposes and reshapes."""

    def pattern(self, op: Any, a: Any, b: Any) -> Any:
        return op.Einsum(a, b, _outputs=["y"])

    def check(self, context: Any, a: ir.Value, b: ir.Value, y: ir.Value, **_: Any) -> None:
        self._plan(a, b, y)

    def _plan(self, a: ir.Value, b: ir.Value, y: ir.Value) -> _Plan:
        left, right, result = terms(y)
        if any(len(set(term)) != len(term) or "." in term for term in (left, right, result)):
            raise Decline(f"the equation {left},{right}->{result} repeats a label or has an ellipsis")
        swapped = a.is_initializer() and not b.is_initializer()
        if swapped:
            left, right, a, b = right, left, b, a
        batch = [label for label in result if label in left and label in right]
        rows = [label for label in result if label in left and label not in right]
        columns = [label for label in result if label in right and label not in left]
        summed = [label for label in left if label in right and label not in result]
        if not summed or set(left) - {*batch, *rows, *summed} or set(right) - {*batch, *columns, *summed}:
            raise Decline(f"the equation {left},{right}->{result} is not a matrix product")
        if not columns or (batch and (len(rows) != 1 or len(columns) != 1)):
            raise Decline(f"the equation {left},{right}->{result} has more or fewer axes than a batched matrix product")
        size = dict(zip(right, static_shape(b, "the right operand"))) | dict(
            zip(left, static_shape(a, "the left operand"))
        )
        product = [*batch, *rows, *columns]
        return _Plan(
            swapped,
            (_turn(left, [*batch, *rows, *summed]), _merge([*batch, *rows], summed, size)),
            (_turn(right, [*batch, *summed, *columns]), _merge_right(batch, summed, columns, size)),
            (_split([*batch, *rows], columns, size), _turn("".join(product), list(result))),
        )

    def rewrite(self, op: Any, a: ir.Value, b: ir.Value, y: ir.Value, **_: Any) -> Any:
        plan = self._plan(a, b, y)
        a, b = (b, a) if plan.swapped else (a, b)
        product = op.MatMul(_arrange(op, a, *plan.left), _arrange(op, b, *plan.right))
        shape, perm = plan.result
        return _arrange(op, _arrange(op, product, None, shape), perm, None)


def _turn(labels: str, wanted: list[str]) -> list[int] | None:
    perm = [labels.index(label) for label in wanted]
    return None if perm == sorted(perm) else perm


def _dims(labels: Sequence[str], size: Sizes) -> list[Any]:
    return [size[label] for label in labels]


def _product(labels: Sequence[str], size: Sizes) -> int:
    total = 1
    for label in labels:
        side = size[label]
        if not isinstance(side, int):
            raise Decline(f"the merged axis {label} is dynamic")
        total *= side
    return total


def _merge(lead: list[str], summed: list[str], size: Sizes) -> list[int] | None:
    if len(summed) == 1:
        return None
    return reshape_target(_dims([*lead, *summed], size), [*_dims(lead, size), _product(summed, size)])


def _merge_right(batch: list[str], summed: list[str], columns: list[str], size: Sizes) -> list[int] | None:
    if len(summed) == 1 and len(columns) == 1:
        return None
    target = [*_dims(batch, size), _product(summed, size), _product(columns, size)]
    return reshape_target(_dims([*batch, *summed, *columns], size), target)


def _split(lead: list[str], columns: list[str], size: Sizes) -> list[int] | None:
    if len(columns) == 1:
        return None
    return reshape_target([*_dims(lead, size), _product(columns, size)], _dims([*lead, *columns], size))


def _arrange(op: Any, value: Any, perm: list[int] | None, shape: list[int] | None) -> Any:
    if perm is not None:
        value = op.Transpose(value, perm=perm)
    return value if shape is None else op.Reshape(value, op.Constant(value_ints=shape))
