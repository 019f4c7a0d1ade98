"""A Swin's windowed attention as nodes for our own kernel, and its LayerNorms as in `fused_encoder`, in FP16.

TensorRT 8.6 does not fuse attention that adds a bias to its scores: it writes the scores to memory, and transposes
queries, keys and values first. As with its attention plugin, a model-local function defines what the node computes for
every other reader of the file.
"""

import dataclasses
import math

import numpy as np
import onnx_ir as ir

from vit_convert.core.errors import ExportError
from vit_convert.export.passes.attention_plugin import (
    DOMAIN,
    Dense,
    dense_above,
    dense_below,
    known_weight,
    only_user,
    qkv_convolution,
)
from vit_convert.export.passes.contract import GraphPass, functions_known, names_unique
from vit_convert.export.passes.fused_encoder import Body, norms_to_half_kernels, plugin_settings
from vit_convert.export.weights import Weight, add_constant, convolution_kernel, replace_weight, weight_of

WINDOWS = "VitWindowAttention"
HEAD_SIZE = 32  # of heads, in the kernel
MAX_TOKENS = 144  # a window of 12 x 12


@dataclasses.dataclass(frozen=True)
class _Windows:
    """Windowed attention: the Dense layers, the bias [1, windows · heads, tokens, tokens], heads, and the number of
    windows with a bias of their own."""

    query: Dense
    key: Dense
    value: Dense
    out: Dense
    bias: ir.Value
    heads: int
    windows: int
    tokens: int


def windows_to_kernels(model: ir.Model) -> int:
    """Turns windowed attention into one convolution for q, k and v, our kernel, and one convolution for the projection,
    in place.

    Args:
        model: a Swin after `mlps_to_convolutions` and `fold_scale`; weights described.

    Returns:
        The number of attentions.

    Raises:
        ExportError: there are none, or the kernel does not support their heads or windows.
    """
    found = [windows for node in list(model.graph) if (windows := _windows(node)) is not None]
    if not found:
        raise ExportError(
            "lowering windows: the model has no attention with a bias within windows",
            fix="Leave it out of `lowerings`.",
        )
    for windows in found:
        size = known_weight(windows.query.kernel).shape[1] // windows.heads
        if size != HEAD_SIZE or windows.tokens > MAX_TOKENS:
            raise ExportError(
                f"lowering windows: heads of {size} over {windows.tokens} tokens; the kernel is for heads of "
                f"{HEAD_SIZE} over at most {MAX_TOKENS}",
                fix="Leave it out of `lowerings`.",
            )
        _replace(model.graph, windows)
    model.opset_imports[DOMAIN] = 1
    function = _function(model.opset_imports[""])
    model.functions[function.identifier()] = function
    return len(found)


WINDOWS_TO_KERNELS = GraphPass(windows_to_kernels, ensures=(functions_known,))
NORMS_TO_KERNELS = GraphPass(norms_to_half_kernels, requires=(names_unique,), ensures=(functions_known,))


