"""Names of nodes and values: after the parameter, else after the block, else after the operator; and what cleaning a
graph leaves."""

import numpy as np
import onnx_ir as ir
import pytest
from export_graphs import described, graph, ops

from vit_convert.core.stack import Stack
from vit_convert.export.passes.cleanup import clean
from vit_convert.export.passes.name_nodes import name_nodes
from vit_convert.export.weights import Weight, replace_weight, weight_of

STACKS = (Stack("Transformer/encoderblock_{}/", 2),)
# Two blocks between an embedding and a head; `e` is the stream that enters block 0, and what is before its norm belongs
# to nobody.
NAMES = {
    "k": "embedding/kernel",
    "g0": "Transformer/encoderblock_0/LayerNorm_0/scale",
    "w0": "Transformer/encoderblock_0/Dense_0/kernel",
    "w1": "Transformer/encoderblock_1/Dense_0/kernel",
    "t": "pos_embedding",
    "h": "head/kernel",
}
BLOCKS = """g (float[n, 4] x, float[4, 4] k, float[4] t, float[4] g0, float[4, 4] w0, float[4, 4] w1, float[4, 2] h)
    => (float[n, 2] y)
    <float half = {0.5}, float quarter = {0.25}> {
    p = MatMul (x, k) e = Add (p, t)
    n = Mul (e, half) m = Mul (n, g0) a = MatMul (m, w0) r = Relu (a) block_00 = Add (r, e)
    c = MatMul (block_00, w1) d = Mul (c, quarter) s, u = Split <axis = 1, num_outputs = 2> (d)
    v = Concat <axis = 1> (u, s)
    block_01 = Add (v, block_00)
    i = Relu (block_01) y = MatMul (i, h) }"""


def named(edit: tuple[str, str] = ("", ""), taps: tuple[str, ...] = ("block_00", "block_01")) -> ir.Model:
    assert edit[0] in BLOCKS
    model = described(BLOCKS.replace(*edit), *NAMES, names=NAMES)
    name_nodes(model, list(taps), STACKS)
    return model


BLOCK_0, BLOCK_1 = "Transformer/encoderblock_0", "Transformer/encoderblock_1"
EXPECTED = [
    ("embedding/MatMul", ["embedding/MatMul"]),
    ("Add", ["Add"]),  # the table's name is no scope
    (f"{BLOCK_0}/Mul", [f"{BLOCK_0}/Mul"]),  # behind the stream, before the block's first parameter
    (f"{BLOCK_0}/LayerNorm_0/Mul", [f"{BLOCK_0}/LayerNorm_0/Mul"]),
    (f"{BLOCK_0}/Dense_0/MatMul", [f"{BLOCK_0}/Dense_0/MatMul"]),
    (f"{BLOCK_0}/Relu", [f"{BLOCK_0}/Relu"]),
    (f"{BLOCK_0}/Add", ["block_00"]),
    (f"{BLOCK_1}/Dense_0/MatMul", [f"{BLOCK_1}/Dense_0/MatMul"]),
    (f"{BLOCK_1}/Mul", [f"{BLOCK_1}/Mul"]),
    (f"{BLOCK_1}/Split", [f"{BLOCK_1}/Split", f"{BLOCK_1}/Split.1"]),
    (f"{BLOCK_1}/Concat", [f"{BLOCK_1}/Concat"]),
    (f"{BLOCK_1}/Add", ["block_01"]),
    ("Relu", ["Relu"]),
    ("head/MatMul", ["y"]),
]


def test_nodes_and_values():
    model = named()
    assert [(node.name, [value.name for value in node.outputs]) for node in model.graph] == EXPECTED
    assert [value.name for value in (*model.graph.inputs, *model.graph.outputs)] == ["x", "y"]
    assert {name for name in model.graph.initializers if name not in NAMES.values()} == {"constant_0", "constant_1"}


def test_without_taps_parameters_alone_give_names():
    model = named(taps=())
    names = [node.name for node in model.graph]
    assert names[:6] == [
        "embedding/MatMul",
        "Add",
        "Mul",
        f"{BLOCK_0}/LayerNorm_0/Mul",
        f"{BLOCK_0}/Dense_0/MatMul",
        "Relu",
    ]
    assert "block_00" not in {value.name for node in model.graph for value in node.outputs}  # it is nobody's tap


@pytest.mark.parametrize("tap", ["block_00", "block_01"])
def test_a_block_of_which_one_end_is_not_known_gives_no_names(tap):
    """Block 1 lies between both taps: without either its nodes have the names of their parameters alone."""
    names = [node.name for node in named(taps=(tap,)).graph]
    assert names[7] == f"{BLOCK_1}/Dense_0/MatMul" and names[8] in ("Mul", "Mul_1") and names[0] == "embedding/MatMul"
    assert (names[2] == f"{BLOCK_0}/Mul") == (tap == "block_00")


def test_a_tap_that_is_no_block_has_no_scope():
    model = named(taps=("block_00", "block_01", "r"))
    relu = next(node for node in model.graph if node.outputs[0].name == "r")
    assert relu.name == f"{BLOCK_0}/Relu"


def test_equal_names_are_numbered():
    model = named(("r = Relu (a)", "r1 = Relu (a) r2 = Exp (r1) r3 = Relu (r2) r = Relu (r3)"))
    found = [node.name.removeprefix(f"{BLOCK_0}/") for node in model.graph if node.op_type == "Relu"]
    assert found == ["Relu", "Relu_1", "Relu_2", "Relu"]


