"""The export stage: a model becomes `model.onnx` with its weights beside it."""

import dataclasses
import logging
import os
import re
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as passes

from vit_convert.core.errors import ExportError
from vit_convert.core.onnx_file import BLOCKS_ALONE, external_files, save_onnx
from vit_convert.export import lower, weights
from vit_convert.export.passes.dynamic_image_size import make_dynamic
from vit_convert.export.passes.mlp_as_convolution import as_tokens
from vit_convert.export.passes.uint8_input import take_pixels
from vit_convert.export.targets import Target
from vit_convert.families.model import Model

_LAYOUT_TO_NHWC = {"NHWC": (0, 1, 2, 3), "NCHW": (0, 2, 3, 1)}


@dataclasses.dataclass(frozen=True)
class ExportReport:
    """What was written.

    Attributes:
        opset: ONNX opset of the graph.
        num_nodes: nodes in the graph.
        nodes_traced: nodes that jax2onnx left for the traced part.
        nodes_per_block: nodes of the largest encoder block; 0 for a model without such.
        num_shapes: Shape nodes.
        bytes: size of the graph and its weights on disk.
        taps: inner values that the reference knows, by name.
        rules: per rule: name, places rewritten, places declined by reason.
    """

    opset: int
    num_nodes: int
    nodes_traced: int
    nodes_per_block: int
    num_shapes: int
    bytes: int
    taps: list[str]
    rules: list[dict[str, Any]]


def export_model(
    model: Model,
    path: str | os.PathLike[str],
    *,
    image_size: tuple[int, int],
    target: Target,
    layout: str = "NHWC",
    taps: bool = False,
    dynamic_patch: int = 0,
    pixels: tuple[np.ndarray, np.ndarray] | None = None,
) -> ExportReport:
    """Traces, rewrites and writes a model.

    Args:
        model: what to export.
        path: the `.onnx` file; weights go to `<path>.data`.
        image_size: (height, width) in pixels; for a dynamic graph, those that the model's position table is for.
        target: opset and substitutions.
        layout: "NHWC" or "NCHW", the order of the `images` input's axes.
        taps: keep the taps as outputs of the written graph.
        dynamic_patch: side of a patch in pixels makes height and width symbolic, any multiples of it; 0 keeps `image_size`.
        pixels: scale and offset, each float32 [3], make `images` uint8 and normalise x to x · scale + offset inside.

    Returns:
        The report.

    Raises:
        ExportError: the model cannot be traced or the graph is invalid.
        UsageError: the disk is full.
    """
    logging.getLogger("onnx_ir").setLevel(logging.ERROR)  # it warns of every weight that has no value yet
    to_nhwc = _LAYOUT_TO_NHWC[layout]
    nhwc = ("batch", *image_size, 3)
    image_shape = [nhwc[to_nhwc.index(axis)] for axis in range(4)]

    def apply(params: Any, images: Any) -> Any:
        return model.apply(params, images if layout == "NHWC" else jnp.transpose(images, to_nhwc))

    changes: list[Callable[[ir.Model], object]] = []
    if dynamic_patch:
        grid = (image_size[0] // dynamic_patch, image_size[1] // dynamic_patch)
        changes.append(lambda traced: make_dynamic(traced, grid))
    if pixels is not None:
        changes.append(lambda traced: take_pixels(traced, *pixels))
    graph = lower.onnx_from_apply(
        apply,
        model.traced_shapes,
        image_shape,
        model.output,
        model.traced_taps,
        target,
        depth=model.stacks[0].depth if model.repeats else None,
        prune=not taps,
        keep_taps=taps and not model.stacks,
        changes=changes,
    )
    weights.bind(graph.model, model.params)
    passes.ShapeInferencePass()(graph.model)
    if taps:
        values = {value.name: value for node in graph.model.graph for value in node.outputs}
        outputs = {value.name for value in graph.model.graph.outputs}
        graph.model.graph.outputs.extend(as_tokens(graph.model.graph, values[tap]) for tap in graph.taps if tap not in outputs)
    report = _report(graph, target)
    if report.nodes_per_block > target.max_nodes_per_block and model.repeats:
        raise ExportError(
            f"{path}: {report.nodes_per_block} nodes in an encoder block, target {target.name} allows {target.max_nodes_per_block}",
            fix="A rule no longer matches what jax2onnx writes: install the pinned jax2onnx.",
        )
    if model.stacks:
        graph.model.metadata_props[BLOCKS_ALONE] = "alone"
    save_onnx(graph.model, path)
    return dataclasses.replace(report, bytes=sum(file.stat().st_size for file in external_files(path)))


def _report(graph: lower.Graph, target: Target) -> ExportReport:
    nodes: list[ir.Node] = list(graph.model.graph)
    blocks: dict[str, int] = {}
    for node in nodes:
        if match := re.match(r"Transformer/(encoderblock_\d+)/", node.name or ""):
            blocks[match[1]] = blocks.get(match[1], 0) + 1
    return ExportReport(
        opset=target.opset,
        num_nodes=len(nodes),
        nodes_traced=graph.nodes_traced,
        nodes_per_block=max(blocks.values(), default=0),
        num_shapes=sum(node.op_type == "Shape" for node in nodes),
        bytes=0,
        taps=graph.taps,
        rules=[dataclasses.asdict(count) for count in graph.rules],
    )
