"""Attention as a node of TensorRT 8's own plugin, whose kernels take half the time of those that it chooses for the
plain products.

`CustomQKVToContextPluginDynamic`, version 2, computes softmax(q kᵀ / √d) v over packed sequences [all tokens, heads · 3
· d, 1, 1]. TensorRT's parser maps the node to its plugin by name. For every other reader, a model-local function of
that name defines what it computes, so that onnxruntime checks the very graph that is built.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping

import numpy as np
import onnx_ir as ir

from vit_convert.core.errors import ExportError
from vit_convert.export.passes.contract import GraphPass, functions_known, scale_in_weights
from vit_convert.export.weights import (
    Weight,
    add_constant,
    add_weight,
    concatenate,
    convolution_kernel,
    replace_weight,
    weight_of,
)

PLUGIN, DOMAIN = "CustomQKVToContextPluginDynamic", "tensorrt.plugin"
CAUSAL = "causal"  # attribute of a node that our kernels replace
HEAD_SIZE = 64  # of the plugin's half-precision kernels
MAX_TOKENS = 512
_KERNEL_HEADS = (64, 72, 80)  # of our own half-precision kernels, over any number of tokens
_CAUSAL_HEAD = 64  # of that for texts, whose tokens attend only to earlier ones
# KiB of shared memory, which holds the keys and values of one head of a causal text; an A100 has 163, an L40 99
_KERNEL_BYTES = 227 * 1024
_MASKED = -1e4  # this or less, added to a score, masks its key


@dataclasses.dataclass(frozen=True)
class Dense:
    """x W + b: x [batch, tokens, K]; the values that hold W [K, N] and b [N]; the Add's output."""

    source: ir.Value
    kernel: ir.Value
    bias: ir.Value
    result: ir.Value


@dataclasses.dataclass(frozen=True)
class _Attention:
    """One self-attention: the Dense layers of queries, keys, values and the projection, heads and tokens; whether a
    token attends only to itself and those before it."""

    query: Dense
    key: Dense
    value: Dense
    out: Dense
    heads: int
    tokens: int
    causal: bool

    @property
    def head_size(self) -> int:
        return _width(self.query) // self.heads


def fits(head_size: int, num_tokens: int) -> bool:
    """Whether the plugin has a kernel for heads of this size and this many tokens."""
    return head_size == HEAD_SIZE and num_tokens <= MAX_TOKENS


