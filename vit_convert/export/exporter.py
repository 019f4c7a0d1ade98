"""The export stage: a model becomes `model.onnx` with its weights beside it."""

import collections
import dataclasses
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as passes

from vit_convert.core.errors import ExportError
from vit_convert.core.model import Model
from vit_convert.core.onnx_file import BLOCKS_ALONE, external_files, save_onnx
from vit_convert.core.stack import Stack
from vit_convert.core.stage_results import RuleCount
from vit_convert.core.warm import keeps, shared
from vit_convert.export import lower, weights
from vit_convert.export.passes.contract import GraphPass
from vit_convert.export.passes.dynamic_image_size import making_dynamic
from vit_convert.export.passes.dynamic_length import making_lengths_dynamic
from vit_convert.export.passes.mlp_as_convolution import as_tokens
from vit_convert.export.passes.uint8_input import taking_pixels
from vit_convert.export.targets import Target

_TO_NHWC = (0, 2, 3, 1)


@dataclasses.dataclass(frozen=True)
class ExportReport:
    """What was written.

    Attributes:
        opset: ONNX opset of the graph.
        num_nodes: nodes in the graph.
        nodes_traced: nodes that jax2onnx wrote for the traced part.
        nodes_per_block: nodes of the largest block; 0 for a model without blocks.
        num_shapes: Shape nodes.
        bytes: size of the graph and its weights on disk.
        taps: names of the inner values that the reference contains.
        pooled_token: the one token that the last block keeps, see `Model`; None if it keeps all.
        rules: what each rule and pass did, in order.
    """

    opset: int
    num_nodes: int
    nodes_traced: int
    nodes_per_block: int
    num_shapes: int
    bytes: int
    taps: tuple[str, ...]
    pooled_token: int | str | None
    rules: tuple[RuleCount, ...]


def export_model(
    model: Model,
    path: str | os.PathLike[str],
    *,
    target: Target,
    layout: str = "NHWC",
    taps: bool = False,
    dynamic_patch: int = 0,
    dynamic_length: bool = False,
    pixels: tuple[np.ndarray, np.ndarray] | None = None,
) -> ExportReport:
    """Traces, rewrites and writes a model.

    Args:
        model: what to export.
        path: the `.onnx` file; weights go to `<path>.data`.
        target: opset and substitutions.
        layout: "NHWC" or "NCHW", the axis order of the image input.
        taps: whether to keep the taps as outputs of the written graph.
        dynamic_patch: side of a patch in pixels: height and width become symbolic, any multiples of it; 0 keeps the
            model's size.
        dynamic_length: makes the length of texts symbolic: any up to the model's.
        pixels: scale and offset, each float32 [3]: the images become uint8, and the graph normalises x to x · scale +
            offset; None keeps float32 images.

    Returns:
        The report.

    Raises:
        ExportError: the model cannot be traced or the graph is invalid.
        UsageError: the disk is full.
    """
    logging.getLogger("onnx_ir").setLevel(logging.ERROR)  # it warns about every weight that has no value yet
    graph = _graph_of(model, _Wanted(target, layout, taps, dynamic_patch, dynamic_length, pixels))
    weights.bind(graph.model, model.params)
    passes.ShapeInferencePass()(graph.model)
    if taps:
        values = {value.name: value for node in graph.model.graph for value in node.outputs}
        outputs = {value.name for value in graph.model.graph.outputs}
        graph.model.graph.outputs.extend(
            as_tokens(graph.model.graph, values[tap]) for tap in graph.taps if tap not in outputs
        )
    report = _report(graph, model.stacks, target)
    for stack in model.stacks:
        counted, allowed = _nodes_per_block(graph, [stack]), target.max_nodes_per_block * stack.nodes
        if counted > allowed:
            raise ExportError(
                f"{path}: {counted} nodes in a block of {stack.prefix(0)}…, target {target.name} allows {allowed:g}",
                fix="A rule no longer matches what jax2onnx writes: install the pinned jax2onnx. If your own "
                "family's blocks are larger than a ViT's, say so in Stack.nodes.",
            )
    if model.stacks:
        graph.model.metadata_props[BLOCKS_ALONE] = "alone"
    save_onnx(graph.model, path)
    return dataclasses.replace(report, bytes=sum(file.stat().st_size for file in external_files(path)))


