"""GroupNorms of a ResNet, with the residual addition and the ReLU behind them, as nodes of our own kernels, in FP16.

TensorRT 8.6 normalises planes, while its FP16 convolutions read and write interleaved channels, so that a copy stands
before and behind every one of them. The kernels read and write what the convolutions do. As for TensorRT's attention
plugin, every other reader of the file finds what a node computes in a model-local function.
"""

import dataclasses

import numpy as np
import onnx_ir as ir

from vit_convert.core.errors import ExportError
from vit_convert.export.passes.attention_plugin import DOMAIN, only_user
from vit_convert.export.passes.contract import GraphPass, functions_known, names_unique
from vit_convert.export.passes.fused_encoder import Body, plugin_settings, take_over
from vit_convert.export.weights import weight_of

# relu(GroupNorm(x)); the same of its sum with a residual; of its sum with a residual that has a GroupNorm of its own
GROUP_NORM, ADD_GROUP_NORM, TWO_GROUP_NORMS = "VitGroupNorm", "VitAddGroupNorm", "VitTwoGroupNorms"
GROUPS = 32  # of the kernels
MAX_CHANNELS = 2048


@dataclasses.dataclass(frozen=True)
class _GroupNorm:
    """A GroupNorm: what it reads [batch, channels, height, width], scale and bias of each channel [1, channels, 1, 1],
    ε, and its result."""

    source: ir.Value
    scale: ir.Value
    bias: ir.Value
    epsilon: float
    result: ir.Value


def fits(channels: int) -> bool:
    """Whether the kernels have a layout for so many channels in 32 groups: 1, 2, 4 or a multiple of 8 each.

    Example:
        >>> [fits(channels) for channels in (64, 2048, 96, 4096)]
        [True, True, False, False]
    """
    each, rest = divmod(channels, GROUPS)
    return rest == 0 and 0 < channels <= MAX_CHANNELS and (each in (1, 2, 4) or each % 8 == 0)


def group_norms_to_kernels(model: ir.Model) -> int:
    """Turns GroupNorm → ReLU, and GroupNorm → residual addition → ReLU, into nodes of our kernels, in place.

    Args:
        model: a hybrid, its nodes named; weights described.

    Returns:
        How many such nodes there are.

    Raises:
        ExportError: there are none.
    """
    graph, opset = model.graph, model.opset_imports[""]
    norms = [norm for node in list(graph) if (norm := _group_norm(node)) is not None]
    by_result = {norm.result: norm for norm in norms}
    made: set[str] = set()
    count = 0
    for norm in norms:
        if norm.result in by_result and (found := _replace(graph, norm, by_result)):
            made.add(found)
            count += 1
    if not count:
        raise ExportError(
            f"lowering groupnorm: the model has no GroupNorm over {GROUPS} groups of 1, 2, 4 or a multiple of 8 "
            "channels with a ReLU behind it",
            fix="Leave it out of `lowerings`.",
        )
    model.opset_imports[DOMAIN] = 1
    for name in sorted(made):
        function = _function(name, opset)
        model.functions[function.identifier()] = function
    return count


GROUP_NORMS_TO_KERNELS = GraphPass(group_norms_to_kernels, requires=(names_unique,), ensures=(functions_known,))


def _group_norm(node: ir.Node) -> _GroupNorm | None:
    """Reshape → LayerNormalization of each group → Reshape → Mul → Add, where nothing else reads what is in between."""
    if node.op_type != "LayerNormalization" or not _is_plain(node):
        return None
    before = node.inputs[0].producer() if node.inputs[0] is not None else None
    after = only_user(node.outputs[0])
    if before is None or after is None or {before.op_type, after.op_type} != {"Reshape"}:
        return None
    source, groups = before.inputs[0], before.outputs[0]
    if source is None or only_user(groups) is not node or not _splits(source, groups):
        return None
    if after.outputs[0].shape is None or tuple(after.outputs[0].shape)[1:] != _channels_and_pixels(source):
        return None
    scaled = _with_parameter(only_user(after.outputs[0]), "Mul", after.outputs[0])
    shifted = _with_parameter(only_user(scaled[0]), "Add", scaled[0]) if scaled is not None else None
    if scaled is None or shifted is None:
        return None
    return _GroupNorm(source, scaled[1], shifted[1], node.attributes["epsilon"].as_float(), shifted[0])


def _is_plain(norm: ir.Node) -> bool:
    """Whether a LayerNormalization is over the last axis, without scale and bias of its own."""
    constants = [value.const_value if value is not None else None for value in norm.inputs[1:]]
    axis = norm.attributes.get_int("axis", -1)
    if axis != -1 or "epsilon" not in norm.attributes:
        return False
    return all(
        constant is not None and bool(np.all(constant.numpy() == neutral))
        for constant, neutral in zip(constants, (1, 0))
    )