def fits_kernels(head_size: int, num_tokens: int, *, causal: bool = False) -> bool:
    """Whether our own half-precision kernels support heads of this size and this many tokens; for causal ones, with
    Hopper's shared memory."""
    if not causal:
        return head_size in _KERNEL_HEADS
    return head_size == _CAUSAL_HEAD and -(-num_tokens // 16) * 16 * 4 * (head_size + 8) <= _KERNEL_BYTES


def attention_to_plugin(model: ir.Model) -> int:
    """Turns self-attention over all tokens into one convolution for q, k and v, the plugin, and one for the projection,
    in place.

    Args:
        model: a ViT after `mlps_to_convolutions` and `fold_scale`; weights described.

    Returns:
        The number of attentions.

    Raises:
        ExportError: there are none, or the plugin has no kernel for the model's heads or tokens.
    """

    def refuse(attention: _Attention) -> str:
        kernels = f"the plugin has kernels for heads of {HEAD_SIZE} over at most {MAX_TOKENS}"
        size, tokens = attention.head_size, attention.tokens
        return "" if fits(size, tokens) else f"lowering plugin: heads of {size} over {tokens} tokens; {kernels}"

    return _replace_all(model, refuse)


def attention_to_plugin_if_it_fits(model: ir.Model) -> int:
    """The same where the plugin has kernels for all of a model's attentions; other models are left as they are."""
    found = [attention for node in model.graph if (attention := _attention(node)) is not None]
    fitting = [a for a in found if not a.causal and fits(a.head_size, a.tokens)]
    return attention_to_plugin(model) if found and len(fitting) == len(found) else 0


def attention_for_kernels(model: ir.Model) -> int:
    """The same for our own half-precision kernels, which `fused.encoder_to_half_kernels` substitutes for the plugin;
    also for causal attention."""

    def refuse(attention: _Attention) -> str:
        size, tokens = attention.head_size, attention.tokens
        if fits_kernels(size, tokens, causal=attention.causal):
            return ""
        sizes = ", ".join(map(str, _KERNEL_HEADS))
        kernels = f"the kernels are for heads of {sizes}, causal ones of {_CAUSAL_HEAD} over what shared memory holds"
        return f"lowering kernels: {'causal ' * attention.causal}heads of {size} over {tokens} tokens; {kernels}"

    return _replace_all(model, refuse, causal=True)


ATTENTION_TO_PLUGIN = GraphPass(attention_to_plugin, requires=(scale_in_weights,), ensures=(functions_known,))
ATTENTION_TO_PLUGIN_IF_IT_FITS = GraphPass(
    attention_to_plugin_if_it_fits, requires=(scale_in_weights,), ensures=(functions_known,)
)
ATTENTION_FOR_KERNELS = GraphPass(attention_for_kernels, requires=(scale_in_weights,), ensures=(functions_known,))


def _replace_all(model: ir.Model, refuse: Callable[[_Attention], str], *, causal: bool = False) -> int:
    attentions = [attention for node in model.graph if (attention := _attention(node)) is not None]
    found = [attention for attention in attentions if causal or not attention.causal]
    for attention in found:
        if why := refuse(attention):
            raise ExportError(why, fix="Leave it out of `lowerings`.")
    if not found:
        raise ExportError(
            "lowering plugin: the model has no attention over all of a fixed number of tokens",
            fix="Leave it out of `lowerings`.",
        )
    sequences = {
        tokens: _sequences(model.graph, tokens) for tokens in dict.fromkeys(attention.tokens for attention in found)
    }
    has_causal = any(attention.causal for attention in found)
    for attention in found:
        marks = {CAUSAL: int(attention.causal)} if has_causal else {}
        _replace(model.graph, attention, sequences[attention.tokens], marks)
    model.opset_imports[DOMAIN] = 1
    function = _function(model.opset_imports[""], causal=has_causal)
    model.functions[function.identifier()] = function
    return len(found)


def _attention(softmax: ir.Node) -> _Attention | None:
    scores = softmax.inputs[0] if softmax.op_type == "Softmax" else None
    first, second = scores.producer() if scores is not None else None, only_user(softmax.outputs[0])
    causal = first is not None and first.op_type == "Add" and _is_causal(first.inputs[1])
    if causal and first is not None and first.inputs[0] is not None:
        first = first.inputs[0].producer()
    if (
        scores is None
        or scores.shape is None
        or first is None
        or second is None
        or {first.op_type, second.op_type} != {"MatMul"}
    ):
        return None
    query, key, value = (dense_above(operand) for operand in (first.inputs[0], first.inputs[1], second.inputs[1]))
    out = dense_below(second.outputs[0])
    if query is None or key is None or value is None or out is None or not query.source is key.source is value.source:
        return None
    _, heads, rows, columns = scores.shape
    # the pooled token attends from one row
    if rows != columns or not isinstance(rows, int) or not isinstance(heads, int):
        return None
    return _Attention(query, key, value, out, heads, rows, causal)


def _is_causal(value: ir.Value | None) -> bool:
    """Whether a value is the mask [1, 1, tokens, tokens] under which a token attends to itself and those before it."""
    constant = value.const_value if value is not None else None
    if constant is None or len(constant.shape) != 4 or tuple(constant.shape)[:2] != (1, 1):
        return False
    mask = constant.numpy()[0, 0]
    later = np.triu(np.ones(mask.shape, bool), 1)
    return bool(mask.shape[0] == mask.shape[1] and np.all(mask[~later] == 0) and np.all(mask[later] <= _MASKED))


def dense_above(value: ir.Value | None) -> Dense | None:
    node = value.producer() if value is not None else None
    while node is not None and node.op_type in ("Transpose", "Reshape") and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    return _dense(node)


def dense_below(value: ir.Value) -> Dense | None:
    node = only_user(value)
    while node is not None and node.op_type in ("Transpose", "Reshape"):
        node = only_user(node.outputs[0])
    return _dense(only_user(node.outputs[0])) if node is not None else None


def _dense(add: ir.Node | None) -> Dense | None:
    product = (
        add.inputs[0].producer() if add is not None and add.op_type == "Add" and add.inputs[0] is not None else None
    )
    if (
        add is None
        or product is None
        or product.op_type != "MatMul"
        or not weight_of(product.inputs[1])
        or not weight_of(add.inputs[1])
    ):
        return None
    source, kernel, bias = product.inputs[0], product.inputs[1], add.inputs[1]
    assert source is not None and kernel is not None and bias is not None
    return Dense(source, kernel, bias, add.outputs[0])


def only_user(value: ir.Value) -> ir.Node | None:
    users = [user for user, _ in value.uses()]
    return users[0] if len(users) == 1 else None


def _width(dense: Dense) -> int:
    return known_weight(dense.kernel).shape[1]


def is_causal(node: ir.Node) -> bool:
    """Whether a node that these passes made stands for a causal attention."""
    return CAUSAL in node.attributes and node.attributes[CAUSAL].as_int() == 1


def _replace(graph: ir.Graph, attention: _Attention, sequences: list[ir.Value], marks: Mapping[str, int]) -> None:
    reshape, after = attention.query.source.producer(), only_user(attention.out.result)
    if reshape is None or reshape.op_type != "Reshape" or after is None or after.op_type != "Reshape":
        raise ExportError(
            "lowering plugin: the tokens are not flat around an attention", fix="Leave it out of `lowerings`."
        )
    width = _width(attention.query)
    qkv = qkv_convolution(graph, reshape.inputs[0], (attention.query, attention.key, attention.value), attention.heads)
    # type 1: half
    settings = {"type_id": 1, "hidden_size": width, "num_heads": attention.heads, "has_mask": 1, "var_seqlen": 1}
    plugin = ir.node(
        PLUGIN,
        [qkv.outputs[0], *sequences],
        {**settings, **marks, "plugin_version": "2", "plugin_namespace": ""},
        domain=DOMAIN,
    )
    turned = replace_weight(graph, attention.out.kernel, convolution_kernel(known_weight(attention.out.kernel)))
    projection = ir.node("Conv", [plugin.outputs[0], turned, attention.out.bias], {"kernel_shape": [1, 1]})
    for node, channels in ((qkv, 3 * width), (plugin, width), (projection, _width(attention.out))):
        node.outputs[0].shape, node.outputs[0].type = ir.Shape([None, channels, 1, 1]), ir.TensorType(ir.DataType.FLOAT)
    graph.insert_before(after, [qkv, plugin, projection])
    ir.convenience.replace_all_uses_with(after.outputs[0], projection.outputs[0])


def qkv_convolution(graph: ir.Graph, rows: ir.Value | None, dense: tuple[Dense, Dense, Dense], heads: int) -> ir.Node:
    """One convolution for queries, keys and values, in the kernels' order.

    A kernel divides the scores by √d, but the query's weights do so already.

    Args:
        graph: gets the weights.
        rows: [rows, width, 1, 1].
        dense: of queries, keys and values.
        heads: of the attention.

    Returns:
        The node, whose output is [rows, heads · 3 · d, 1, 1]; it is not in the graph yet.
    """
    factors = (math.sqrt(_width(dense[0]) // heads), 1.0, 1.0)
    kernel = _interleaved([_scaled(known_weight(each.kernel), by) for each, by in zip(dense, factors)], heads)
    bias = _interleaved([_scaled(known_weight(each.bias), by) for each, by in zip(dense, factors)], heads)
    scope = str(dense[0].kernel.name).rsplit("query/", 1)[0] + "qkv/"
    weights = add_weight(graph, f"{scope}kernel", convolution_kernel(kernel)), add_weight(graph, f"{scope}bias", bias)
    return ir.node("Conv", [rows, *weights], {"kernel_shape": [1, 1]})


def known_weight(value: ir.Value) -> Weight:
    weight = weight_of(value)
    assert weight is not None
    return weight


def _scaled(weight: Weight, factor: float) -> Weight:
    return weight if factor == 1.0 else weight.then(weight.shape, lambda array: np.float32(factor) * array)


def _interleaved(parts: list[Weight], heads: int) -> Weight:
    """Columns of queries, keys and values, each [..., heads · d], as the plugin wants them: [..., heads · 3 · d]."""
    *lead, columns = parts[0].shape
    split, merged = (*lead, heads, 1, columns // heads), (*lead, len(parts) * columns)
    return concatenate([part.then(split, lambda array: array.reshape(split)) for part in parts], -2).then(
        merged, lambda array: array.reshape(merged)
    )


def _sequences(graph: ir.Graph, tokens: int) -> list[ir.Value]:
    """The plugin's other inputs: a mask that it ignores, the end of each image's tokens, and a vector with the length
    of an image's tokens."""
    zero, one = (add_constant(graph, name, np.array(i)) for i, name in enumerate(("sequence_start", "sequence_one")))
    length = add_constant(graph, "sequence_length", np.array(tokens))
    shape = ir.node("Shape", [graph.inputs[0]])
    batch = ir.node("Gather", [shape.outputs[0], zero], {"axis": 0})
    count = ir.node("Add", [batch.outputs[0], one])
    limit = ir.node("Mul", [count.outputs[0], length])
    as_int32 = [ir.node("Cast", [value], {"to": int(ir.DataType.INT32)}) for value in (zero, limit.outputs[0], length)]
    ends = ir.node("Range", [cast.outputs[0] for cast in as_int32])
    graph.insert_before(graph[0], [shape, batch, count, limit, *as_int32, ends])
    mask = add_constant(graph, "sequence_mask", np.zeros(1, np.int32))
    return [mask, ends.outputs[0], add_constant(graph, "sequence_longest", np.zeros(tokens, np.int32))]


def _function(opset: int, *, causal: bool) -> ir.Function:
    """What the plugin computes, in ONNX's own operators; in a model with causal attention, what our kernels do in its
    place, and each node says whether it is causal."""
    qkv, mask, ends, longest = (ir.Value(name=name) for name in ("qkv", "mask", "ends", "longest"))
    nodes: list[ir.Node] = []

    def add(op_type: str, *inputs: ir.Value, **attributes) -> ir.Value:
        nodes.append(ir.node(op_type, list(inputs), attributes))
        return nodes[-1].outputs[0]

    def numbers(*values: int) -> ir.Value:
        return add("Constant", value_ints=list(values))

    def given(name: str) -> ir.Value:  # an attribute as a tensor of one element
        node = ir.Node("", "Constant", [], [ir.RefAttr("value_int", name, ir.AttributeType.INT)], num_outputs=1)
        nodes.append(node)
        return add("Reshape", node.outputs[0], numbers(1))

    split = add("Concat", numbers(-1), add("Shape", longest), given("num_heads"), numbers(3, HEAD_SIZE), axis=0)
    parts = add("Transpose", add("Reshape", qkv, split), perm=[3, 0, 2, 1, 4])  # [3, images, heads, tokens, d]
    query, key, value = (add("Gather", parts, add("Constant", value_int=i), axis=0) for i in range(3))
    scores = add("MatMul", query, add("Transpose", key, perm=[0, 1, 3, 2]))
    scores = add("Mul", scores, add("Constant", value_float=HEAD_SIZE**-0.5))
    if causal:  # -60 000 for keys later than the query
        tokens = add("Shape", longest)
        ones = add("Expand", add("Constant", value_float=-60_000.0), add("Concat", tokens, tokens, axis=0))
        later = add("Trilu", ones, add("Constant", value_int=1), upper=1)
        scores = add("Add", scores, add("Mul", later, add("Cast", given(CAUSAL), to=int(ir.DataType.FLOAT))))
    attended = add("Transpose", add("MatMul", add("Softmax", scores, axis=-1), value), perm=[0, 2, 1, 3])
    context = add("Reshape", attended, add("Concat", numbers(-1), given("hidden_size"), numbers(1, 1), axis=0))
    graph = ir.Graph([qkv, mask, ends, longest], [context], nodes=nodes, opset_imports={"": opset}, name=PLUGIN)
    names = ("type_id", "hidden_size", "num_heads", "has_mask", "var_seqlen", *((CAUSAL,) if causal else ()))
    attributes = [ir.Attr(name, ir.AttributeType.INT, None) for name in names]
    attributes += [ir.Attr(name, ir.AttributeType.STRING, None) for name in ("plugin_version", "plugin_namespace")]
    return ir.Function(DOMAIN, PLUGIN, graph=graph, attributes=attributes)
