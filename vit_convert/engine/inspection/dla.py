"""Whether a deep learning accelerator (DLA) of a Jetson can take a graph, and what stands against it."""

import collections

from vit_convert.engine.inspection.onnx_wire import Graph

# What a DLA has a layer for; of the products, those with constant weights only as a convolution. Source: TensorRT's
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
    """Operators that a DLA has no layer for, most frequent first; "" for a graph that it may take as a whole.

    A graph that is split between DLA and GPU copies between them at every border, which costs a transformer more than
    the accelerator gains.

    Example:
        >>> from vit_convert.engine.inspection.onnx_wire import read_graph
        >>> dla_refusals(read_graph("out/tiny/model.onnx")).startswith("it has no layer for")
        True
    """
    counts = collections.Counter(node.op for node in graph.nodes if node.op not in _TAKEN or node.domain)
    if not counts:
        return ""
    return "it has no layer for " + ", ".join(f"{count} {op}" for op, count in counts.most_common())
