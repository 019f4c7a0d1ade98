"""Shape noise: constant shapes, one token without a transpose, the class token, reductions before opset 18, known conditions."""

import onnx_ir as ir
import pytest
from export_graphs import declined, graph, ops, random_feeds, rewrite, run

from vit_convert.export.rules.reduce import ReduceAxesToAttribute
from vit_convert.export.rules.reshape import ConstantReshape, NoDropout, TileToExpand, TokenGather
from vit_convert.export.rules.rule import Decline, apply_rule, reshape_target
from vit_convert.export.rules.select import ConstantWhere

COMPUTED = """g (float[n, 4, 6] x) => (float[n, 4, 2, 3] y) <int64[1] zero = {0}, int64[1] two = {2}, int64[2] tail = {2, 3}> {
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


def test_reshape_target_spells_every_case():
    n = ir.SymbolicDim("n")
    assert reshape_target((n, 4, 6), (n, 24)) == [0, 24]
    assert reshape_target((4, n, 6), (n, 24)) == [-1, 24]
    with pytest.raises(Decline):
        reshape_target((4, 6, n), (n, n, 4))


GATHER = "g (float[n, 4, 6] x) => (float[OUT] y) <INDEX> { t = Transpose <perm = [PERM]> (x) y = Gather <axis = 0> (t, index) }"


@pytest.mark.parametrize("opset", [17, 20])
def test_one_token_without_a_transpose(opset):
    text = GATHER.replace("OUT", "n, 6").replace("INDEX", "int64 index = {2}").replace("PERM", "1, 0, 2")
    model, count = rewrite(text, TokenGather(), opset)
    assert count.applied == 1
    assert ops(model) == ["Gather"]


@pytest.mark.parametrize(
    ("output", "index", "perm", "reason"),
    [
        ("n, 4", "int64 index = {2}", "2, 0, 1", "not a swap of the first two"),
        ("2, n, 6", "int64[2] index = {0, 1}", "1, 0, 2", "more than one"),
    ],
)
def test_other_gathers_are_declined(output, index, perm, reason):
    assert reason in declined(GATHER.replace("OUT", output).replace("INDEX", index).replace("PERM", perm), TokenGather())


TILE = """g (float[n, 4, 3] x) => (float[n, 1, 3] y)
    <float[1, 1, 3] token = {1, 2, 3}, int64[1] zero = {0}, int64[1] one = {1}, int64[1] two = {2}> {
    s = Shape (x) batch = Gather <axis = 0> (s, zero) repeats = Concat <axis = 0> (batch, one, one) y = Tile (token, repeats) }"""


@pytest.mark.parametrize("opset", [17, 20])
def test_class_token_is_expanded(opset):
    model, count = rewrite(TILE, TileToExpand(), opset)
    assert count.applied == 1
    assert ops(model) == ["Gather", "Shape", "Expand"]


def test_token_of_another_width_is_declined():
    text = TILE.replace("float[n, 4, 3] x", "float[n, 4, 5] x")
    assert declined(text, TileToExpand()) == "a token of shape ('1', '1', '3') is not one of ('n', '4', '5')"


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


def test_dropout_that_trains_is_declined():
    text = DROPOUT.replace("VALUE", "1").replace("INPUTS", "x, ratio, training")
    assert declined(text, NoDropout()) == "training mode is not the constant False"


def test_axes_become_an_attribute_before_opset_18():
    """jax2onnx writes opset 18's form whatever opset is asked for; onnxruntime refuses it, so there is nothing to compare with."""
    text = "g (float[n, 4, 6] x) => (float[n, 6] y) <int64[1] axes = {1}> { y = ReduceMean <keepdims = 0> (x, axes) }"
    model = graph(text, 17)
    count = apply_rule(ReduceAxesToAttribute(), model)
    assert count.applied == 1
    assert model.graph[0].attributes["axes"].as_ints() == (1,)
    feeds = random_feeds(model)
    assert abs(run(model, feeds)[0] - feeds["x"].mean(1)).max() < 1e-6  # float32 rounding of a mean of four numbers of order 1


def test_axes_stay_an_input_from_opset_18_on():
    text = "g (float[n, 4, 6] x) => (float[n, 6] y) <int64[1] axes = {1}> { y = ReduceMean <keepdims = 0> (x, axes) }"
    assert declined(text, ReduceAxesToAttribute(), 20) == "from opset 18 on the axes are an input"


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
