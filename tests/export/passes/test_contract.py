"""Passes say what they need and what they leave, and a graph that is not so is refused by the pass that made it so."""

import onnx_ir as ir
import pytest

from vit_convert.core.stack import Stack
from vit_convert.export.passes.contract import (
    Changed,
    GraphPass,
    functions_known,
    is_sound,
    names_unique,
    scale_in_weights,
)
from vit_convert.export.passes.dynamic_image_size import making_dynamic
from vit_convert.export.passes.fold_attention_scale import FOLD_SCALE
from vit_convert.export.passes.fused_encoder import ENCODER_TO_KERNELS
from vit_convert.export.passes.mlp_as_convolution import _TOKENS, flat_is_flat
from vit_convert.export.passes.name_nodes import naming
from vit_convert.export.passes.uint8_input import taking_pixels
from vit_convert.export.passes.unroll_blocks import unrolling
from vit_convert.export.targets import LOWERINGS, TARGETS
from vit_convert.export.weights import describe

BEFORE, AFTER = ir.passes.PreconditionError, ir.passes.PostconditionError
CHAIN = """<ir_version: 10, opset_import: ["" : 20]>
g (float[2] x) => (float[2] y) { a = Relu (x)
 b = Neg (a)
 y = Exp (b) }"""
# The scale stands behind the query's product, where fold_scale takes it from.
ATTENTION = """<ir_version: 10, opset_import: ["" : 20]>
g (float[N, 4, 8] x) => (float[N, 2, 4, 4] y) <float[8, 8] kernel, float[8] bias, float half = {0.5}, int64[4] split> {
 product = MatMul (x, kernel)
 query = Add (product, bias)
 heads = Reshape (query, split)
 scaled = Mul (heads, half)
 turned = Transpose <perm = [0, 2, 1, 3]> (scaled)
 keys = Transpose <perm = [0, 2, 3, 1]> (heads)
 scores = MatMul (turned, keys)
 y = Softmax (scores) }"""


def chain():
    return ir.from_onnx_text(CHAIN)


def attention(text=ATTENTION):
    """ATTENTION whose kernel and bias are parameters, as a traced graph has them."""
    model = ir.from_onnx_text(text)
    read = {value.name: value for node in model.graph for value in node.inputs}
    for name in {"kernel", "bias", "split"} & {*read}:
        model.graph.initializers[name] = read[name]
    return model


def test_a_pass_counts_what_it_changed_and_bears_its_functions_name():
    def flip(model):
        return 3

    found = GraphPass(flip)(chain())
    assert (
        isinstance(found, Changed)
        and (found.places, found.modified) == (3, True)
        and GraphPass(flip).__name__ == "flip"
    )
    assert GraphPass(lambda model: None, name="idle")(chain()).modified is False


def test_conditions_are_asked_before_and_after():
    asked = []

    def condition(name, wrong=""):
        return lambda model: asked.append(name) or wrong

    GraphPass(lambda model: asked.append("change"), name="p", requires=[condition("r")], ensures=[condition("e")])(
        chain()
    )
    assert asked == ["r", "change", "e"]
    with pytest.raises(BEFORE, match="p: before it no tokens"):
        GraphPass(lambda model: asked.append("not run"), name="p", requires=[condition("r", "no tokens")])(chain())
    assert "not run" not in asked
    with pytest.raises(AFTER, match="p: after it two tokens"):
        GraphPass(lambda model: None, name="p", ensures=[condition("e", "two tokens")])(chain())


def test_a_pass_that_reads_a_value_before_it_is_made_is_found():
    def out_of_order(model):
        model.graph[0].replace_input_with(0, model.graph[1].outputs[0])  # a = Relu (b)

    with pytest.raises(AFTER, match="out_of_order: after it Relu a reads b, which is not there yet"):
        GraphPass(out_of_order)(chain())


def test_what_no_output_needs_may_read_what_is_gone():
    def leave(model):
        model.graph.append(ir.node("Neg", [ir.Value(name="gone")]))

    GraphPass(leave)(chain())


