"""`--where`: selects rows of a table, using the part of Python's expressions that only compares."""

import ast
import operator
from collections.abc import Callable, Collection, Mapping
from typing import Any

from vit_convert.core.errors import UsageError, nearest

_COMPARE: dict[type, Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
}
_ARITHMETIC: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Mod: operator.mod,
}
_ALLOWED = (
    *(ast.BoolOp, ast.And, ast.Or, ast.UnaryOp, ast.Not, ast.USub, ast.Compare, ast.BinOp),
    *(ast.Name, ast.Load, ast.Constant, ast.Tuple, ast.List),
)
_ORDERED = (ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.In, ast.NotIn)
_FIX = (
    "Columns, numbers, 'texts', and, or, not, in, comparisons and + - * / % of numbers: "
    "--where \"ds=='i1k' and adapt_resolution==384\"."
)


class Where:
    """A condition on the rows of a table.

    Args:
        text: the expression. Names are columns; a missing or empty cell is None, which is neither less nor more than
            anything.
        columns: of the table.

    Raises:
        UsageError: it is not such an expression, or names an unknown column.

    Example:
        >>> Where("ds=='i1k' and size in (224, 384)", ["ds", "size"]).holds({"ds": "i1k", "size": 384})
        True
    """

    def __init__(self, text: str, columns: Collection[str]):
        self._text, self._columns = text, columns
        try:
            self._tree = ast.parse(text.strip(), mode="eval").body
        except (SyntaxError, ValueError, MemoryError, RecursionError) as e:
            raise UsageError(f"--where={text!r}: {e}", fix=_FIX) from e
        for node in ast.walk(self._tree):
            self._require(node)

    def holds(self, row: Mapping[str, Any]) -> bool:
        """Whether a row is selected.

        Raises:
            UsageError: it compares values that cannot be compared.
        """
        try:
            return bool(self._value(self._tree, row))
        except (TypeError, ArithmeticError, RecursionError) as e:
            raise UsageError(f"--where={self._text!r}: {e}, in row {dict(row)}", fix=_FIX) from e

    def _require(self, node: ast.AST) -> None:
        if not isinstance(node, (*_ALLOWED, *_COMPARE, *_ARITHMETIC)):
            raise UsageError(f"--where={self._text!r}: {ast.unparse(node)!r} is not understood", fix=_FIX)
        if isinstance(node, ast.Name) and node.id not in self._columns:
            shown = ", ".join(sorted(self._columns))
            raise UsageError(
                f"--where={self._text!r}: no column {node.id!r}.{nearest(node.id, self._columns)}",
                fix=f"Columns: {shown}",
            )

    def _value(self, node: ast.expr, row: Mapping[str, Any]) -> Any:
        match node:
            case ast.Constant():
                return node.value
            case ast.Name():
                return row.get(node.id)
            case ast.Tuple() | ast.List():
                return tuple(self._value(element, row) for element in node.elts)
            case ast.BoolOp():
                holds = (self._value(value, row) for value in node.values)
                return all(holds) if isinstance(node.op, ast.And) else any(holds)
            case ast.UnaryOp():
                value = self._value(node.operand, row)
                return not value if isinstance(node.op, ast.Not) else -value
            case ast.BinOp():
                left, right = self._value(node.left, row), self._value(node.right, row)
                if not (
                    isinstance(left, int | float) and isinstance(right, int | float)
                ):  # a text times a number could fill the memory
                    raise TypeError(f"{ast.unparse(node)!r} is not of numbers")
                return _ARITHMETIC[type(node.op)](left, right)
        assert isinstance(node, ast.Compare)
        values = [self._value(value, row) for value in (node.left, *node.comparators)]
        return all(_holds(op, left, right) for op, left, right in zip(node.ops, values, values[1:]))


def _holds(op: ast.cmpop, left: Any, right: Any) -> bool:
    if isinstance(op, _ORDERED) and (right is None or (left is None and not isinstance(right, tuple))):
        return isinstance(op, ast.NotIn)
    return _COMPARE[type(op)](left, right)
