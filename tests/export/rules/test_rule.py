"""What every rule relies on: constants, shapes and axes as a graph spells them, and the count of what was rewritten and
why not."""

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from export_graphs import graph, ops

from vit_convert.export.rules.rule import (
    Decline,
    Mismatch,
    Rule,
    apply_rule,
    axes_of,
    opset_of,
    permutation,
    require_scalar,
    reshape_target,
    scalar,
    static_shape,
)


def constant(value: Any) -> ir.Value:
    tensor = ir.tensor(np.asarray(value, np.float32))
    return ir.Value(name="c", const_value=tensor, shape=ir.Shape(tensor.shape))


@pytest.mark.parametrize("value", [2.5, [2.5], [[[2.5]]]])
def test_one_number_whatever_its_rank(value):
    assert scalar(constant(value)) == 2.5
    require_scalar(constant(value), 2.5, "it")


@pytest.mark.parametrize("value", [None, ir.Value(name="x"), constant([1, 1]), constant([])])
def test_what_is_no_single_number(value):
    assert scalar(value) is None
    with pytest.raises(Decline, match="it is None, not 1"):
        require_scalar(value, 1.0, "it")


@pytest.mark.parametrize(
    ("got", "expected"), [(0.7978846, 0.7978845608), (-1.702, -1.702), (0.0, 0.0), (1e-31, 0.0), (2.00001, 2.0)]
)
def test_constants_up_to_their_spelling(got, expected):
    require_scalar(constant(got), expected, "it")


@pytest.mark.parametrize(
    ("got", "expected"), [(0.798, 0.7978845608), (1.702, -1.702), (1e-12, 0.0), (0.0, 1e-6), (2.0002, 2.0)]
)
def test_constants_that_are_others(got, expected):
    """An epsilon of 1e-12 is no zero, and none is no epsilon: only the spelling of float32 is forgiven."""
    with pytest.raises(Decline, match=r"^it is .*, not "):
        require_scalar(constant(got), expected, "it")


def test_shapes():
    assert static_shape(constant([1, 2]), "it") == (2,)
    with pytest.raises(Decline, match=r"^the input has no known shape$"):
        static_shape(ir.Value(name="x"), "the input")


def made(text: str, opset: int) -> ir.Value:
    return (
        graph(f"g (float[n, 4, 6] x, int64[1] given) => (y) <int64[2] axes = {{1, -1}}> {{ {text} }}", opset)
        .graph[-1]
        .outputs[0]
    )


def test_axes_as_attribute_as_input_and_not_known():
    assert axes_of(made("y = ReduceMean <axes = [-1]> (x)", 17)) == [-1]
    assert axes_of(made("y = ReduceSum (x, axes)", 17)) == axes_of(made("y = ReduceMean (x, axes)", 20)) == [1, -1]
    assert axes_of(made("y = ReduceSum (x, given)", 17)) is None  # said at run time
    assert axes_of(made("y = ReduceSum (x)", 20)) is axes_of(made("y = ReduceMean (x)", 17)) is None  # all of them


def test_opset_of_a_value():
    assert [opset_of(made("y = Neg (x)", opset)) for opset in (17, 20)] == [17, 20]


def test_permutations():
    assert permutation(made("y = Transpose <perm = [2, 0, 1]> (x)", 17)) == (2, 0, 1)
    assert permutation(made("y = Transpose (x)", 17)) == (2, 1, 0)


@pytest.mark.parametrize(
    ("source", "target", "expected"),
    [
        (("n", 4, 6), ("n", 24), [0, 24]),
        ((4, "n", 6), ("n", 24), [-1, 24]),  # moved, so what is left
        (("n", "m", 6), ("n", "m", 2, 3), [0, 0, 2, 3]),
        (("n", "m", 6), ("m", "n", 6), None),
        ((4, 6, "n"), ("n", "n", 4), None),
        (("n", "m"), ("n", "m", "k"), [0, 0, -1]),
        ((4, 6), ("n",), [-1]),  # beyond the source
        ((24,), (4, "n"), [4, -1]),
        ((None, 4), (None, 2, 2), [-1, 2, 2]),  # two sizes without a name need not be equal
        ((None, 4), (None, None, 2), None),
    ],
)
def test_target_of_a_reshape(source, target, expected):
    """A size is copied (0) where both have it in one place, and one may be left to be found (-1)."""
    source, target = (
        [ir.SymbolicDim(dim) if not isinstance(dim, int) else dim for dim in shape] for shape in (source, target)
    )
    if expected is None:
        with pytest.raises(Decline, match=r"has more than one dynamic dimension that .* has not"):
            reshape_target(source, target)
    else:
        assert reshape_target(source, target) == expected


class Halved(Rule):
    """A product by a half in either order, unless its other operand is declined or a mismatch."""

    def patterns(self) -> list[Any]:
        return [self.last, self.divided]

    def last(self, op: Any, x: Any, half: Any) -> Any:
        return op.Mul(x, half, _outputs=["y"])

    def divided(self, op: Any, x: Any, half: Any) -> Any:
        return op.Div(x, half, _outputs=["y"])

    def check(self, context: Any, x: ir.Value, half: ir.Value, **_: Any) -> None:
        if x.name == "mismatched":
            raise Mismatch("nobody is told")
        require_scalar(half, 0.5, "the factor")

    def rewrite(self, op: Any, x: ir.Value, **_: Any) -> Any:
        return op.Neg(x)


HALVES = """g (float[n] x, float[n] mismatched) => (float[n] a, float[n] b, float[n] c, float[n] d, float[n] e,
    float[n] f)
    <float half = {0.5}, float more = {0.75}, float quarter = {0.25}> {
    a = Mul (x, half) b = Div (x, half) c = Mul (x, more) d = Div (x, quarter) s = Abs (x) e = Mul (s, more)
    f = Mul (mismatched, quarter) }"""


def test_each_place_is_counted_once():
    model = graph(HALVES)
    count = apply_rule(Halved(), model)
    assert (count.rule, count.applied) == ("Halved", 2)
    assert count.declined == {"the factor is 0.75, not 0.5": 2, "the factor is 0.25, not 0.5": 1}
    assert (ops(model).count("Mul"), ops(model).count("Div")) == (3, 1)


def test_a_rule_without_a_check_takes_every_place():
    class Dropped(Rule):
        def pattern(self, op: Any, x: Any) -> Any:
            return op.Abs(x)

        def rewrite(self, op: Any, x: ir.Value, **_: Any) -> Any:
            return op.Neg(x)

    model = graph("g (float[n] x, float[n] z) => (float[n] y, float[n] w) { y = Abs (x) w = Abs (z) }")
    count = apply_rule(Dropped(), model)
    assert (count.applied, count.declined, ops(model)) == (2, {}, ["Neg", "Neg"])


class Merged(Rule):
    def pattern(self, op: Any, x: Any) -> Any:
        return op.Neg(op.Abs(x))

    def rewrite(self, op: Any, x: ir.Value, **_: Any) -> Any:
        return op.Sqrt(x)


def test_nodes_that_others_read_stay():
    model = graph("g (float[n] x) => (float[n] y, float[n] z) { a = Abs (x) y = Neg (a) z = Exp (a) }")
    assert apply_rule(Merged(), model).applied == 1
    assert sorted(ops(model)) == ["Abs", "Exp", "Sqrt"]


def test_nodes_that_nothing_reads_any_more_go_where_a_rule_was_applied():
    model = graph("g (float[n] x) => (float[n] y) { a = Abs (x) y = Neg (a) unread = Exp (x) }")
    assert apply_rule(Merged(), model).applied == 1 and ops(model) == ["Sqrt"]