@dataclasses.dataclass(frozen=True)
class _Wanted:
    """What a model's graph shall contain; see `export_model`."""

    target: Target
    layout: str
    taps: bool
    dynamic_patch: int
    dynamic_length: bool
    pixels: tuple[np.ndarray, np.ndarray] | None

    @property
    def key(self) -> tuple[object, ...]:
        """A hashable key, equal for equal values."""
        constants = tuple(part.tobytes() for part in self.pixels or ())
        return self.target, self.layout, self.taps, self.dynamic_patch, self.dynamic_length, constants


def _graph_of(model: Model, wanted: _Wanted) -> lower.Graph:
    """The graph without its weights, for the caller to modify; it is computed once for all models of one kind."""
    if model.kind is None or not keeps():
        return _lowered(model, wanted)
    graph = shared(("graph", model.kind, *wanted.key), lambda: _lowered(model, wanted))
    return dataclasses.replace(graph, model=graph.model.clone(), taps=list(graph.taps))


def _lowered(model: Model, wanted: _Wanted) -> lower.Graph:
    changes: list[GraphPass] = []
    image = model.signature.image
    if wanted.dynamic_patch:
        changes.append(_resizing(model, wanted.dynamic_patch))
    if wanted.dynamic_length:
        changes.append(_shortening(model))
    if wanted.pixels is not None and image is not None:
        changes.append(taking_pixels(image.name, *wanted.pixels))
    return lower.onnx_from_apply(
        _apply_in(model, wanted.layout),
        model.traced_shapes,
        model.signature.of_graph(wanted.layout).inputs,
        model.signature.judged,
        model.traced_taps,
        wanted.target,
        stacks=model.stacks,
        token=model.pooled_token,
        prune=not wanted.taps,
        keep_taps=wanted.taps and not model.stacks,
        changes=changes,
    )


def _apply_in(model: Model, layout: str) -> Callable[..., Any]:
    """The model's function, taking images in the given layout."""
    position = next((i for i, tensor in enumerate(model.signature.inputs) if tensor.is_image), None)
    if layout == "NHWC" or position is None:
        return model.apply

    def apply(params: Any, *inputs: Any) -> Any:
        turned = jnp.transpose(inputs[position], _TO_NHWC)
        return model.apply(params, *inputs[:position], turned, *inputs[position + 1 :])

    return apply


def _resizing(model: Model, patch: int) -> GraphPass:
    """The pass that makes the image size dynamic, starting from the size of the model's position table."""
    image, table = model.signature.image, model.position_table
    if image is None or table is None:
        raise ExportError(
            "the model has no position table to resample, so its image size is fixed", fix="Give one size."
        )
    _, height, width, _ = image.shape
    assert isinstance(height, int) and isinstance(width, int)
    return making_dynamic((height // patch, width // patch), table, image.name)


def _shortening(model: Model) -> GraphPass:
    """The pass after which texts may have fewer tokens than the model's position table has rows."""
    tokens = next((tensor for tensor in model.signature.inputs if tensor.is_text), None)
    if tokens is None or model.position_table is None:
        raise ExportError("the model takes no text with a position table, so its length is fixed")
    return making_lengths_dynamic(model.position_table, tokens.name)


def _nodes_per_block(graph: lower.Graph, stacks: Sequence[Stack]) -> int:
    """Nodes of the largest block; 0 without any."""
    prefixes = [stack.prefix(i) for stack in stacks for i in range(stack.depth)]
    counts = collections.Counter(
        prefix
        for node in graph.model.graph
        for prefix in prefixes
        if node.name is not None and node.name.startswith(prefix)
    )
    return max(counts.values(), default=0)


def _report(graph: lower.Graph, stacks: Sequence[Stack], target: Target) -> ExportReport:
    nodes: list[ir.Node] = list(graph.model.graph)
    return ExportReport(
        opset=target.opset,
        num_nodes=len(nodes),
        nodes_traced=graph.nodes_traced,
        nodes_per_block=_nodes_per_block(graph, stacks),
        num_shapes=sum(node.op_type == "Shape" for node in nodes),
        bytes=0,
        taps=tuple(graph.taps),
        pooled_token=graph.pooled_token,
        rules=tuple(graph.rules),
    )