def _windows(softmax: ir.Node) -> _Windows | None:
    add = softmax.inputs[0].producer() if softmax.op_type == "Softmax" and softmax.inputs[0] is not None else None
    bias = add.inputs[1] if add is not None and add.op_type == "Add" else None
    weight = weight_of(bias)
    product = add.inputs[0].producer() if add is not None and add.inputs[0] is not None else None
    second = only_user(softmax.outputs[0])
    if bias is None or weight is None or product is None or second is None:
        return None
    if {product.op_type, second.op_type} != {"MatMul"} or len(weight.shape) != 4:
        return None
    query, key, value = (dense_above(operand) for operand in (product.inputs[0], product.inputs[1], second.inputs[1]))
    out, operand = dense_below(second.outputs[0]), product.inputs[0]
    if query is None or key is None or value is None or out is None or operand is None or operand.shape is None:
        return None
    one, count, rows, columns = weight.shape
    size = operand.shape[-1]
    if one != 1 or rows != columns or not isinstance(size, int) or not query.source is key.source is value.source:
        return None
    heads = known_weight(query.kernel).shape[1] // size
    return _Windows(query, key, value, out, bias, heads, count // heads, rows) if count % heads == 0 else None


def _replace(graph: ir.Graph, windows: _Windows) -> None:
    reshape, after = windows.query.source.producer(), only_user(windows.out.result)
    add = after if after is not None and after.op_type == "Add" else None
    after = only_user(add.outputs[0]) if add is not None else after  # of a layer in between, in [batch, tokens, …]
    if reshape is None or reshape.op_type != "Reshape" or after is None or not _flattens(after):
        raise ExportError(
            "lowering windows: the tokens are not flat around an attention", fix="Leave it out of `lowerings`."
        )
    width = known_weight(windows.query.kernel).shape[1]
    qkv = qkv_convolution(graph, reshape.inputs[0], (windows.query, windows.key, windows.value), windows.heads)
    # The kernel divides what it adds by √d too.
    bias = replace_weight(graph, windows.bias, _padded(known_weight(windows.bias), math.sqrt(HEAD_SIZE)))
    settings = {"heads": windows.heads, "tokens": windows.tokens, "head": HEAD_SIZE, "windows": windows.windows}
    node = ir.node(WINDOWS, [qkv.outputs[0], bias], {**settings, **plugin_settings(quantized=False)}, domain=DOMAIN)
    turned = replace_weight(graph, windows.out.kernel, convolution_kernel(known_weight(windows.out.kernel)))
    projection = ir.node("Conv", [node.outputs[0], turned, windows.out.bias], {"kernel_shape": [1, 1]})
    made = [(qkv, 3 * width), (node, width), (projection, width)]
    if add is not None:  # also flat, so that our LayerNorm can read it
        residual = add.inputs[1] if add.inputs[0] is windows.out.result else add.inputs[0]
        flat = ir.node("Reshape", [residual, add_constant(graph, "flat", [-1, width, 1, 1])])
        made += [(flat, width), (ir.node("Add", [flat.outputs[0], projection.outputs[0]]), width)]
    for part, channels in made:
        part.outputs[0].shape, part.outputs[0].type = ir.Shape([None, channels, 1, 1]), ir.TensorType(ir.DataType.FLOAT)
    graph.insert_before(after, [part for part, _ in made])
    ir.convenience.replace_all_uses_with(after.outputs[0], made[-1][0].outputs[0])


def _flattens(node: ir.Node) -> bool:
    shape = node.outputs[0].shape
    return node.op_type == "Reshape" and shape is not None and len(shape) == 4 and tuple(shape)[2:] == (1, 1)


def _padded(bias: Weight, factor: float) -> Weight:
    """[1, windows · heads, tokens, tokens] times a factor, without the first axis and padded to an even number of
    columns, because the kernel reads two at a time."""
    _, count, rows, columns = bias.shape
    odd = columns % 2

    def pad(array: np.ndarray) -> np.ndarray:
        return np.pad(np.float32(factor) * array[0], ((0, 0), (0, 0), (0, odd)))

    padded = bias.then((count, rows, columns + odd), pad)
    return dataclasses.replace(padded, num_read=math.prod(bias.shape))


def _function(opset: int) -> ir.Function:
    """softmax((q kᵀ + bias) / √d) v of each window and head, in ONNX's own operators."""
    qkv, bias, body = ir.Value(name="qkv"), ir.Value(name="bias"), Body()
    heads, size, tokens, windows = (body.given(word) for word in ("heads", "head", "tokens", "windows"))
    split = body.add("Concat", body.numbers(-1), windows, tokens, heads, body.numbers(3), size, axis=0)
    # [3, images, windows, heads, tokens, d]
    parts = body.add("Transpose", body.add("Reshape", qkv, split), perm=[4, 0, 1, 3, 2, 5])
    query, key, value = (body.add("Gather", parts, body.add("Constant", value_int=i), axis=0) for i in range(3))
    scores = body.add("MatMul", query, body.add("Transpose", key, perm=[0, 1, 2, 4, 3]))
    kept = body.add("Slice", bias, body.numbers(0), tokens, body.numbers(2))
    kept = body.add("Reshape", kept, body.add("Concat", body.numbers(1), windows, heads, tokens, tokens, axis=0))
    scores = body.add("Add", scores, kept)
    scores = body.add("Div", scores, body.add("Sqrt", body.add("Cast", size, to=int(ir.DataType.FLOAT))))
    attended = body.add("MatMul", body.add("Softmax", scores, axis=-1), value)
    attended = body.add("Transpose", attended, perm=[0, 1, 3, 2, 4])
    width = body.add("Mul", heads, size)
    context = body.add("Reshape", attended, body.add("Concat", body.numbers(-1), width, body.numbers(1, 1), axis=0))
    kinds = dict.fromkeys(("heads", "tokens", "head", "windows"), ir.AttributeType.INT)
    return body.function(WINDOWS, [qkv, bias], [context], opset, **kinds)
