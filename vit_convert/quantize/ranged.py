"""What TensorRT computes from tensor ranges, written out as Q/DQ pairs, so that onnxruntime can check it without a
GPU."""

from collections.abc import Collection

import onnx_ir as ir

from vit_convert.core.operators import ADD_NORM, ATTENTION
from vit_convert.quantize.graph import linear_layers, linear_weight
from vit_convert.quantize.placement import Site


def sites_with_ranges(model: ir.Model, ranged: Collection[str]) -> list[Site]:
    """The places where an engine of the lowering "fused" reads INT8.

    Ranges between a convolution and the activation function after it do not count: TensorRT computes that inside the
    convolution's kernel, in floating point.

    Args:
        model: in that lowering.
        ranged: names of the tensors that have ranges.

    Returns:
        A site for each convolution, attention and residual addition that reads such a tensor, in graph order.
    """
    layers, found = linear_layers(model.graph), []
    for node in model.graph:
        source, weight = node.inputs[0] if node.inputs else None, None
        if source is None or source.name not in ranged:
            continue
        if node.op_type == "Conv" and (value := linear_weight(node)) is not None:
            weight = value.name
        elif node.op_type not in (ATTENTION, ADD_NORM):
            continue
        layer = layers.get(node)
        block, kind = (layer.block, layer.kind) if layer is not None else (node.name or "", node.op_type)
        found.append(Site(block, kind, source.name or "", node.outputs[0].name or "", weight))
    return found