@pytest.mark.parametrize("name", ["a", "z"])
@pytest.mark.parametrize("what", ["inputs", "outputs"])
def test_a_pass_that_renames_an_input_or_output_is_found(what, name):
    def rename(model):
        getattr(model.graph, what)[0].name = name

    old = {"inputs": "x", "outputs": "y"}[what]
    with pytest.raises(AFTER, match=f"rename: the {what} were {old} and are {name}"):
        GraphPass(rename)(chain())


@pytest.mark.parametrize("place", [0, 1])
def test_a_pass_that_adds_an_output_is_found(place):
    def add(model):
        model.graph.outputs.insert(place, model.graph[0].outputs[0])

    with pytest.raises(AFTER, match=f"add: the outputs were y and are {('a, y', 'y, a')[place]}"):
        GraphPass(add)(chain())


def test_an_output_that_nothing_makes_is_found():
    model = chain()
    model.graph.outputs[0] = ir.Value(name="y")
    assert is_sound(model) == "nothing makes y"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("Mul (heads, half)", "Mul (heads, gate)"),  # computed from the input
        ("float half = {0.5}", "float[4] half = {0.5, 1, 1, 1}"),  # another one for each channel
        ("Mul (heads, half)", "Div (heads, half)"),
        ("Add (product, bias)", "Sub (product, bias)"),
        ("product = MatMul (x, kernel)", "product = Relu (x)"),
        ("query = Add (product, bias)", "query = Add (product, x)"),
        ("scores = MatMul (turned, keys)", "scores = Add (x, keys)"),
        ("y = Softmax (scores)", "y = Softmax (x)"),
        ("y = Softmax (scores)", "y = Relu (scores)"),
    ],
)
def test_scales_that_no_weight_could_take(old, new):
    text = ATTENTION.replace(" heads =", " gate = ReduceMax (x)\n heads =").replace(old, new)
    assert old in ATTENTION
    model = attention(text)
    describe(model)
    assert scale_in_weights(model) == ""


def test_the_attention_scale_is_seen_where_weights_could_take_it():
    model = attention()
    assert scale_in_weights(model) == ""  # they are no weights yet
    describe(model)
    assert "scaled is scaled after a product with weights" in scale_in_weights(model)
    plugin = LOWERINGS["trt8"]["plugin"].finish[-1]
    with pytest.raises(BEFORE, match="attention_to_plugin: before it scaled"):
        plugin(model)
    assert FOLD_SCALE(model).places == 1 and scale_in_weights(model) == ""


@pytest.mark.parametrize(
    "before", ["Softmax (x)", "Neg (x)\n soft = Softmax (a)", "MatMul (x, kernel)\n soft = Softmax (a)"]
)
def test_the_scale_of_a_later_attention_is_seen(before):
    first = f"{'a' if 'a)' in before else 'soft'} = {before}"
    model = attention(ATTENTION.replace(" product = MatMul (x, ", f" {first}\n product = MatMul (soft, "))
    describe(model)
    assert scale_in_weights(model) == "scaled is scaled after a product with weights"


def test_a_fold_that_left_a_scale_is_found():
    model = attention()
    describe(model)
    lazy = GraphPass(lambda model: 0, name="fold_scale", ensures=(scale_in_weights,))
    with pytest.raises(AFTER, match="fold_scale: after it scaled"):
        lazy(model)


def test_nodes_of_a_plugin_without_a_function():
    model = chain()
    model.graph[1].domain = "tensorrt.plugin"
    assert functions_known(model) == ""  # of a user's own, which the graph does not import
    model.opset_imports["tensorrt.plugin"] = 1
    assert functions_known(model) == "tensorrt.plugin.Neg has no function"


