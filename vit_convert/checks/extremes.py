"""The largest and the smallest value of activations, computed inside the graph so that nothing large leaves it."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx

_AXES_AS_INPUT = 18  # the opset from which ReduceMax takes its axes as an input


def append_extremes(
    proto: Any, tensors: Sequence[str], axes: Mapping[str, Sequence[int]] | None = None
) -> list[tuple[str, str]]:
    """Lets a graph compute the extremes of some of its values, as further outputs.

    Args:
        proto: the graph, which is changed.
        tensors: names of float32 values.
        axes: of each, over which to take them; None for the whole tensors.

    Returns:
        For each tensor the names of the outputs that hold its largest and its smallest value.
    """
    as_input = next(entry.version for entry in proto.opset_import if not entry.domain) >= _AXES_AS_INPUT
    names = []
    for number, name in enumerate(tensors):
        inputs, attributes = [name], dict[str, Any]()
        if axes is not None and as_input:
            values = np.array(axes[name], np.int64)
            proto.graph.initializer.append(onnx.numpy_helper.from_array(values, f"axes/{number}"))
            inputs.append(f"axes/{number}")
        elif axes is not None:
            attributes["axes"] = [*axes[name]]
        names.append((f"{name}/ReduceMax", f"{name}/ReduceMin"))
        for op, output in zip(("ReduceMax", "ReduceMin"), names[-1]):
            proto.graph.node.append(onnx.helper.make_node(op, inputs, [output], keepdims=0, **attributes))
            proto.graph.output.append(onnx.ValueInfoProto(name=output))
    return names
