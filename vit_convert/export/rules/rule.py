"""Substitution rules: a pattern, a check that says why it declines, and a rewrite. Rules are applied and counted
here."""

import collections
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript.rewriter import pattern

from vit_convert.core.stage_results import RuleCount
from vit_convert.export.passes.cleanup import clean


class Decline(Exception):
    """Raised by a rule's `check`, with the reason, to leave a matching place alone."""


class Mismatch(Exception):
    """Raised by a rule's `check` for a place that only looks like the pattern; nothing is reported."""


class Rule:
    """A substitution: subclasses define `pattern`, `check` (raises Decline) and `rewrite`; the docstring's first line
    describes it.

    Attributes:
        pattern: the graph to look for, written as calls of `op`.
        check: gets the context and the pattern's variables by name, and may raise Decline or Mismatch; accepts every
            match by default.
        rewrite: makes the replacement from `op` and the pattern's variables.
    """

    pattern: Callable[..., Any]
    rewrite: Callable[..., Any]

    def _accept(self, context: Any, **_: Any) -> None:
        pass

    check: Callable[..., None] = _accept

    def patterns(self) -> Sequence[Callable[..., Any]]:
        """The forms to look for, if there are more than `pattern`; all bind the variables that `check` and `rewrite`
        need."""
        return [self.pattern]


def apply_rule(rule: Rule, model: ir.Model) -> RuleCount:
    """Rewrites every place of `model` that the rule accepts, in place.

    Args:
        rule: the rule.
        model: the graph, after `clean`; weights need no values.

    Returns:
        How often it was applied, and why it declined elsewhere.
    """
    declined: dict[tuple[str, ...], str] = {}  # by matched nodes, since the rewriter may ask about one place twice

    def accepts(context: Any, **bindings: Any) -> pattern.MatchResult:
        result = pattern.MatchResult()
        place = tuple(sorted(v.name or "" for v in bindings.values() if isinstance(v, ir.Value)))
        try:
            rule.check(context, **bindings)
            declined.pop(place, None)  # another form did not fit here
        except Mismatch as reason:
            result.fail(str(reason))
        except Decline as reason:
            declined[place] = str(reason)
            result.fail(str(reason))
        return result

    # Matched nodes may also be used elsewhere (jax2onnx shares Reshapes); unused ones are removed below.
    compiled = [
        pattern.RewriteRule(spelling, rule.rewrite, accepts, remove_nodes=False) for spelling in rule.patterns()
    ]
    applied = pattern.RewriteRuleSet(compiled).apply_to_model(model)
    if applied:
        clean(model)
    return RuleCount(type(rule).__name__, applied, dict(collections.Counter(declined.values())))


def axes_of(value: ir.Value) -> list[int] | None:
    """The axes of the reduction that makes `value`, which are an attribute or an input, depending on operator and
    opset; None if they are not constant."""
    node = value.producer()
    assert node is not None
    if "axes" in node.attributes:
        return list(node.attributes["axes"].as_ints())
    axes = node.inputs[1] if len(node.inputs) > 1 else None
    return None if axes is None or axes.const_value is None else axes.const_value.numpy().tolist()


def permutation(value: ir.Value) -> tuple[int, ...]:
    """The axes of the Transpose that makes `value`; all of them reversed if it states none."""
    node = value.producer()
    assert node is not None
    if "perm" in node.attributes:
        return tuple(node.attributes["perm"].as_ints())
    return tuple(reversed(range(len(static_shape(value, "the transpose")))))


def opset_of(value: ir.Value) -> int:
    """The ONNX opset of the graph that a computed value belongs to."""
    node = value.producer()
    assert node is not None and node.graph is not None
    return node.graph.opset_imports[""]


def scalar(value: ir.Value | None) -> float | None:
    """The value of a constant with one element; None for anything else."""
    if value is None or value.const_value is None or value.const_value.size != 1:
        return None
    return float(value.const_value.numpy().reshape(()))


def require_scalar(value: ir.Value, expected: float, what: str, rtol: float = 1e-5) -> None:
    """Declines unless `value` is the constant `expected`, up to float32 rounding."""
    got = scalar(value)
    if got is None or not np.isclose(got, expected, rtol=rtol, atol=0.0 if expected else 1e-30):
        raise Decline(f"{what} is {got}, not {expected:g}")


def static_shape(value: ir.Value, what: str) -> Sequence[int | ir.SymbolicDim]:
    """The dimensions of a value; declines when even the rank is unknown."""
    if value.shape is None:
        raise Decline(f"{what} has no known shape")
    return tuple(value.shape)


def reshape_target(source: Sequence[Any], target: Sequence[Any]) -> list[int]:
    """Writes a target shape as constants for Reshape: 0 copies the source's dimension at that place, -1 stands for the
    rest.

    Args:
        source: dimensions before, ints or symbolic.
        target: dimensions wanted, ints or symbolic.

    Returns:
        The constant shape.

    Raises:
        Decline: more than one dynamic dimension cannot be copied.
    """
    spelled = []
    for i, dim in enumerate(target):
        if isinstance(dim, int):
            spelled.append(dim)
        elif i < len(source) and source[i] == dim and dim.value is not None:
            spelled.append(0)
        else:
            spelled.append(-1)
    if spelled.count(-1) > 1:
        raise Decline(
            f"{tuple(map(str, target))} has more than one dynamic dimension that {tuple(map(str, source))} has not"
        )
    return spelled
