"""Whether a typed graph is another one but for its types: then it treats the rows of a batch as that one does."""

from typing import Any

import onnx

from vit_convert.checks.node_keys import attributes_key, content_key

_FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
_Key = tuple[Any, ...]


def same_but_for_types(one: Any, other: Any) -> bool:
    """Whether two graphs consist of the same nodes in the same order, connected in the same way, with the same
    attributes, integers, and shapes of floats; Casts to floats and the values of floats do not count.

    Args:
        one, other: onnx.ModelProto, without their weights.
    """
    return _skeleton(one) == _skeleton(other)


def _skeleton(proto: Any) -> tuple[list[_Key], list[_Key]]:
    """The nodes of a graph but for Casts to floats, and where its outputs come from."""
    sources: dict[str, _Key] = {value.name: ("input", value.name) for value in proto.graph.input}
    sources |= {tensor.name: _constant(tensor, tensor.name) for tensor in proto.graph.initializer}
    nodes: list[_Key] = []
    for node in proto.graph.node:
        inputs = [sources.get(name, ("missing", name)) for name in node.input]
        if node.op_type == "Cast" and node.attribute[0].i in _FLOATS:
            sources[node.output[0]] = inputs[0]
        elif node.op_type == "Constant" and node.attribute[0].HasField("t"):
            sources[node.output[0]] = _constant(node.attribute[0].t, node.output[0])
        else:
            sources.update((name, ("node", len(nodes), index)) for index, name in enumerate(node.output))
            nodes.append((node.domain, node.op_type, *attributes_key(node), *inputs))
    return nodes, [(value.name, sources.get(value.name)) for value in proto.graph.output]


def _constant(tensor: Any, name: str) -> _Key:
    if tensor.data_type in _FLOATS:
        return ("floats", *tensor.dims)
    return ("constant", tensor.data_type, *tensor.dims, content_key(tensor, name))