def test_functions_that_do_not_take_what_a_node_gives():
    """onnxruntime lets an attribute pass that a function does not declare; other readers refuse the file."""
    model, x = chain(), ir.Value(name="x")
    node = ir.node("Neg", [x])
    body = ir.Graph([x], node.outputs, nodes=[node], opset_imports={"": 20}, name="Neg")
    declared = [ir.Attr("heads", ir.AttributeType.INT, None)]
    function = ir.Function("tensorrt.plugin", "Neg", graph=body, attributes=declared)
    model.functions[function.identifier()] = function
    model.graph[1].domain, model.opset_imports["tensorrt.plugin"] = "tensorrt.plugin", 1
    model.graph[1].attributes["heads"] = ir.AttrInt64("heads", 2)
    assert functions_known(model) == ""
    model.graph[1].attributes["tokens"] = ir.AttrInt64("tokens", 4)
    assert functions_known(model) == "the function tensorrt.plugin.Neg has no attribute tokens"
    del model.graph[1].attributes["tokens"]
    model.graph[1].resize_inputs(2)
    assert functions_known(model) == "the function tensorrt.plugin.Neg has fewer inputs or outputs than its node"
    model.graph[1].resize_inputs(1)
    model.graph[1].resize_outputs(2)
    assert functions_known(model) == "the function tensorrt.plugin.Neg has fewer inputs or outputs than its node"


def test_names_that_two_share():
    model = chain()
    assert names_unique(model) == "one of the nodes has no name"
    for node in model.graph:
        node.name = node.op_type
    assert names_unique(model) == ""
    model.graph[1].name = "Relu"
    assert names_unique(model) == "two nodes are called Relu"
    model.graph[1].name, model.graph[1].outputs[0].name = "Neg", "a"
    assert names_unique(model) == "two values are called a"


def test_our_kernels_come_after_the_plugin():
    model = chain()
    with pytest.raises(BEFORE, match="encoder_to_kernels: before it no node is CustomQKV"):
        ENCODER_TO_KERNELS(model)


def test_a_stack_needs_its_pattern():
    stack = Stack("Transformer/encoderblock_{}/", 3)
    with pytest.raises(BEFORE, match="unroll: before it no value is block_00, the stream after a block"):
        unrolling(stack)(chain())


def test_taps_are_there_before_names_are_given():
    with pytest.raises(BEFORE, match="name_nodes: before it no value is block_00"):
        naming(["block_00"])(chain())


@pytest.mark.parametrize(
    ("shape", "dynamic"),
    [
        ("batch, height, width, 3", True),
        ("batch, 3, height, width", True),
        ("batch, 4, width, 3", False),
        ("2, height, width, 3", False),
        ("batch, height, width, channels", False),
        ("batch, height, width, 4", False),
        ("", False),
    ],
)
def test_of_images_of_any_size_only_the_channels_are_fixed(shape, dynamic):
    model = ir.from_onnx_text(
        f'<ir_version: 8, opset_import: ["" : 20]> g (float[{shape}] images) => (float[] y) {{ y = Neg (images) }}'
    )
    contract = making_dynamic((2, 2), "pos_embedding", "images")
    if dynamic:
        contract.ensures(model)
    else:
        with pytest.raises(AFTER, match="make_dynamic: after it the input images is "):
            contract.ensures(model)
    with pytest.raises(AFTER, match="the input other is None"):
        making_dynamic((2, 2), "pos_embedding", "other").ensures(model)


def test_pixels_are_taken_once():
    model = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["" : 20]> g (uint8[N, 4, 4, 3] images) => (uint8[N, 4, 4, 3] y) '
        "{ y = Identity (images) }"
    )
    with pytest.raises(BEFORE, match="take_pixels: before it the input images is UINT8, not FLOAT"):
        taking_pixels("images", None, None)(model)


def test_the_layout_of_convolutions():
    model = chain()
    value = model.graph[0].outputs[0]
    value.meta[_TOKENS], value.shape = 4, ir.Shape(["n", 8, 1, 1])
    assert flat_is_flat(model) == ""
    value.shape = ir.Shape(["n", 4, 8])
    assert "is not [batch · tokens, width, 1, 1]" in flat_is_flat(model)


def test_all_passes_of_all_targets_have_a_contract():
    targets = [*TARGETS.values(), *(lowering for known in LOWERINGS.values() for lowering in known.values())]
    assert all(isinstance(change, GraphPass) for target in targets for change in (*target.finish, *target.last))
