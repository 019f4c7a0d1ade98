"""Folds the attention scale into the query's weights: one product fewer, and the form that TensorRT 8.6 runs
fastest."""

import functools

import numpy as np
import onnx_ir as ir

from vit_convert.export.passes.contract import GraphPass, scale_in_weights
from vit_convert.export.weights import Weight, replace_weight, weight_of


def _producer(value: ir.Value | None, op_type: str) -> ir.Node | None:
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == op_type else None


def _weight(value: ir.Value | None) -> Weight:
    weight = weight_of(value)
    assert weight is not None
    return weight


def fold_scale(model: ir.Model) -> int:
    """Multiplies the attention scale into the query's kernel and bias, in place; exact if the scale is a power of two.

    Args:
        model: the graph with the scale on the query; weights described and not computed.

    Returns:
        The number of scales removed.
    """
    graph, folded = model.graph, 0
    for node in list(graph):
        factor = node.inputs[1] if node.op_type == "Mul" else None
        if factor is None or factor.const_value is None or factor.const_value.size != 1:
            continue
        query = node.inputs[0]
        reshape = _producer(query, "Reshape")
        add = _producer(reshape.inputs[0], "Add") if reshape is not None else None
        matmul = _producer(add.inputs[0], "MatMul") if add is not None else None
        if (
            query is None
            or add is None
            or matmul is None
            or weight_of(matmul.inputs[1]) is None
            or weight_of(add.inputs[1]) is None
        ):
            continue
        scale = np.float32(factor.const_value.numpy().reshape(()))
        for owner, index in ((matmul, 1), (add, 1)):
            old = owner.inputs[index]
            assert old is not None
            weight = _weight(old)
            owner.replace_input_with(
                index, replace_weight(graph, old, weight.then(weight.shape, functools.partial(np.multiply, scale)))
            )
        ir.convenience.replace_all_uses_with(node.outputs[0], query)
        graph.remove(node, safe=True)
        folded += 1
    return folded


FOLD_SCALE = GraphPass(fold_scale, ensures=(scale_in_weights,))
