"""The largest |x| of activations, computed inside the graph so that nothing large leaves it, in one pass over a few
images."""

import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from vit_convert.checks.extremes import append_extremes
from vit_convert.core.onnx_file import Batch, feeds_of, open_proto, read_graph


def _all_but_channels(shape: ir.Shape) -> list[int]:
    channels = max(axis for axis, size in enumerate(shape) if size != 1)
    return [axis for axis in range(len(shape)) if axis != channels]


def largest(
    onnx_path: str | os.PathLike[str], tensors: Sequence[str], batches: Iterable[Batch], *, per_channel: bool = False
) -> dict[str, np.ndarray]:
    """Measures the largest |x|.

    Args:
        onnx_path: an fp32 graph with one input.
        tensors: names of float32 activations.
        batches: the graph's inputs: arrays, or {input: array}.
        per_channel: measure each channel (of the last axis that is longer than one) instead of the whole tensor.

    Returns:
        For each tensor, float32 [channels] or []. NaN is ignored, as in onnxruntime's maximum.
    """
    return magnitudes(extremes(onnx_path, tensors, batches, per_channel=per_channel))


def magnitudes(found: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, np.ndarray]:
    """The largest |x| of tensors, by their smallest and their largest x."""
    return {name: np.maximum(high, -low) for name, (low, high) in found.items()}


def extremes(
    onnx_path: str | os.PathLike[str], tensors: Sequence[str], batches: Iterable[Batch], *, per_channel: bool = False
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Measures the smallest and the largest x; see `largest`."""
    proto = read_graph(onnx_path)
    axes = None
    if per_channel:
        shapes = {v.name: v.shape for node in ir.load(onnx_path).graph for v in node.outputs if v.shape is not None}
        axes = {name: _all_but_channels(shapes[name]) for name in tensors}
    del proto.graph.output[:]
    append_extremes(proto, tensors, axes)
    session = open_proto(proto, pathlib.Path(onnx_path).parent)
    found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for batch in batches:
        values = iter(session.run(None, feeds_of(session, batch)))
        for name, high, low in zip(tensors, values, values):
            before = found.get(name, (low, high))
            found[name] = np.minimum(before[0], low), np.maximum(before[1], high)
    return found
