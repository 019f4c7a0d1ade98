"""Finds nodes that a TensorRT will not build, and what to do about each."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping

from vit_convert.engine.inspection.onnx_wire import Graph, Node
from vit_convert.engine.inspection.support import OUR_DOMAIN, PLUGIN_DOMAIN, SUPPORT, Support

REFUSED, UNKNOWN, CHANGED = "will not build", "not known", "reads otherwise"
_QDQ = ("QuantizeLinear", "DequantizeLinear")


@dataclasses.dataclass(frozen=True)
class Finding:
    """A finding about one node or value.

    Attributes:
        what: REFUSED, UNKNOWN (only the parser itself can tell) or CHANGED (it builds, but computes something else).
        where: the node, by its name, or the value.
        why: the reason, with both values.
        fix: what to do; "" for nothing.
        op: the node's operator; "" if it is not about a node.
    """

    what: str
    where: str
    why: str
    fix: str = ""
    op: str = ""


def findings(graph: Graph, target: str) -> list[Finding]:
    """Everything in a graph that a TensorRT generation does not read as it is.

    Args:
        graph: of the ONNX file.
        target: "trt8", "trt10", "trt11" or "rtx".

    Example:
        >>> from vit_convert.engine.inspection.onnx_wire import read_graph
        >>> [found.why for found in findings(read_graph("out/tiny/model.onnx"), "rtx")]
        []
    """
    support = SUPPORT[target]
    found = [*_of_opset(graph, support), *_of_ends(graph, support)]
    for node in graph.nodes:
        check = _CHECKS.get(node.op, _nothing)
        parts = (_of_operator(graph, node, support), _of_types(graph, node, support), check(graph, node, support))
        found += [dataclasses.replace(finding, op=node.op) for part in parts for finding in part]
    return found


def _where(node: Node) -> str:
    return node.label


def _of_opset(graph: Graph, support: Support) -> Iterator[Finding]:
    version, (oldest, newest) = graph.opsets.get("", 0), support.opsets
    if not oldest <= version <= newest:
        fix = f"Convert with target={support.name}, or export with an opset from {oldest} to {newest}."
        what = REFUSED if support.refuses_opsets or not version else UNKNOWN
        yield Finding(what, "graph", f"opset {version}, it reads {oldest} to {newest}", fix)
    elif support.opset_note and version > 20:
        fix = "Export with opset 20, or use a later release."
        yield Finding(UNKNOWN, "graph", f"opset {version}: {support.opset_note}", fix)


def _of_ends(graph: Graph, support: Support) -> Iterator[Finding]:
    for word, names in (("input", graph.inputs), ("output", graph.outputs)):
        for name in names:
            value = graph.value(name)
            if support.casts_int64 and value.dtype == "int64":
                fix = f"Make it int32 in the graph: it is an {word} of the engine."
                yield Finding(REFUSED, name, f"{word} of int64, which it does not have", fix)
            elif word == "input" and value.dtype and value.dtype not in support.types:
                yield _of_type(name, f"an input of {value.dtype}", value.dtype, support)
            if value.shape is None:
                fix = "Run onnx.shape_inference, or export again."
                yield Finding(UNKNOWN, name, f"{word} without a shape in the file", fix)


def _of_operator(graph: Graph, node: Node, support: Support) -> Iterator[Finding]:
    where = _where(node)
    if (node.domain, node.op) in graph.functions and node.domain not in (PLUGIN_DOMAIN, OUR_DOMAIN):
        return  # a model-local function, which the parser expands
    if node.domain in (PLUGIN_DOMAIN, OUR_DOMAIN):
        if not support.plugins:
            yield Finding(
                REFUSED, where, "a plugin, for which it has no library", "Build from model.onnx, without one."
            )
        elif not support.has_our_plugins:
            fix = f"Convert with target={support.name}: its graphs need no plugin."
            yield Finding(UNKNOWN, where, "a plugin that is made for TensorRT 8.6", fix)
        return
    if node.domain:
        fix = "Register a plugin of this name, or export the operator as ONNX's own."
        yield Finding(UNKNOWN, where, f"domain {node.domain!r}: needs a plugin", fix)
        return
    reads = support.reads(node.op)
    if reads is False:
        fix = support.not_read.get(node.op) or "Write it with operators that it reads, or leave it outside the engine."
        yield Finding(REFUSED, where, f"{support.name} has no {node.op}", fix)
    elif reads is None:
        yield Finding(UNKNOWN, where, f"{node.op} is in no list of ours", "Ask its parser: build with it.")


def _of_types(graph: Graph, node: Node, support: Support) -> Iterator[Finding]:
    for name in dict.fromkeys((*node.inputs, *node.outputs)):
        dtype = graph.value(name).dtype
        if not dtype or dtype in support.types or (name not in node.outputs and name not in graph.weights):
            continue  # another node's output is reported there
        yield _of_type(_where(node), f"{name} is {dtype}", dtype, support)
    for name in node.outputs:
        if graph.value(name).dtype == "float64":
            yield Finding(CHANGED, _where(node), f"{name} is float64 and becomes float32", "Cast it in the graph.")


def _of_type(where: str, said: str, dtype: str, support: Support) -> Finding:
    fix = {"bfloat16": "Use fp16, or TensorRT 10 or later."}.get(dtype, "Use another type.")
    if dtype.startswith(("float8", "float4", "int4")):
        fix = "Use int8 or fp16, or TensorRT 10 or later."
    return Finding(REFUSED, where, f"{said}, which {support.name} does not have", fix)


def _nothing(graph: Graph, node: Node, support: Support) -> Iterator[Finding]:
    return iter(())


def _of_qdq(graph: Graph, node: Node, support: Support) -> Iterator[Finding]:
    where, scale = _where(node), graph.value(node.input(1)).dtype
    rounded = graph.value(node.output(0) if node.op == "QuantizeLinear" else node.input(0)).dtype
    if rounded and rounded not in (*support.quantized, "uint8"):
        fix = f"Quantize to {support.quantized[0]}."
        yield Finding(REFUSED, where, f"{rounded}: it quantizes to {', '.join(support.quantized)}", fix)
    if rounded == "uint8":
        what = REFUSED if support.strict_qdq else CHANGED
        yield Finding(
            what, where, "uint8: it quantizes to signed types, symmetrically", "Quantize to int8 with zero point 0."
        )
    if support.strict_qdq and len(node.inputs) < 3:
        yield Finding(REFUSED, where, "no zero point, which 8.6 wants", "Add one: int8, 0.")
    if support.strict_qdq and scale not in ("", "float32"):
        yield Finding(REFUSED, where, f"scale of {scale}, 8.6 wants float32", "Convert with target=trt8.")
    if support.strict_qdq and node.op == "DequantizeLinear" and node.input(0) in graph.weights:
        fix = "Store float32 weights with a QuantizeLinear before: convert with target=trt8."
        yield Finding(REFUSED, where, "weights stored in int8, which 8.6 does not read", fix)
    zero = graph.constants.get(node.input(2))
    if zero and any(zero) and rounded != "uint8":
        yield Finding(REFUSED, where, "a zero point that is not 0", "Quantize symmetrically.")


def _of_layer_norm(graph: Graph, node: Node, support: Support) -> Iterator[Finding]:
    types = {graph.value(name).dtype for name in node.inputs if name} - {""}
    if support.one_type_norms and len(types) > 1:
        fix = "Store scale and bias in the type of what is normalised."
        yield Finding(REFUSED, _where(node), f"inputs of {' and '.join(sorted(types))}: it wants one type", fix)
    if len([name for name in node.outputs if name]) > 1:
        fix = "Compute mean and deviation apart."
        yield Finding(REFUSED, _where(node), "more than its first output is used", fix)


def _of_attention(graph: Graph, node: Node, support: Support) -> Iterator[Finding]:
    if graph.value(node.input(0)).dtype == "float32" and not support.float32_attention:
        fix = "Export attention as MatMul, Softmax and MatMul."
        yield Finding(REFUSED, _where(node), "Attention in float32, which TensorRT-RTX 1.7 does not build", fix)
    if support.attention_since:
        fix = f"Use {support.attention_since} or later, or export attention as MatMul, Softmax and MatMul."
        yield Finding(UNKNOWN, _where(node), f"Attention is read since {support.attention_since}", fix)


def _of_convolution(graph: Graph, node: Node, support: Support) -> Iterator[Finding]:
    if graph.value(node.input(0)).dtype == "bfloat16" and graph.opsets.get("", 0) < 22:
        fix = "Keep this convolution in fp32 (config.keep_fp32)."
        yield Finding(UNKNOWN, _where(node), "Conv in bfloat16 is defined from opset 22 on", fix)


def _of_reduction(graph: Graph, node: Node, support: Support) -> Iterator[Finding]:
    if node.input(1) and node.input(1) not in graph.weights | _constants(graph):
        yield Finding(REFUSED, _where(node), "axes that are computed; they have to be constants", "Fold them.")


def _constants(graph: Graph) -> frozenset[str]:
    return frozenset(name for node in graph.nodes if node.op == "Constant" for name in node.outputs)


def _of_einsum(graph: Graph, node: Node, support: Support) -> Iterator[Finding]:
    equation = str(node.attributes.get("equation", ""))
    terms = equation.split("->")[0].replace(" ", "").split(",")
    if "..." in equation or any(len(set(term)) < len(term) for term in terms):
        yield Finding(
            REFUSED, _where(node), f"{equation}: no ellipsis and no diagonal is read", "Write it with MatMul."
        )


_MODES: Mapping[str, tuple[str, Callable[[object], bool]]] = {  # by operator: an attribute, and which values are read
    "BatchNormalization": ("training_mode", lambda mode: not mode),
    "LpPool": ("p", lambda p: p in (1, 2, None)),
    "Resize": ("coordinate_transformation_mode", lambda mode: mode != "tf_crop_and_resize"),
    "ScatterElements": ("reduction", lambda reduction: reduction not in ("mul", "max", "min")),
    "ScatterND": ("reduction", lambda reduction: reduction in ("none", None)),
    "TensorScatter": ("mode", lambda mode: mode in ("linear", None)),
}


def _of_mode(graph: Graph, node: Node, support: Support) -> Iterator[Finding]:
    name, is_read = _MODES[node.op]
    value = node.attributes.get(name)
    if is_read(value):
        return
    fix = "Write it with operators that it reads, or leave it outside the engine."
    if support.asked:
        yield Finding(REFUSED, _where(node), f"{name}={value}, which it does not read", fix)
    else:
        yield Finding(UNKNOWN, _where(node), f"{name}={value}: TensorRT-RTX 1.7 does not read it", fix)


def _of_body(graph: Graph, node: Node, support: Support) -> Iterator[Finding]:
    yield Finding(UNKNOWN, _where(node), "the nodes of its body were not looked at", "Ask its parser: build with it.")


def _of_arithmetic(graph: Graph, node: Node, support: Support) -> Iterator[Finding]:
    if graph.value(node.input(0)).dtype == "uint8":
        what = REFUSED if support.asked else UNKNOWN
        yield Finding(what, _where(node), "it has no arithmetic of uint8", "Cast to float32 or int32 before it.")


_CHECKS: Mapping[str, Callable[[Graph, Node, Support], Iterator[Finding]]] = {
    **dict.fromkeys(_QDQ, _of_qdq),
    "LayerNormalization": _of_layer_norm,
    "Attention": _of_attention,
    "Conv": _of_convolution,
    "Einsum": _of_einsum,
    **dict.fromkeys(_MODES, _of_mode),
    **dict.fromkeys(("If", "Loop", "Scan"), _of_body),
    **dict.fromkeys(("Add", "Sub", "Mul", "Div", "Greater", "Less", "MaxPool"), _of_arithmetic),
    **dict.fromkeys(("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin"), _of_reduction),
}
