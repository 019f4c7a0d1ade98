"""Attention, LayerNorm and GELU in a graph: whether each will be a single kernel, and if not, why.

The rules are those of the developer guide and the release notes, for sm75 and later; TensorRT times its kernels and may
still decline. `python -m vit_convert.engine build` reports what was actually fused.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

from vit_convert.engine.inspection.onnx_wire import Graph, Node
from vit_convert.engine.inspection.support import OUR_DOMAIN, PLUGIN_DOMAIN, SUPPORT

_THROUGH = ("Cast", "QuantizeLinear", "DequantizeLinear", "Identity")
_SCALES = ("Mul", "Div", "Add", "Where")
_QDQ = ("QuantizeLinear", "DequantizeLinear")
_HALVES = ("float16", "bfloat16")
_OLD = "TensorRT 8.6 fuses next to no attention of a graph with Q/DQ (1 of 12 of B/16 on an H200)"
_INT8_HEADS, _INT8_TOKENS = (16, 32, 64), 512


@dataclasses.dataclass(frozen=True)
class Fusion:
    """A place that could be fused.

    Attributes:
        kind: "attention", "LayerNorm", "GroupNorm" (of a plugin) or "GELU".
        where: its node.
        fused: whether it is expected to become one kernel.
        why: in words.
    """

    kind: str
    where: str
    fused: bool
    why: str


_PLUGIN_KINDS = (("QKV", "attention"), ("Attention", "attention"), ("GroupNorm", "GroupNorm"))  # by their names


def fusions(graph: Graph, target: str, *, half: bool = False) -> list[Fusion]:
    """Finds the places and judges them.

    Args:
        graph: of the ONNX file.
        target: the TensorRT generation.
        half: whether a builder flag will compute float32 in FP16 (TensorRT 8.6).
    """
    walk, explicit = _Walk(graph), any(node.op == "QuantizeLinear" for node in graph.nodes)
    found: list[Fusion] = []
    for node in graph.nodes:
        if node.domain in (PLUGIN_DOMAIN, OUR_DOMAIN):
            found.append(
                Fusion(
                    next((kind for word, kind in _PLUGIN_KINDS if word in node.op), "LayerNorm"),
                    node.label,
                    True,
                    "a plugin",
                )
            )
        elif node.op == "Softmax":
            old = explicit and not SUPPORT[target].fuses_quantized_attention
            found += [
                dataclasses.replace(row, fused=False, why=_OLD) if old else row for row in _attention(walk, node, half)
            ]
        elif node.op == "Attention":
            found.append(Fusion("attention", node.label, True, "an operator of its own"))
        elif node.op == "LayerNormalization":
            found.append(Fusion("LayerNorm", node.label, True, "an operator of its own, which sums in float32"))
        elif node.op == "Gelu":
            reads = SUPPORT[target].reads("Gelu")
            why = "an operator of its own, joined to the product before it" if reads else f"{target} has no Gelu"
            found.append(Fusion("GELU", node.label, bool(reads), why))
        elif node.op in ("Erf", "Tanh") and _is_gelu(walk, node):
            found.append(Fusion("GELU", node.label, True, f"written with {node.op}, which is recognised"))
        elif node.op == "Sqrt":
            found += _spelt_norm(walk, node)
    return found


class _Walk:
    """The producer and the readers of each value."""

    def __init__(self, graph: Graph):
        self.graph = graph
        self.giver: dict[str, Node] = {name: node for node in graph.nodes for name in node.outputs}
        takers: dict[str, list[Node]] = {}
        for node in graph.nodes:
            for name in node.inputs:
                takers.setdefault(name, []).append(node)
        self.takers: Mapping[str, Sequence[Node]] = takers

    def back(self, name: str, through: Sequence[str]) -> tuple[Node | None, list[Node]]:
        """The first node before a value that has none of these operators, and the nodes passed on the way; follows
        first inputs."""
        passed: list[Node] = []
        # a damaged file may contain a cycle
        while (node := self.giver.get(name)) is not None and node.op in through and len(passed) < len(self.giver):
            passed.append(node)
            names = [given for given in node.inputs if given not in self.graph.weights]
            name = next((given for given in names if self._leads_to_product(given)), names[0] if names else "")
        return node, passed

    def _leads_to_product(self, name: str) -> bool:
        """Whether a value comes from a product within a few steps, as scores do and masks do not."""
        for _ in range(4):
            node = self.giver.get(name)
            if node is None:
                return False
            if node.op == "MatMul":
                return True
            name = node.inputs[0] if node.inputs else ""
        return False

    def forward(self, name: str, through: Sequence[str]) -> tuple[Node | None, list[Node]]:
        """The first node after a value that has none of these operators, and the nodes passed on the way; None if the
        value forks."""
        passed: list[Node] = []
        while len(after := self.takers.get(name, ())) == 1:
            if after[0].op not in through or len(passed) == len(self.giver):
                return after[0], passed
            passed.append(after[0])
            name = after[0].output(0)
        return None, passed


def _attention(walk: _Walk, softmax: Node, half: bool) -> Iterator[Fusion]:
    scores, before = walk.back(softmax.input(0), (*_THROUGH, *_SCALES))
    values, after = walk.forward(softmax.output(0), _THROUGH)
    if scores is None or scores.op != "MatMul" or values is None or values.op != "MatMul":
        return  # a softmax of classes, or something else
    reasons = [*_of_shapes(walk, scores, values), *_of_types(walk, scores, values, before, after, half)]
    if any(node.op in ("Mul", "Div") for node in before):
        reasons.append("the scale stands after the first product: multiply the queries instead")
    if reasons:
        yield Fusion("attention", scores.label, False, "; ".join(reasons))
    else:
        yield Fusion("attention", scores.label, True, "MatMul, Softmax and MatMul in a form that is recognised")


def _of_shapes(walk: _Walk, scores: Node, values: Node) -> Iterator[str]:
    graph = walk.graph
    shapes = [graph.value(name).shape for name in (*scores.inputs[:2], values.input(1))]
    if any(shape is None for shape in shapes):
        yield "the file does not say its shapes"
        return
    if any(len(shape or ()) != 4 for shape in shapes):
        ranks = ", ".join(str(len(shape or ())) for shape in shapes)
        yield f"queries, keys and values of {ranks} axes: it wants [batch, heads, tokens, width of a head]"
    width = (shapes[0] or ("?",))[-1]
    if isinstance(width, int) and not (16 <= width <= 256 and width % 8 == 0):
        yield f"heads of width {width}: it wants 16 to 256, a multiple of 8"


def _of_types(
    walk: _Walk, scores: Node, values: Node, before: Sequence[Node], after: Sequence[Node], half: bool
) -> Iterator[str]:
    graph = walk.graph
    inputs = [*scores.inputs[:2], values.input(1)]
    pairs = [walk.giver.get(name) for name in inputs]
    quantized = [node is not None and node.op == "DequantizeLinear" for node in pairs]
    quantized.append(any(node.op in _QDQ for node in after))
    if any(quantized):
        if not all(quantized):
            yield "only some of queries, keys, values and scores are quantized: all or none"
        shape = graph.value(scores.input(0)).shape or ()
        if len(shape) == 4 and shape[-1] not in _INT8_HEADS:
            yield f"heads of width {shape[-1]} in INT8: it wants {', '.join(map(str, _INT8_HEADS))}"
        if len(shape) == 4 and isinstance(shape[2], int) and shape[2] > _INT8_TOKENS:
            yield f"{shape[2]} tokens in INT8: at most {_INT8_TOKENS}, more are slower than FP16"
        return
    types = {graph.value(name).dtype for name in inputs} - {""}  # a file need not say
    if len(types) > 1:
        yield f"products of {' and '.join(sorted(types))}: both sides need one type"
    elif types == {"float32"} and not half:
        yield "float32: the fused kernels are FP16, BF16, INT8 and FP8"


def _is_gelu(walk: _Walk, node: Node) -> bool:
    """Whether 1 is added to its output, and the sum multiplied."""
    added, _ = walk.forward(node.output(0), ())
    return added is not None and added.op == "Add" and walk.forward(added.output(0), ("Mul",))[1] != []


def _spelt_norm(walk: _Walk, root: Node) -> Iterator[Fusion]:
    """A LayerNorm written with primitives: the square root of a mean, after a subtracted mean."""
    variance, _ = walk.back(root.input(0), ("Add", *_THROUGH))
    if variance is not None and variance.op == "ReduceMean":
        why = "written with ReduceMean and Sqrt: its squares overflow FP16 from 255 on; export with opset 17 or later"
        yield Fusion("LayerNorm", root.label, False, why)