def _channels_and_pixels(value: ir.Value) -> tuple[int, ...]:
    """(channels, height, width); () of a value that has none, or none that is fixed."""
    shape = tuple(value.shape or ())[1:]
    return tuple(dim for dim in shape if isinstance(dim, int)) if len(shape) == 3 else ()


def _splits(source: ir.Value, groups: ir.Value) -> bool:
    """Whether [batch, channels, height, width] becomes [batch, 32, the rest], of channels that there is a kernel
    for."""
    sizes = _channels_and_pixels(source)
    if len(sizes) != 3 or not fits(sizes[0]) or groups.shape is None:
        return False
    return tuple(groups.shape)[1:] == (GROUPS, sizes[0] * sizes[1] * sizes[2] // GROUPS)


def _with_parameter(node: ir.Node | None, op_type: str, value: ir.Value) -> tuple[ir.Value, ir.Value] | None:
    """The result of an operator over a value and a weight of its channels, and that weight."""
    if node is None or node.op_type != op_type or value.shape is None:
        return None
    other = next((each for each in node.inputs if each is not value), None)
    weight = weight_of(other)
    if other is None or weight is None or weight.shape != (1, tuple(value.shape)[1], 1, 1):
        return None
    return node.outputs[0], other


def _replace(graph: ir.Graph, norm: _GroupNorm, by_result: dict[ir.Value, _GroupNorm]) -> str:
    """Puts one of our nodes in the place of the ReLU behind a GroupNorm; returns its operator, or "" where there is no
    such ReLU. GroupNorms that have gone into a node are taken out of `by_result`."""
    user = only_user(norm.result)
    inputs, name = [norm.source, norm.scale, norm.bias], GROUP_NORM
    if user is not None and user.op_type == "Add":
        residual = next((value for value in user.inputs if value is not norm.result), None)
        if residual is None or residual.shape != norm.result.shape:
            return ""
        other = by_result.get(residual)
        joint = other is not None and other.epsilon == norm.epsilon and only_user(residual) is user
        inputs, name = [norm.source, residual, norm.scale, norm.bias], ADD_GROUP_NORM
        if other is not None and joint:
            inputs, name = [norm.source, other.source, *inputs[2:], other.scale, other.bias], TWO_GROUP_NORMS
        user = only_user(user.outputs[0])
        if user is not None and user.op_type == "Relu" and joint:
            del by_result[residual]
    if user is None or user.op_type != "Relu":
        return ""
    del by_result[norm.result]
    settings = {"groups": GROUPS, "epsilon": norm.epsilon, **plugin_settings(quantized=False)}
    node = ir.node(name, inputs, settings, domain=DOMAIN)
    take_over(graph, user, node.outputs[0], user.outputs[0])
    return name


def _function(name: str, opset: int) -> ir.Function:
    """relu(GroupNorm(x) + what is added), in ONNX's own operators."""
    body, words = Body(), ("x", "residual", "scale", "bias", "residual_scale", "residual_bias")
    x, residual, scale, bias, other_scale, other_bias = (ir.Value(name=word) for word in words)
    total, inputs = _normalised(body, x, scale, bias), [x, scale, bias]
    if name != GROUP_NORM:
        two = name == TWO_GROUP_NORMS
        inputs = [x, residual, scale, bias, *([other_scale, other_bias] if two else [])]
        added = _normalised(body, residual, other_scale, other_bias) if two else residual
        total = body.add("Add", total, added)
    kinds = {"groups": ir.AttributeType.INT, "epsilon": ir.AttributeType.FLOAT}
    return body.function(name, inputs, [body.add("Relu", total)], opset, **kinds)


def _normalised(body: Body, x: ir.Value, scale: ir.Value, bias: ir.Value) -> ir.Value:
    """(x − mean) / √(variance + ε) · scale + bias of each group's values."""
    shape = body.add("Concat", body.numbers(0), body.given("groups"), body.numbers(-1), axis=0)
    groups = body.add("Reshape", x, shape)
    centred = body.add("Sub", groups, body.add("ReduceMean", groups, axes=[-1]))
    variance = body.add("ReduceMean", body.add("Mul", centred, centred), axes=[-1])
    epsilon = ir.Node("", "Constant", [], [ir.RefAttr("value_float", "epsilon", ir.AttributeType.FLOAT)], num_outputs=1)
    body.nodes.append(epsilon)
    normal = body.add("Div", centred, body.add("Sqrt", body.add("Add", variance, epsilon.outputs[0])))
    return body.add("Add", body.add("Mul", body.add("Reshape", normal, body.add("Shape", x)), scale), bias)
