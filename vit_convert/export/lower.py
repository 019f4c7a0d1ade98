"""From a Flax model to an ONNX graph that suits TensorRT: trace, fold, substitute, unroll, name."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import onnx_ir as ir

from vit_convert.core.signature import Tensor
from vit_convert.core.stack import Stack
from vit_convert.core.stage_results import RuleCount
from vit_convert.export import weights
from vit_convert.export.passes.cleanup import clean
from vit_convert.export.passes.contract import Changed, GraphPass
from vit_convert.export.passes.name_nodes import naming
from vit_convert.export.passes.prune_to_pooled_token import pooled_token, pruning
from vit_convert.export.passes.unroll_blocks import unrolled_taps, unrolling
from vit_convert.export.rules.rule import apply_rule
from vit_convert.export.targets import Target
from vit_convert.export.trace import Apply, trace


@dataclasses.dataclass
class Graph:
    """A rewritten graph whose weights are described, but not yet computed.

    Attributes:
        model: the graph; its outputs are the model's, the taps are inner values.
        taps: names of inner values that the reference contains: `block_00`… and `encoder_norm`.
        rules: what each substitution did; for an unrolled graph, on the traced blocks.
        nodes_traced: nodes that jax2onnx wrote for the traced depth, before any substitution.
        pooled_token: the one token that the last block keeps, see `Model`; None if it keeps all.
    """

    model: ir.Model
    taps: list[str]
    rules: list[RuleCount]
    nodes_traced: int
    pooled_token: int | str | None = None


def onnx_from_apply(
    apply: Apply,
    param_shapes: Mapping[str, Sequence[int]],
    inputs: Sequence[Tensor],
    outputs: Sequence[str],
    taps: Sequence[str],
    target: Target,
    *,
    stacks: Sequence[Stack] = (),
    token: int | str | None = None,
    prune: bool = True,
    keep_taps: bool = False,
    changes: Sequence[Callable[[ir.Model], object]] = (),
) -> Graph:
    """Traces a model and applies its target's substitutions.

    Args:
        apply: maps ({parameter name: array}, *inputs) to {output name: array}, taps included.
        param_shapes: shapes of the float32 parameters that `apply` reads.
        inputs: of the graph, in the order of `apply`'s arguments.
        outputs: names of the graph's outputs.
        taps: names of the taps that `apply` returns, in order.
        target: opset and rules.
        stacks: the model's runs of equal blocks, of which `apply` may compute only the first.
        token: the one that the outputs are computed from, see `Model.pooled_token`; None if that is not known.
        prune: let the last block compute only the pooled token, if nothing after it reads another.
        keep_taps: keep all taps as outputs of the graph, even those that its output does not depend on.
        changes: applied to the pruned graph in order, in place, before its nodes are named.

    Returns:
        The graph.

    Raises:
        ExportError: the model cannot be traced.
    """
    model = trace(apply, param_shapes, inputs, [*outputs, *taps], target.opset)
    nodes_traced = sum(1 for _ in model.graph)
    weights.describe(model)
    counts = substitute(model, target)
    taps = list(taps)
    for stack in stacks:
        unrolling(stack)(model)
        taps = unrolled_taps(stack, taps)
    if not keep_taps:
        model.graph.outputs[len(outputs) :] = []  # not `del`: onnx_ir would still take them for outputs
    clean(model)
    index = pooled_token(model, token) if prune else None
    num_pruned = _places(pruning(token), model) if prune else 0
    clean(model)
    for change in changes:
        change(model)
    finished = [RuleCount(finish.__name__, _places(finish, model)) for finish in target.finish]
    clean(model)
    present = {value.name for node in model.graph for value in node.outputs} | {
        value.name for value in model.graph.outputs
    }
    # a substitution may have removed a value that a user's module declares as a tap
    taps = [tap for tap in taps if tap in present]
    naming(taps, stacks)(model)
    finished += [RuleCount(change.__name__, _places(change, model)) for change in target.last]
    clean(model)
    _call_outputs(model.graph, outputs)
    model.producer_name, model.doc_string, model.metadata_props["vit_convert.target"] = "vit_convert", "", target.name
    model.graph.name = "vit"
    counts += [RuleCount("prune_tokens", num_pruned), *finished]
    return Graph(model, taps, counts, nodes_traced, index if num_pruned else None)


def _call_outputs(graph: ir.Graph, names: Sequence[str]) -> None:
    """Gives an output that is also a tap, such as the stream after the last block, a value with a name of its own."""
    for position, name in enumerate(names):
        value = graph.outputs[position]
        if value.name != name:
            node = ir.node("Identity", [value], name=f"{name}/Identity")
            copy = node.outputs[0]
            copy.name, copy.shape, copy.type = name, value.shape, value.type
            graph.append(node)
            graph.outputs[position] = copy


def _places(change: GraphPass, model: ir.Model) -> int:
    """Runs a pass, which checks its contract; returns how many places it changed."""
    result = change(model)
    assert isinstance(result, Changed)
    return result.places


def substitute(model: ir.Model, target: Target) -> list[RuleCount]:
    """Folds constants and applies a target's rules in order, in place; returns what each rule did."""
    from onnxscript import optimizer

    # ConstantOfShape, which onnxscript does not fold, makes the ones and zeros of a LayerNorm without scale or bias.
    optimizer.fold_constants(
        model, onnx_shape_inference=False, should_fold=lambda node: node.op_type == "ConstantOfShape" or None
    )
    weights.fold_weights(model)
    clean(model)  # if a value is computed twice, a pattern that uses it twice does not match
    counts = [apply_rule(rule(), model) for rule in target.rules]  # each rule leaves the graph clean
    weights.fold_weights(model)
    return counts
