"""Query, key and value as one product, and the attention scale inside the query's weights: spellings that some TensorRT run faster."""

import numpy as np
import onnx_ir as ir

from vit_convert.export.weights import Weight, add_weight, concatenate, weight_of


def _dense_after(value: ir.Value) -> list[tuple[ir.Node, ir.Node]]:
    """The (MatMul, Add) pairs of the dense layers that read a value."""
    pairs = []
    for matmul, _ in value.uses():
        if matmul.op_type != "MatMul" or weight_of(matmul.inputs[1]) is None:
            continue
        users = [user for user, _ in matmul.outputs[0].uses()]
        if len(users) == 1 and users[0].op_type == "Add" and weight_of(users[0].inputs[1]) is not None:
            pairs.append((matmul, users[0]))
    return pairs


def merge_qkv(model: ir.Model) -> int:
    """Merges each attention's three dense layers on one input into one MatMul, one Add and a Split, in place.

    Args:
        model: the graph; weights described and not computed.

    Returns:
        How many attentions were merged.
    """
    graph, merged = model.graph, 0
    values = [*graph.inputs, *(value for node in graph for value in node.outputs)]
    for value in values:
        pairs = _dense_after(value)
        names = [str(matmul.inputs[1].name).rsplit("/", 2)[-2:] for matmul, _ in pairs]  # type: ignore[union-attr]
        if [name[0] for name in names] != ["query", "key", "value"]:
            continue
        kernels = [matmul.inputs[1] for matmul, _ in pairs]
        biases = [add.inputs[1] for _, add in pairs]
        scope = str(kernels[0].name).rsplit("/", 2)[0]  # type: ignore[union-attr]
        kernel = add_weight(graph, f"{scope}/qkv/kernel", concatenate([_weight(k) for k in kernels], axis=1))
        bias = add_weight(graph, f"{scope}/qkv/bias", concatenate([_weight(b) for b in biases], axis=0))
        last = pairs[-1][1]
        matmul = ir.Node("", "MatMul", [value, kernel], num_outputs=1)
        add = ir.Node("", "Add", [matmul.outputs[0], bias], num_outputs=1)
        attributes = [ir.AttrInt64("axis", len(value.shape or ()) - 1)]
        if model.opset_imports[""] >= 18:
            attributes.append(ir.AttrInt64("num_outputs", 3))
        split = ir.Node("", "Split", [add.outputs[0]], attributes, num_outputs=3)
        first = pairs[0][0]
        for node in (matmul, add, split):
            graph.insert_before(first, node)
        for (_, old), new in zip(pairs, split.outputs):
            new.shape, new.type = old.outputs[0].shape, old.outputs[0].type
            ir.convenience.replace_all_uses_with(old.outputs[0], new)
        assert last is not None
        for old_matmul, old_add in pairs:
            graph.remove([old_add, old_matmul], safe=True)
        for old in (*kernels, *biases):
            assert old is not None and old.name is not None
            graph.initializers.pop(old.name)
        merged += 1
    return merged


def _weight(value: ir.Value | None) -> Weight:
    weight = weight_of(value)
    assert weight is not None
    return weight


def fold_scale(model: ir.Model) -> int:
    """Multiplies the attention scale into the query's kernel and bias, in place: exact where the scale is a power of two.

    Args:
        model: the graph with the scale on the query, before any merging.

    Returns:
        How many scales went away.
    """
    graph, folded = model.graph, 0
    for node in list(graph):
        if node.op_type != "Mul" or node.inputs[1] is None or node.inputs[1].const_value is None or node.inputs[1].const_value.size != 1:
            continue
        reshape = node.inputs[0].producer() if node.inputs[0] is not None else None
        add = reshape.inputs[0].producer() if reshape is not None and reshape.op_type == "Reshape" and reshape.inputs[0] is not None else None
        matmul = add.inputs[0].producer() if add is not None and add.op_type == "Add" and add.inputs[0] is not None else None
        if add is None or matmul is None or matmul.op_type != "MatMul" or weight_of(matmul.inputs[1]) is None or weight_of(add.inputs[1]) is None:
            continue
        scale = np.float32(node.inputs[1].const_value.numpy().reshape(()))
        for owner, index in ((matmul, 1), (add, 1)):
            old = owner.inputs[index]
            assert old is not None and old.name is not None
            weight = _weight(old)
            graph.initializers.pop(old.name)
            new = add_weight(graph, old.name, weight.then(weight.shape, lambda a, scale=scale: a * scale))
            owner.replace_input_with(index, new)
        ir.convenience.replace_all_uses_with(node.outputs[0], node.inputs[0])
        graph.remove(node, safe=True)
        folded += 1
    return folded
