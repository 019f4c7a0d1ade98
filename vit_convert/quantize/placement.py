"""Where Q/DQ pairs go: the linears between the first and the last, and the attention products on request.

A linear is recognised by what it is in the graph (a product or a convolution of an activation with a constant), not by
its layer's name. Quantizing the residual stream, the LayerNorm inputs, the patch embedding, the pooling or the head
costs ViTs their accuracy; those keep their type. Biases stay in floating point, and nothing is quantized between fc1
and GELU, so that TensorRT can fuse GEMM, bias and GELU.
"""

import dataclasses
from collections.abc import Collection, Iterable, Sequence
from typing import TypedDict

import onnx_ir as ir

from vit_convert.core.layer_names import check_patterns, matches
from vit_convert.core.onnx_file import BLOCKS_ALONE
from vit_convert.quantize.graph import Layer, linear_layers, linear_weight, names_by_node, node_blocks

# Limits of TensorRT's fused INT8 attention; beyond them, three separate kernels are slower than FP16's single one.
_HEAD_DIMS = (16, 32, 64)
_MAX_TOKENS = 512


@dataclasses.dataclass(frozen=True)
class Site:
    """A tensor that is quantized where a certain node reads it.

    Attributes:
        block: "block_03", or the scope that contains the layer, see `graph.Layer`.
        kind: qkv, query, key, value, out, fc1, fc2 or the layer's own name for linears; scaled_q, k, v, softmax,
            attended for attention.
        tensor: name of the activation that gets the pair.
        node: name of the first output of the node that reads it.
        weight: name of the weight quantized with it; None for attention.
        amax: largest |x| if known without calibration (softmax: 1).
    """

    block: str
    kind: str
    tensor: str
    node: str
    weight: str | None = None
    amax: float | None = None

    @property
    def name(self) -> str:
        """ "block_03/fc2"."""
        return f"{self.block}/{self.kind}"


class Patterns(TypedDict, total=False):
    """The arguments of `place` that say what must not be quantized, or all that may be."""

    keep_fp32: Sequence[str]
    keep_fp16: Sequence[str]
    quantize_only: Sequence[str]
    leave_out: Collection[str]


@dataclasses.dataclass(frozen=True)
class Placement:
    """All sites of a graph.

    Attributes:
        sites: in graph order.
        declined: for each block whose attention should have been quantized but is not, why.
    """

    sites: tuple[Site, ...]
    declined: dict[str, str]

    def tensors(self) -> list[str]:
        """Names of the activations whose ranges calibration must find."""
        return list(dict.fromkeys(s.tensor for s in self.sites if s.amax is None))

    def weights(self) -> list[str]:
        """Names of the weights that are quantized."""
        return [s.weight for s in self.sites if s.weight]


def place(
    model: ir.Model,
    *,
    attention: bool = False,
    keep_fp32: Sequence[str] = (),
    keep_fp16: Sequence[str] = (),
    quantize_only: Sequence[str] = (),
    leave_out: Collection[str] = (),
) -> Placement:
    """Chooses what is quantized.

    Args:
        model: the fp32 graph, linears as MatMul or Gemm (x, weight [K, N]) or Conv(x, weight [N, K, ...], bias).
        attention: also quantize the attention products of a block, either both or neither.
        keep_fp32: patterns of what is not quantized: blocks ("block_03"), layers ("block_03/fc2", "*/fc2"), scopes or
            fnmatch patterns.
        keep_fp16: the same; the two differ in the FP16 pass, not here.
        quantize_only: patterns of what is quantized, which may include the first and last linears; empty means those
            between, or all if there are none between. If the graph's metadata says so, only its blocks are quantized.
        leave_out: activations whose linears are not quantized, whatever the patterns say: those that lose too much at
            every threshold.

    Returns:
        The Placement.

    Raises:
        UsageError: a pattern matches nothing.
    """
    graph = model.graph
    blocks, layers = node_blocks(graph), linear_layers(graph)
    behind_input = _behind(graph, graph.inputs)
    linears = {node: None for node in layers if node in behind_input}  # ordered
    first = {*linears} - _behind(graph, [output for node in linears for output in node.outputs])
    groups: list[tuple[ir.Node, list[Site]]] = []  # either all or none of these are quantized
    declined: dict[str, str] = {}
    for node in graph:
        if node in layers and node in behind_input and not (node in first and _is_patch_embedding(node)):
            groups.append((node, [_linear(node, layers[node])]))
        elif attention and node.op_type == "Softmax" and (blocks[node] or BLOCKS_ALONE not in model.metadata_props):
            block = blocks[node] or node.name or ""
            found = _attention(node, block)
            if isinstance(found, str):
                declined[block] = found
            else:
                groups.append((node, found))

    names = names_by_node(graph, blocks)
    universe = set().union(*names.values()) | {site.name for _, group in groups for site in group}
    for option, patterns in (("keep_fp32", keep_fp32), ("keep_fp16", keep_fp16), ("quantize_only", quantize_only)):
        check_patterns(option, patterns, universe)
    if BLOCKS_ALONE in model.metadata_props:
        default = {node for node in graph if blocks[node] is not None}
    else:
        default = _between(graph, linears, first) | {node for node, group in groups if group[0].weight is None}
    sites: list[Site] = []
    for node, group in groups:
        meant = names[node].union(*((site.block, site.name) for site in group))
        chosen = matches(quantize_only, meant) if quantize_only else node in default
        lost = any(site.weight and site.tensor in leave_out for site in group)
        if chosen and not lost and not matches([*keep_fp32, *keep_fp16], meant):
            sites += group

    # The projection reads the attended values after a reordering: one pair before the reordering serves both.
    values = {v.name: v for node in graph for v in node.outputs}
    attended = {s.tensor for s in sites if s.kind == "attended"}
    for i, site in enumerate(sites):
        if (
            site.weight
            and site.tensor in values
            and (source := _before_reordering(values[site.tensor]).name) in attended
        ):
            sites[i] = dataclasses.replace(site, tensor=source)
    return Placement(tuple(sites), declined)


