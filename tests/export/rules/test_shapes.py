"""Shape noise: constant shapes, one token without a transpose, the class token, reductions before opset 18, known
conditions."""

import numpy as np
import pytest
from export_graphs import declined, graph, ops, rewrite, run

from vit_convert.export.rules.reduce import ReduceAxesToAttribute
from vit_convert.export.rules.reshape import ConstantReshape, NoDropout, TileToExpand, TokenGather
from vit_convert.export.rules.rule import apply_rule
from vit_convert.export.rules.select import ConstantWhere

COMPUTED = """g (float[n, 4, 6] x) => (float[n, 4, 2, 3] y) <int64[1] zero = {0}, int64[1] two = {2},
    int64[2] tail = {2, 3}> {
    s = Shape (x) lead = Slice (s, zero, two) shape = Concat <axis = 0> (lead, tail) y = Reshape (x, shape) }"""


@pytest.mark.parametrize("opset", [17, 20])
def test_computed_shape_becomes_constant(opset):
    model, count = rewrite(COMPUTED, ConstantReshape(), opset)
    assert count.applied == 1
    assert ops(model) == ["Reshape"]
    assert model.graph[0].inputs[1].const_value.numpy().tolist() == [0, 4, 2, 3]


def test_constant_shape_is_left_alone():
    text = "g (float[n, 4, 6] x) => (float[n, 24] y) <int64[2] shape = {0, 24}> { y = Reshape (x, shape) }"
    assert declined(text, ConstantReshape()) == ""


def test_two_dynamic_axes_that_move_are_declined():
    text = """g (float[n, m, 6] x) => (float[m, n, 6] y) <int64[3] order = {1, 0, 2}> {
        s = Shape (x) shape = Gather <axis = 0> (s, order) y = Reshape (x, shape) }"""
    assert "more than one dynamic dimension" in declined(text, ConstantReshape())


GATHER = (
    "g (float[n, 4, 6] x) => (float[OUT] y) <INDEX> { t = Transpose <perm = [PERM]> (x) y = Gather <axis = 0> "
    "(t, index) }"
)


@pytest.mark.parametrize("opset", [17, 20])
def test_one_token_without_a_transpose(opset):
    text = GATHER.replace("OUT", "n, 6").replace("INDEX", "int64 index = {2}").replace("PERM", "1, 0, 2")
    model, count = rewrite(text, TokenGather(), opset)
    assert count.applied == 1
    assert ops(model) == ["Gather"]


@pytest.mark.parametrize(
    ("output", "index", "perm", "reason"),
    [
        ("n, 4", "int64 index = {2}", "2, 0, 1", "the transpose is (2, 0, 1), not a swap of the first two axes"),
        ("n, 4", "int64 index = {2}", "2, 1, 0", "the transpose is (2, 1, 0), not a swap of the first two axes"),
        ("6, n", "int64 index = {2}", "1, 2, 0", "the transpose is (1, 2, 0), not a swap of the first two axes"),
        ("2, n, 6", "int64[2] index = {0, 1}", "1, 0, 2", "more than one token is taken"),
        ("1, n, 6", "int64[1] index = {1}", "1, 0, 2", "more than one token is taken"),
    ],
)
def test_other_gathers_are_declined(output, index, perm, reason):
    assert (
        declined(GATHER.replace("OUT", output).replace("INDEX", index).replace("PERM", perm), TokenGather()) == reason
    )


def test_a_transpose_that_says_nothing_turns_all_axes():
    """ONNX's default: of two axes it swaps them, of three it does more."""
    text = GATHER.replace(" <perm = [PERM]>", "").replace("INDEX", "int64 index = {2}")
    assert "is (2, 1, 0), not" in declined(text.replace("OUT", "4, n"), TokenGather())
    model, count = rewrite(text.replace("OUT", "n").replace("n, 4, 6", "n, 4"), TokenGather())
    assert count.applied == 1 and ops(model) == ["Gather"]


def test_a_swap_behind_which_other_axes_move_is_declined():
    text = (
        GATHER.replace("OUT", "n, 3, 6")
        .replace("INDEX", "int64 index = {2}")
        .replace("PERM", "1, 0, 3, 2")
        .replace("n, 4, 6", "n, 4, 6, 3")
    )
    assert "is (1, 0, 3, 2), not" in declined(text, TokenGather())


TILE = """g (float[n, 4, 3] x) => (float[n, 1, 3] y)
    <float[1, 1, 3] token = {1, 2, 3}, int64[1] zero = {0}, int64[1] one = {1}, int64[1] two = {2}> {
    s = Shape (x) batch = Gather <axis = 0> (s, zero) repeats = Concat <axis = 0> (batch, one, one) y = Tile (token,
    repeats) }"""


@pytest.mark.parametrize("opset", [17, 20])
@pytest.mark.parametrize("tokens", [4, 1])
def test_class_token_is_expanded(opset, tokens):
    model, count = rewrite(TILE.replace("float[n, 4, 3]", f"float[n, {tokens}, 3]"), TileToExpand(), opset)
    assert count.applied == 1
    assert ops(model) == ["Gather", "Shape", "Expand"]


def test_two_class_tokens_are_expanded():
    text = TILE.replace("float[n, 1, 3] y", "float[n, 2, 3] y")
    text = text.replace("float[1, 1, 3] token = {1, 2, 3}", "float[1, 2, 3] token = {1, 2, 3, 4, 5, 6}")
    model, count = rewrite(text, TileToExpand())
    assert count.applied == 1 and ops(model) == ["Gather", "Shape", "Expand"]
    (found,) = run(model, {"x": np.zeros((3, 4, 3), np.float32)})
    np.testing.assert_array_equal(found, np.tile(np.arange(1, 7, dtype=np.float32).reshape(1, 2, 3), (3, 1, 1)))


