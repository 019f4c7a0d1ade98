"""Attention as a plugin and an encoder of our kernels, on one block of a few nodes: form, refusals, numbers against
NumPy."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from block_graphs import HEADS, NAMES, TOKENS, WIDTH, block, by_hand, images, norm, random_block
from export_graphs import computed, graph, ops

from vit_convert.core.errors import ExportError
from vit_convert.export.passes.attention_plugin import (
    DOMAIN,
    PLUGIN,
    attention_for_kernels,
    attention_to_plugin,
    fits,
    fits_kernels,
)
from vit_convert.export.passes.cleanup import clean
from vit_convert.export.passes.fused_encoder import (
    ADD_NORM,
    ATTENTION,
    NORM,
    encoder_to_half_kernels,
    encoder_to_kernels,
    has_attention_plugins,
    no_attention_plugin,
    quantized_tensors,
    with_what_leads_to,
    write_in_fp16,
)
from vit_convert.export.passes.mlp_as_convolution import mlps_to_convolutions
from vit_convert.export.weights import bind

TOLERANCE = 1e-5  # of float32 sums of 128 products in another order; heads or parts in another order are off by 1
SCALE = 8.0  # the root of heads of 64: the plugin divides by it, and the query's weights have done so already


def with_plugin(**options) -> ir.Model:
    """The block with its attention as TensorRT's plugin has it; the scale is in the query's weights, as `fold_scale`
    leaves it."""
    model = block(**options)
    assert mlps_to_convolutions(model) == 1
    clean(model)
    assert attention_to_plugin(model) == 1
    clean(model)
    return model


def fused(**options) -> ir.Model:
    model = with_plugin(**options)
    for i, node in enumerate(model.graph):
        node.name = f"{node.op_type}_{i}"
        for j, value in enumerate(node.outputs):
            value.name = value.name if value.is_graph_output() else f"{node.name}.{j}"
    assert encoder_to_kernels(model) == 3
    clean(model)
    return model


def agrees(model: ir.Model, x: np.ndarray) -> None:
    got, expected = computed(model, random_block(), x)[0], by_hand(random_block(), x)
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() <= TOLERANCE * np.abs(expected).max()


def nodes_of(model: ir.Model, op_type: str) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type == op_type]


# --- the plugin -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 4])
def test_the_plugin_computes_attention(count):
    agrees(with_plugin(), images(count))


def test_the_form_of_the_plugin():
    model = with_plugin()
    assert ops(model).count("Conv") == 4 and "MatMul" not in ops(model) and "Softmax" not in ops(model)
    (plugin,) = nodes_of(model, PLUGIN)
    assert plugin.domain == DOMAIN and model.opset_imports[DOMAIN] == 1
    assert {name: attribute.value for name, attribute in plugin.attributes.items()} == {
        **{"type_id": 1, "hidden_size": WIDTH, "num_heads": HEADS, "has_mask": 1, "var_seqlen": 1},
        **{"plugin_version": "2", "plugin_namespace": ""},
    }
    before, (after,) = plugin.inputs[0].producer(), [user for user, _ in plugin.outputs[0].uses()]
    attention = "Transformer/encoderblock_0/attention"
    assert [value.name for value in before.inputs[1:]] == [f"{attention}/qkv/kernel", f"{attention}/qkv/bias"]
    assert [value.name for value in after.inputs[1:]] == [NAMES["out"], NAMES["out_bias"]]
    shapes = [[node.op_type, *list(node.outputs[0].shape)[1:]] for node in (before, plugin, after)]
    assert shapes == [["Conv", 3 * WIDTH, 1, 1], [PLUGIN, WIDTH, 1, 1], ["Conv", WIDTH, 1, 1]]
    assert [tuple(node.attributes["kernel_shape"].as_ints()) for node in (before, after)] == [(1, 1), (1, 1)]
    mask, ends, longest = plugin.inputs[1:]
    assert mask.const_value.numpy().tolist() == [0] and longest.const_value.numpy().tolist() == [0] * TOKENS
    assert {value.dtype for value in (mask, ends, longest)} == {ir.DataType.INT32}


def test_queries_keys_and_values_lie_head_by_head():
    """The plugin reads [heads, 3, size]; the query's weights are multiplied by the root that it divides by."""
    model, params = with_plugin(), random_block()
    computed(model, params, images(1))
    (plugin,) = nodes_of(model, PLUGIN)
    _, kernel, bias = plugin.inputs[0].producer().inputs
    rows = kernel.const_value.numpy().reshape(HEADS, 3, WIDTH // HEADS, WIDTH)
    offsets = bias.const_value.numpy().reshape(HEADS, 3, WIDTH // HEADS)
    for i, (part, factor) in enumerate((("query", SCALE), ("key", 1.0), ("value", 1.0))):
        matrix, vector = params[NAMES[part]], params[NAMES[f"{part}_bias"]]
        np.testing.assert_allclose(rows[:, i].reshape(WIDTH, WIDTH), factor * matrix.T, rtol=1e-6)
        np.testing.assert_allclose(offsets[:, i].reshape(WIDTH), factor * vector, rtol=1e-6)


@pytest.mark.parametrize(
    ("size", "tokens", "expected"),
    [
        (64, 512, True),
        (64, 1, True),
        (64, 513, False),
        (32, 197, False),
        (65, 197, False),
        (63, 197, False),
        (128, 197, False),
    ],
)
def test_what_the_plugin_has_kernels_for(size, tokens, expected):
    assert fits(size, tokens) is expected


@pytest.mark.parametrize(
    ("size", "tokens", "causal", "expected"),
    [
        *((size, tokens, False, True) for size in (64, 72, 80) for tokens in (1, 729, 4096)),
        *((size, 197, False, False) for size in (32, 63, 96)),
        (64, 800, True, True),
        (64, 801, True, False),
        (72, 77, True, False),
        (80, 77, True, False),
    ],
)
def test_what_our_kernels_are_for(size, tokens, causal, expected):
    """Tile by tile over any number of tokens; under a causal mask all keys and values of a head in 227 KiB: 2 bytes
    each, rows of 8 more than the size, tokens in sixteens."""
    assert fits_kernels(size, tokens, causal=causal) is expected


def test_heads_that_our_kernels_do_not_take():
    halves = f"{{0, {TOKENS}, {2 * HEADS}, {WIDTH // HEADS // 2}}}"
    model = block(edit=(f"split = {{0, {TOKENS}, {HEADS}, {WIDTH // HEADS}}}", f"split = {halves}"))
    mlps_to_convolutions(model)
    clean(model)
    with pytest.raises(
        ExportError,
        match=rf"lowering kernels: heads of 32 over {TOKENS} tokens; the kernels are for heads of 64, 72, 80",
    ):
        attention_for_kernels(model)


NO_ATTENTION = "no attention over all of a fixed number of tokens"


@pytest.mark.parametrize(
    "edit",
    [
        ("w = Softmax <axis = -1> (scores)", "w = Sigmoid (scores)"),
        ("scores = MatMul (tq, tk)", "raw = MatMul (tq, tk) scores = Mul (raw, half)"),  # something between
        ("w = Softmax <axis = -1> (scores)", "u = Softmax <axis = -1> (scores) w = Relu (u)"),
        ("o = MatMul (w, tv)", "oo = MatMul (w, tv) ow = Relu (w) ov = MatMul (ow, tv) o = Add (oo, ov)"),  # read twice
        ("sq = Add (pq, query_bias)", "sq = Mul (pq, query_bias)"),
        ("sv = Add (pv, value_bias)", "sv = Sub (pv, value_bias)"),
        ("pk = MatMul (m, key)", "pk = MatMul (x, key)"),  # keys of something else: cross-attention
        ("pv = MatMul (m, value)", "mm = Neg (m) pv = MatMul (mm, value)"),
        ("so = Add (po, out_bias)", "so = Mul (po, out_bias)"),
        ("ro = Reshape (to, merge)", "rr = Reshape (to, merge) ro = Relu (rr)"),
        ("sk = Add (pk, key_bias)", "sk = Add (pk, pk)"),
    ],
)
def test_what_is_no_attention_for_the_plugin(edit):
    model = block(edit=edit)
    mlps_to_convolutions(model)
    clean(model)
    with pytest.raises(ExportError, match=NO_ATTENTION):
        attention_to_plugin(model)


def test_one_token_that_attends_to_all_is_none():
    """As the pruned last block has it: one row of scores."""
    model = block(
        edit=("scores = MatMul (tq, tk)", "first = Gather <axis = 2> (tq, token) scores = MatMul (first, tk)"),
        attention=True,
    )
    token = ir.Value(
        name="token", const_value=ir.tensor(np.array([0])), shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.INT64)
    )
    gather = next(node for node in model.graph if node.op_type == "Gather")
    model.graph.initializers.add(token)
    gather.replace_input_with(1, token)
    for node in model.graph:
        if node.op_type in ("Gather", "MatMul", "Softmax") and node.outputs[0].name in ("first", "scores", "w"):
            node.outputs[0].shape = ir.Shape(
                ["n", HEADS, 1, {"first": WIDTH // HEADS}.get(node.outputs[0].name, TOKENS)]
            )
    with pytest.raises(ExportError, match=NO_ATTENTION):
        attention_to_plugin(model)


def test_tokens_that_are_not_flat_are_refused():
    with pytest.raises(ExportError, match="the tokens are not flat around an attention"):
        attention_to_plugin(block())


def test_heads_of_another_size_are_refused():
    halves = f"{{0, {TOKENS}, {2 * HEADS}, {WIDTH // HEADS // 2}}}"
    model = block(edit=(f"split = {{0, {TOKENS}, {HEADS}, {WIDTH // HEADS}}}", f"split = {halves}"))
    mlps_to_convolutions(model)
    clean(model)
    with pytest.raises(
        ExportError, match=rf"heads of 32 over {TOKENS} tokens; the plugin has kernels for heads of 64 over at most 512"
    ):
        attention_to_plugin(model)


# --- our kernels ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 4])
def test_the_kernels_compute_the_block(count):
    agrees(fused(), images(count))


def settings(node: ir.Node) -> dict[str, object]:
    return {name: attribute.value for name, attribute in node.attributes.items()}


def test_the_form_of_the_kernels():
    model = fused()
    assert {name for _, name, _ in model.functions} == {ATTENTION, ADD_NORM, NORM}
    (attention,), (first,), (second,) = (nodes_of(model, op_type) for op_type in (ATTENTION, NORM, ADD_NORM))
    plugin = {"plugin_version": "1", "plugin_namespace": "", "quantized": 1}
    assert settings(attention) == {"heads": HEADS, "tokens": TOKENS, "head": WIDTH // HEADS, "int8_in": 1, **plugin}
    for node in (first, second):
        assert settings(node) == {"epsilon": pytest.approx(0.1), **plugin}
    assert [value.name for value in second.inputs[2:]] == [NAMES["gamma"], NAMES["beta"]]
    branch, stream = second.inputs[:2]
    assert branch.producer().op_type == "Conv" and stream.producer().op_type == "Reshape"  # the images, made flat
    # the sum goes on as the stream, the norm into the MLP
    assert [user.op_type for user, _ in second.outputs[0].uses()] == ["Add"]
    assert [user.op_type for user, _ in second.outputs[1].uses()] == ["Conv"]
    assert "LayerNormalization" not in ops(model) and PLUGIN not in ops(model)


def test_functions_say_what_they_take():
    functions = {function.name: function for function in fused().functions.values()}
    names = {name: ([value.name for value in f.inputs], sorted(f.attributes)) for name, f in functions.items()}
    plugin = ["plugin_namespace", "plugin_version", "quantized"]
    assert names == {
        ATTENTION: (["qkv"], ["head", "heads", "int8_in", *plugin, "tokens"]),
        ADD_NORM: (["branch", "residual", "gamma", "beta"], ["epsilon", *plugin]),
        NORM: (["residual", "gamma", "beta"], ["epsilon", *plugin]),
    }
    assert {len(f.outputs) for name, f in functions.items() if name != ADD_NORM} == {1} and len(
        functions[ADD_NORM].outputs
    ) == 2


def test_tensors_that_may_be_int8():
    """What convolutions read, and what they, activations and kernels give; of the stream nothing, of branches only when
    asked."""
    model = fused()
    read, other = quantized_tensors(model)
    produced = {value.name: node.op_type for node in model.graph for value in node.outputs}
    assert sorted(produced[name] for name in read) == sorted([NORM, ATTENTION, ADD_NORM, "Relu"])
    # q, k and v; fc1; fc2, whose sum is the output
    assert sorted(produced[name] for name in other) == ["Conv", "Conv", "Conv"]
    with_branches = quantized_tensors(model, branches=True)
    assert with_branches[0] == read and sorted(produced[name] for name in with_branches[1]) == ["Conv"] * 4


def test_what_anything_else_reads_may_not_be_int8():
    """A hybrid's convolutions are read by GroupNorms, and what the check does not compute in INT8 no engine may."""
    text = """<ir_version: 9, opset_import: ["" : 17]>
        g (float[1, 4, 2, 2] x, float[4, 4, 1, 1] w, float[4] s) => (float[1, 4, 2, 2] y) {
            a = Conv (x, w) b = Relu (a) c = Conv (b, w) d = InstanceNormalization (c, s, s) y = Conv (d, w)
        }"""
    model = ir.from_proto(onnx.parser.parse_model(text))
    assert quantized_tensors(model) == (["b"], ["a", "y"])


def test_tensors_of_a_graph_from_a_file():
    model = fused()
    bind(model, random_block())
    assert quantized_tensors(ir.from_proto(ir.to_proto(model))) == quantized_tensors(model)


def test_kernels_in_half_precision_write_and_read_no_int8():
    model = with_plugin()
    assert encoder_to_half_kernels(model) == 3
    ours = [node for node in model.graph if node.domain == DOMAIN]
    assert {node.op_type: node.attributes["quantized"].as_int() for node in ours} == {
        ATTENTION: 0,
        NORM: 0,
        ADD_NORM: 0,
    }
    assert nodes_of(model, ATTENTION)[0].attributes["int8_in"].as_int() == 0
    assert nodes_of(fused(), ATTENTION)[0].attributes["int8_in"].as_int() == 1
    agrees(model, images())


def test_what_is_written_in_fp16_is_named():
    """What a kernel gives to convolutions; of an addition with a norm that is its second output."""
    model = fused()
    (attention,), (first,), (second,) = (nodes_of(model, op_type) for op_type in (ATTENTION, NORM, ADD_NORM))
    write_in_fp16(model, [second.outputs[1].name, attention.outputs[0].name, "nothing"])
    assert [node.attributes["quantized"].as_int() for node in (attention, first, second)] == [0, 1, 0]
    model = fused()
    write_in_fp16(model, [nodes_of(model, ADD_NORM)[0].outputs[0].name])  # the stream, which is never INT8
    assert {node.attributes["quantized"].as_int() for node in model.graph if node.domain == DOMAIN} == {1}


def test_what_leads_from_a_convolution_to_a_tensor():
    """The activation's nodes and the convolution before them: no constant, nothing else that the graph takes, nothing
    beyond."""
    model = fused(edit=("a = Relu (s1)", "t = Mul (s1, half) u = Tanh (t) a = Mul (u, s1)"))
    after = next(
        node for node in model.graph if node.op_type == "Mul" and node.inputs[0].producer().op_type == "Tanh"
    ).outputs[0]
    tanh = after.producer().inputs[0]
    between = {after.name, tanh.name, tanh.producer().inputs[0].name, after.producer().inputs[1].name}
    assert after.producer().inputs[1].producer().op_type == "Conv" and len(between) == 4
    assert with_what_leads_to(model, [after.name]) == between
    (norm_,) = nodes_of(model, NORM)
    assert with_what_leads_to(model, [norm_.outputs[0].name]) == {norm_.outputs[0].name}


def test_a_norm_that_is_not_flat_stays():
    """The one at the end, whose tokens are no convolution's."""
    model = fused(
        edit=("y = Add (s2, z)", "u = Add (s2, z) y = LayerNormalization <axis = -1, epsilon = 0.1> (u, gamma, beta)")
    )
    (last,) = nodes_of(model, "LayerNormalization")
    assert last.outputs[0].name == "y" and [len(nodes_of(model, op_type)) for op_type in (NORM, ADD_NORM)] == [1, 1]
    p = {word: random_block()[name] for word, name in NAMES.items()}
    expected = norm(by_hand(random_block(), images()), p["gamma"], p["beta"])
    got = computed(model, random_block(), images())[0]
    assert np.abs(got - expected).max() <= TOLERANCE * np.abs(expected).max()


@pytest.mark.parametrize("width", [16, 48, 2080])
def test_widths_without_a_kernel(width):
    model = with_plugin()
    (plugin,) = nodes_of(model, PLUGIN)
    plugin.attributes["hidden_size"] = ir.AttrInt64("hidden_size", width)
    with pytest.raises(ExportError, match=rf"a width of {width}; the kernels are for multiples of 32 up to 2048"):
        encoder_to_kernels(model)


@pytest.mark.parametrize("width", [32, 2048])
def test_widths_with_a_kernel(width):
    model = with_plugin()
    (plugin,) = nodes_of(model, PLUGIN)
    plugin.attributes["hidden_size"] = ir.AttrInt64("hidden_size", width)
    assert encoder_to_kernels(model) == 3


def test_what_others_read_is_not_quantized():
    """A norm or an attention that anything but a convolution reads besides."""
    model = with_plugin()
    for node in (nodes_of(model, PLUGIN)[0], nodes_of(model, "LayerNormalization")[0]):
        negative = ir.node("Neg", [node.outputs[0]])
        negative.outputs[0].name = f"negative_{node.op_type}"
        model.graph.insert_after(node, negative)
        model.graph.outputs.append(negative.outputs[0])
    assert encoder_to_kernels(model) == 3
    flags = {node.op_type: node.attributes["quantized"].as_int() for node in model.graph if node.domain == DOMAIN}
    assert flags == {ATTENTION: 0, NORM: 0, ADD_NORM: 1}
    produced = {value.name: node.op_type for node in model.graph for value in node.outputs}
    assert {ATTENTION, NORM}.isdisjoint(produced[name] for names in quantized_tensors(model)[1:] for name in names)


@pytest.mark.parametrize(("op", "plugins"), [("CustomQKVToContextPluginDynamic", 1), ("Relu", 0)])
def test_whether_a_plugin_is_left(op, plugins):
    model = graph("g (float[n] x) => (float[n] y) { a = Neg (x) y = Relu (a) }")
    model.graph[1].op_type, model.graph[1].name = op, "last"
    assert no_attention_plugin(model) == (f"last is {op}" if plugins else "")
    assert has_attention_plugins(model) == ("" if plugins else "no node is CustomQKVToContextPluginDynamic")
