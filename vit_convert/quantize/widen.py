"""A bf16 graph in a form that onnxruntime can run on a CPU: the same roundings, in float32.

onnxruntime has no bf16 arithmetic on CPUs (microsoft/onnxruntime#28768), only casts. Here every result that is bf16 in
the graph is computed in float32 and immediately rounded to bf16, as on a GPU, which sums bf16 products in float32.
"""

import numpy as np
import onnx_ir as ir

from vit_convert.quantize.graph import derived

_NOT_ROUNDED = frozenset(
    {"Transpose", "Reshape", "Slice", "Gather", "Concat", "Split", "Expand", "Squeeze", "Unsqueeze", "Identity"}
)


def widen(model: ir.Model) -> ir.Model:
    """Replaces bf16 by float32 values that are rounded to bf16.

    Args:
        model: a graph partly typed bf16, but not its inputs and outputs; left as it is.

    Returns:
        The same graph with float32 in place of bf16; rounded values keep their names, and weights are widened while it
        is saved.
    """
    model = model.clone()
    graph = model.graph
    for weight in graph.initializers.values():
        if weight.dtype == ir.DataType.BFLOAT16 and weight.const_value is not None:
            weight.const_value = derived(weight.const_value, ir.DataType.FLOAT, _to_float32, weight.name or "")
            weight.type = ir.TensorType(ir.DataType.FLOAT)
    for node in list(graph):
        for value in node.outputs:
            if value.dtype != ir.DataType.BFLOAT16:
                continue
            value.type = ir.TensorType(ir.DataType.FLOAT)
            if node.op_type in _NOT_ROUNDED:  # it only moves values that are rounded already
                continue
            _round(graph, node, value)
        if node.op_type == "Cast" and node.attributes["to"].as_int() == ir.DataType.BFLOAT16:
            node.attributes["to"] = ir.AttrInt64("to", ir.DataType.FLOAT)
    return model


def _round(graph: ir.Graph, node: ir.Node, value: ir.Value) -> None:
    """Inserts a cast to bf16 and one back between a value and its readers; the second takes over its name."""
    readers = list(value.uses())
    name, value.name = value.name, f"{value.name}/unrounded"
    narrow = ir.node("Cast", [value], {"to": ir.DataType.BFLOAT16}, name=f"{name}/narrow")
    wide = ir.node("Cast", [narrow.outputs[0]], {"to": ir.DataType.FLOAT}, name=f"{name}/wide")
    narrow.outputs[0].name = f"{name}/narrow"
    wide.outputs[0].name = name
    for cast, dtype in ((narrow, ir.DataType.BFLOAT16), (wide, ir.DataType.FLOAT)):
        cast.outputs[0].type, cast.outputs[0].shape = ir.TensorType(dtype), value.shape
    for use in readers:
        use.node.replace_input_with(use.idx, wide.outputs[0])
    graph.insert_after(node, [narrow, wide])
    for index, output in enumerate(graph.outputs):
        if output is value:
            graph.outputs[index] = wide.outputs[0]


def _to_float32(weight: np.ndarray) -> np.ndarray:
    return weight.astype(np.float32)
