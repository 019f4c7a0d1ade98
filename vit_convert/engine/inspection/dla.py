"""Whether a deep learning accelerator (DLA) of a Jetson can run a graph, and what prevents it."""

import collections

from vit_convert.engine.inspection.onnx_wire import Graph

# Operators that a DLA supports; products with constant weights only as convolutions. Source: TensorRT's
# developer guide, "DLA supported layers and restrictions".
_TAKEN = frozenset(
    (
        *("Conv", "ConvTranspose", "Relu", "Sigmoid", "Tanh", "Clip", "LeakyRelu", "PRelu", "AveragePool", "MaxPool"),
        *("GlobalAveragePool", "Add", "Sub", "Mul", "Div", "Pow", "Max", "Min", "Equal", "Greater", "Less", "Concat"),
        *("Reshape", "Transpose", "Slice", "Split", "Resize", "LRN", "BatchNormalization", "Identity", "Constant"),
        *("QuantizeLinear", "DequantizeLinear", "Flatten", "Squeeze", "Unsqueeze", "Dropout"),
    )
)


def dla_refusals(graph: Graph) -> str:
    """Operators that a DLA does not support, most frequent first; "" for a graph that it may run as a whole.

    A graph split between DLA and GPU copies data at every border, which costs a transformer more than the accelerator
    gains.

    Example:
        >>> from vit_convert.engine.inspection.onnx_wire import read_graph
        >>> dla_refusals(read_graph("out/tiny/model.onnx")).startswith("it has no layer for")
        True
    """
    counts = collections.Counter(node.op for node in graph.nodes if node.op not in _TAKEN or node.domain)
    if not counts:
        return ""
    return "it has no layer for " + ", ".join(f"{count} {op}" for op, count in counts.most_common())