@pytest.mark.parametrize(
    ("token", "x", "y"),
    [
        ("1, 1, 3", "n, 4, 5", "n, 1, 3"),
        ("1, 1, 3", "n, 4", "n, 1, 3"),
        ("1, 1, 3", "n, 4, 3, 2", "n, 1, 3"),
        ("2, 1, 3", "n, 4, 3", "m, 1, 3"),
    ],
)
def test_token_that_is_none_of_what_gives_the_batch_is_declined(token, x, y):
    values = ", ".join(["1", "2", "3"] * (2 if "2" in token else 1))
    text = TILE.replace("float[n, 4, 3] x", f"float[{x}] x").replace("float[n, 1, 3] y", f"float[{y}] y")
    text = text.replace("float[1, 1, 3] token = {1, 2, 3}", f"float[{token}] token = {{{values}}}")
    shapes = (str(tuple(shape.split(", "))) for shape in (token, x))
    assert declined(text, TileToExpand()) == "a token of shape {} is not one of {}".format(*shapes)


def test_repeats_of_another_axis_are_declined():
    text = TILE.replace("(s, zero)", "(s, one)").replace("float[n, 1, 3] y", "float[4, 1, 3] y")
    assert declined(text, TileToExpand()) == "the repeats do not begin with the first axis"


def test_repeating_along_the_tokens_does_not_match():
    text = TILE.replace("(batch, one, one)", "(batch, two, one)").replace("float[n, 1, 3] y", "float[n, 2, 3] y")
    assert declined(text, TileToExpand()) == ""


DROPOUT = "g (float[n, 4] x) => (float[n, 4] y) <float ratio = {0.5}, bool training = {VALUE}> { y = Dropout (INPUTS) }"


@pytest.mark.parametrize("inputs", ["x", "x, ratio", "x, ratio, training"])
def test_dropout_goes_away(inputs):
    model, count = rewrite(DROPOUT.replace("VALUE", "0").replace("INPUTS", inputs), NoDropout())
    assert count.applied == 1
    assert "Dropout" not in ops(model)


@pytest.mark.parametrize("value", ["1", ""])
def test_dropout_that_trains_or_may_train_is_declined(value):
    text = DROPOUT.replace("VALUE", value or "0").replace("INPUTS", "x, ratio, training")
    if not value:  # whoever runs the graph says it
        text = text.replace(", bool training = {0}", "").replace("x) =>", "x, bool training) =>")
    assert declined(text, NoDropout()) == "training mode is not the constant False"


REDUCED = "g (float[n, 4, 6] x) => (float[OUT] y) <int64[COUNT] axes = {AXES}> { y = ReduceMean KEPT (x, axes) }"


@pytest.mark.parametrize(("axes", "over"), [("1", (1,)), ("-1", (2,)), ("1, 2", (1, 2))])
# 1 is ONNX's default
@pytest.mark.parametrize(("kept", "keepdims"), [("<keepdims = 0>", False), ("<keepdims = 1>", True), ("", True)])
def test_axes_become_an_attribute_before_opset_18(axes, over, kept, keepdims):
    """jax2onnx writes opset 18's form whatever opset is asked for; onnxruntime refuses it, so NumPy says what is
    right."""
    x = np.random.default_rng(0).standard_normal((3, 4, 6)).astype(np.float32)
    expected = x.mean(over, keepdims=keepdims)
    text = REDUCED.replace("OUT", ", ".join(["n", *map(str, expected.shape[1:])])).replace("COUNT", str(len(over)))
    model = graph(text.replace("AXES", axes).replace("KEPT", kept), 17)
    assert apply_rule(ReduceAxesToAttribute(), model).applied == 1
    assert model.graph[0].attributes["axes"].as_ints() == tuple(map(int, axes.split(",")))
    got = run(model, {"x": x})[0]
    # float32 rounding of a mean of 24 numbers of order 1
    assert got.shape == expected.shape and abs(got - expected).max() < 1e-6


@pytest.mark.parametrize("opset", [18, 20])
def test_axes_stay_an_input_from_opset_18_on(opset):
    text = REDUCED.replace("OUT", "n, 6").replace("COUNT", "1").replace("AXES", "1").replace("KEPT", "<keepdims = 0>")
    assert declined(text, ReduceAxesToAttribute(), opset) == "from opset 18 on the axes are an input"


def test_axes_that_are_computed_are_declined():
    text = "g (float[n, 4, 6] x, int64[1] axes) => (float[n, 6] y) { y = ReduceMean <keepdims = 0> (x, axes) }"
    assert declined(text, ReduceAxesToAttribute(), 17) == "the axes are not constant"


def test_known_condition():
    text = "g (float[n, 4] x, float[n, 4] z) => (float[n, 4] y) <bool yes = {1}> { w = Where (yes, x, z) y = Sqrt (w) }"
    model, count = rewrite(text.replace("Sqrt", "Neg"), ConstantWhere())
    assert count.applied == 1
    assert ops(model) == ["Neg"]


def test_choice_that_is_broadcast_is_declined():
    text = "g (float[4] x, float[n, 4] z) => (float[n, 4] y) <bool yes = {1}> { y = Where (yes, x, z) }"
    assert declined(text, ConstantWhere()) == "the first choice is broadcast"


def test_condition_that_is_false_does_not_match():
    text = "g (float[n, 4] x, float[n, 4] z) => (float[n, 4] y) <bool no = {0}> { y = Where (no, x, z) }"
    assert declined(text, ConstantWhere()) == ""