def test_a_block_whose_parameters_come_first_begins_with_them():
    """Nothing stands between the stream and the first product; two nodes that share the stream do not end the
    embedding."""
    model = named(("n = Mul (e, half) m = Mul (n, g0)", "m = Mul (e, g0)"))
    assert [node.name for node in model.graph][1:3] == ["Add", f"{BLOCK_0}/LayerNorm_0/Mul"]
    model = named(
        ("n = Mul (e, half) m = Mul (n, g0)", "n1 = Mul (e, half) n2 = Exp (e) n = Sub (n1, n2) m = Mul (n, g0)")
    )
    assert [node.name for node in model.graph][1:5] == ["Add", f"{BLOCK_0}/Mul", f"{BLOCK_0}/Exp", f"{BLOCK_0}/Sub"]


def test_where_the_images_are_read_within_the_block_no_value_alone_carries_the_stream():
    """Nothing tells where the embedding ends: what has no parameter counts as the block's."""
    model = named(("p = MatMul (x, k) e = Add (p, t)", "q = Relu (x) p = MatMul (q, k) e = Add (p, t)"))
    assert [node.name for node in model.graph][:3] == ["Relu", "embedding/MatMul", "Add"]
    text = BLOCKS.replace("p = MatMul (x, k)", "q = Relu (x) p = MatMul (q, k)").replace(
        "r = Relu (a)", "r = Add (a, x)"
    )
    model = described(text, *NAMES, names=NAMES)
    name_nodes(model, ["block_00", "block_01"], STACKS)
    assert [node.name for node in model.graph][:3] == [f"{BLOCK_0}/Relu", "embedding/MatMul", f"{BLOCK_0}/Add"]


def test_a_bias_that_took_the_table_in_keeps_its_place():
    model = described(BLOCKS, *NAMES, names={**NAMES, "t": "embedding/bias"})
    add = model.graph[1]
    combined = Weight(("embedding/bias", "pos_embedding"), (4,), np.add, num_read=8)
    add.replace_input_with(1, replace_weight(model.graph, add.inputs[1], combined))
    name_nodes(model, ["block_00", "block_01"], STACKS)
    assert add.name == "embedding/Add"


def test_weights_of_several_parameters_belong_to_what_is_around_them():
    """Queries, keys and values in one: the attention, not the query."""
    model = described(BLOCKS, *NAMES, names={**NAMES, "w0": f"{BLOCK_0}/attention/query/kernel"})
    old = model.graph.initializers[f"{BLOCK_0}/attention/query/kernel"]
    merged = Weight(
        tuple(f"{BLOCK_0}/attention/{part}/kernel" for part in ("query", "key", "value")),
        (4, 4),
        lambda *parts: parts[0],
    )
    product = next(node for node in model.graph if old in node.inputs)
    product.replace_input_with(1, replace_weight(model.graph, old, merged))
    name_nodes(model, ["block_00", "block_01"], STACKS)
    assert product.name == f"{BLOCK_0}/attention/MatMul"
    assert weight_of(product.inputs[1]) is merged


# --- cleaning -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "left"),
    [
        ("a = Identity (x) y = Neg (a)", ["Neg"]),
        ("a = Neg (x) b = Neg (x) y = Add (a, b)", ["Neg", "Add"]),  # computed twice
        ("a = Neg (x) b = Exp (x) y = Abs (x)", ["Abs"]),  # read by nobody
        ("c = Constant <value_float = 2.0> () y = Mul (x, c)", ["Mul"]),
        ("c = Constant <value_ints = [0, 4]> () y = Reshape (x, c)", ["Reshape"]),
    ],
)
def test_what_serves_no_purpose_goes_away(body, left):
    model = ir.from_onnx_text(
        f'<ir_version: 8, opset_import: ["" : 20, "unused" : 1]> g (float[n, 4] x) => (float[n, 4] y) {{ {body} }}'
    )
    clean(model)
    assert ops(model) == left
    assert set(model.graph.opset_imports) == {""}
    assert all(
        value.shape is not None and [str(dim) for dim in value.shape] == ["n", "4"]
        for node in model.graph
        for value in node.outputs
    )


def test_a_constant_without_numbers_is_one_too():
    """The shape of a single number."""
    model = ir.from_onnx_text(
        '<ir_version: 8, opset_import: ["" : 20]> g (float[1] x) => (float y) { c = Constant <value = int64[0] {}> '
        "() y = Reshape (x, c) }"
    )
    clean(model)
    assert ops(model) == ["Reshape"] and model.graph[0].inputs[1].is_initializer()


def test_equal_constants_are_one():
    model = graph("g (float[n] x) => (float[n] y) <float a = {2}, float b = {2}> { z = Mul (x, a) y = Add (z, b) }")
    assert len(model.graph.initializers) == 1


@pytest.mark.parametrize(
    ("operator", "operands", "expected"),
    [
        ("Add", "two, x", ["x", "two"]),
        ("Mul", "two, x", ["x", "two"]),
        ("Add", "x, two", ["x", "two"]),
        ("Add", "two, three", ["two", "three"]),  # both are constants
        ("Add", "z, x", ["z", "x"]),  # none is
        ("Sub", "two, x", ["two", "x"]),  # the order means something
        ("Div", "two, x", ["two", "x"]),
    ],
)
def test_constants_stand_on_the_right(operator, operands, expected):
    model = graph(
        f"g (float[n] x, float[n] z) => (float[m] y) <float two = {{2}}, float three = {{3}}> {{ y = {operator} "
        f"({operands}) }}"
    )
    assert [value.name for value in model.graph[0].inputs] == expected


def test_a_weight_stands_on_the_right_too():
    model = described("g (float[n, 4] x, float[4] w) => (float[n, 4] y) { y = Add (w, x) }", "w")
    clean(model)
    assert [value.name for value in model.graph[0].inputs] == ["x", "w"]
