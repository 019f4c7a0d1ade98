"""Where Q/DQ pairs go: the linears of the encoder blocks, and the attention products on request.

Quantizing the residual stream, the LayerNorm inputs, the patch embedding, the pooling or the head costs ViTs their accuracy; those keep
their type. A bias stays in floating point, and nothing is quantized between fc1 and GELU, so that TensorRT fuses GEMM, bias and GELU.
"""

import dataclasses
from collections.abc import Sequence
from typing import TypedDict

import onnx_ir as ir

from vit_convert.layer_names import check_patterns, kind_of, matches
from vit_convert.quantize.graph import names_by_node, node_blocks

# What TensorRT's fused INT8 attention takes; beyond it the three kernels are slower than FP16's one.
_HEAD_DIMS = (16, 32, 64)
_MAX_TOKENS = 512


@dataclasses.dataclass(frozen=True)
class Site:
    """One tensor that is quantized where one node reads it.

    Attributes:
        block: "block_03", or the weight's scope outside the blocks.
        kind: qkv, query, key, value, out, fc1, fc2 for linears; scaled_q, k, v, softmax, attended for attention.
        tensor: name of the activation that the pair stands on.
        node: name of the first output of the node that reads it.
        weight: name of the weight quantized with it, None for attention.
        amax: largest |x| where it is known without calibration (softmax: 1).
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
    """The lists of patterns that `place` takes."""

    keep_fp32: Sequence[str]
    keep_fp16: Sequence[str]
    quantize_only: Sequence[str]


@dataclasses.dataclass(frozen=True)
class Placement:
    """All sites of a graph.

    Attributes:
        sites: in graph order.
        declined: for each block whose attention was asked for and is not quantized, why.
    """

    sites: tuple[Site, ...]
    declined: dict[str, str]

    def tensors(self) -> list[str]:
        """Names of the activations whose ranges calibration has to find."""
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
) -> Placement:
    """Chooses what is quantized.

    Args:
        model: the fp32 graph, linears as MatMul(x, weight [K, N]) or Conv(x, weight [N, K, 1, 1], bias).
        attention: quantize both attention products too, all of a block's or none.
        keep_fp32: patterns of what stays; blocks ("block_03"), layers ("block_03/fc2", "*/fc2"), scopes or fnmatch patterns.
        keep_fp16: the same; the two differ in the FP16 pass, not here.
        quantize_only: patterns of what is quantized, also outside the blocks; empty means every block.

    Returns:
        The Placement.

    Raises:
        UsageError: a pattern matches nothing.
    """
    graph = model.graph
    blocks = node_blocks(graph)
    groups: list[tuple[ir.Node, list[Site]]] = []  # of which either all or none are quantized
    declined: dict[str, str] = {}
    for node in graph:
        block = blocks[node]
        if node.op_type in ("MatMul", "Conv") and (site := _linear(node, block)) is not None:
            groups.append((node, [site]))
        elif attention and node.op_type == "Softmax" and block is not None:
            found = _attention(node, block)
            if isinstance(found, str):
                declined[block] = found
            else:
                groups.append((node, found))

    names = names_by_node(blocks)
    universe = set().union(*names.values()) | {site.name for _, group in groups for site in group}
    for option, patterns in (("keep_fp32", keep_fp32), ("keep_fp16", keep_fp16), ("quantize_only", quantize_only)):
        check_patterns(option, patterns, universe)
    sites: list[Site] = []
    for node, group in groups:
        meant = names[node].union(*((site.block, site.name) for site in group))
        chosen = matches(quantize_only, meant) if quantize_only else blocks[node] is not None
        if chosen and not matches([*keep_fp32, *keep_fp16], meant):
            sites += group

    # The projection reads the attended values reordered: their one pair stands before the reordering, and serves both.
    values = {v.name: v for node in graph for v in node.outputs}
    attended = {s.tensor for s in sites if s.kind == "attended"}
    for i, site in enumerate(sites):
        if site.weight and site.tensor in values and (source := _before_reordering(values[site.tensor]).name) in attended:
            sites[i] = dataclasses.replace(site, tensor=source)
    return Placement(tuple(sites), declined)


def _linear(node: ir.Node, block: str | None) -> Site | None:
    x, weight = node.inputs[:2]
    if x is None or weight is None or weight.const_value is None or x.is_initializer():
        return None
    if len(weight.const_value.shape) != 2 and tuple(weight.const_value.shape)[2:] != (1, 1):  # not a patch embedding
        return None
    name = weight.name or ""
    return Site(block or name.rpartition("/")[0] or name, kind_of(name), x.name or "", node.outputs[0].name or "", name)


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
    while (node := value.producer()) is not None and node.op_type in ("Transpose", "Reshape") and node.inputs[0] is not None:
        value = node.inputs[0]
    return value