def _linear(node: ir.Node, layer: Layer) -> Site:
    x, weight = node.inputs[0], linear_weight(node)
    assert x is not None and weight is not None
    return Site(layer.block, layer.kind, x.name or "", node.outputs[0].name or "", weight.name or "")


def _is_patch_embedding(node: ir.Node) -> bool:
    """Whether a linear without predecessors is a convolution over the image's neighbourhoods; as a product over patches
    it may be quantized on request."""
    weight = linear_weight(node)
    assert weight is not None and weight.shape is not None
    return any(side != 1 for side in tuple(weight.shape)[2:])


def _between(graph: ir.Graph, linears: Collection[ir.Node], first: Collection[ir.Node]) -> set[ir.Node]:
    """The linears with others both before and after them; if there are none, those with others after them; otherwise
    all."""
    followed: set[ir.Node] = set()  # and everything else that a linear reads from
    for node in reversed(graph):
        users = [use.node for output in node.outputs for use in output.uses()]
        if any(user in followed or user in linears for user in users):
            followed.add(node)
    before_last = [node for node in linears if node in followed]
    return set([node for node in before_last if node not in first] or before_last or linears)


def _behind(graph: ir.Graph, values: Iterable[ir.Value]) -> set[ir.Node]:
    """The nodes that depend on these values, other than through their shapes."""
    reached, found = set(values), set()
    for node in graph:
        if node.op_type != "Shape" and any(value in reached for value in node.inputs if value is not None):
            found.add(node)
            reached.update(node.outputs)
    return found


def _attention(softmax: ir.Node, block: str) -> list[Site] | str:
    """Finds the attention around a Softmax, or says why it is not quantized."""
    scores, products = softmax.inputs[0], [use.node for use in softmax.outputs[0].uses()]
    first = scores.producer() if scores is not None else None
    if first is not None and first.op_type == "Add":  # a mask
        first = next((p for p in first.predecessors() if p.op_type == "MatMul"), None)
    if first is None or first.op_type != "MatMul":
        return "the softmax does not follow a MatMul: the scale has to multiply the query before the product"
    if [p.op_type for p in products] != ["MatMul"]:
        return "the softmax does not feed one MatMul"
    (second,) = products
    q, k, v = first.inputs[0], first.inputs[1], second.inputs[1]
    if q is None or k is None or v is None or any(x.is_initializer() for x in (q, k, v)):
        return "a product with a constant"
    for x, axis, allowed, what in ((v, -1, _HEAD_DIMS, "head dimension"), (v, -2, range(1, _MAX_TOKENS + 1), "tokens")):
        size = x.shape[axis] if x.shape is not None else None
        if isinstance(size, int) and size not in allowed:
            limit = f"at most {_MAX_TOKENS}" if isinstance(allowed, range) else " or ".join(map(str, allowed))
            return f"{what} {size}: TensorRT fuses INT8 attention for {limit}"
    probabilities, attended = softmax.outputs[0], second.outputs[0]
    before, after = first.outputs[0].name or "", attended.name or ""
    reader = next((use.node.outputs[0].name or "" for use in attended.uses()), "")
    return [
        Site(block, "scaled_q", q.name or "", before),
        Site(block, "k", k.name or "", before),
        Site(block, "softmax", probabilities.name or "", after, amax=1.0),
        Site(block, "v", v.name or "", after),
        Site(block, "attended", attended.name or "", reader),
    ]


def _before_reordering(value: ir.Value) -> ir.Value:
    while (
        (node := value.producer()) is not None
        and node.op_type in ("Transpose", "Reshape")
        and node.inputs[0] is not None
    ):
        value = node.inputs[0]
    return value
