"""What of a node or a constant has to be equal for two graphs, or two blocks of one, to compute the same."""

from typing import Any

import onnx


def attributes_key(node: Any) -> tuple[bytes, ...]:
    """The attributes of an onnx.NodeProto, in any order."""
    return tuple(sorted(attribute.SerializeToString(deterministic=True) for attribute in node.attribute))


def is_stored(tensor: Any) -> bool:
    """Whether an onnx.TensorProto holds its numbers itself, and not in a file beside the graph."""
    return tensor.data_location != onnx.TensorProto.EXTERNAL


def content_key(tensor: Any, name: str) -> bytes | str:
    """The numbers of an onnx.TensorProto, or its name if they lie in a file."""
    return onnx.numpy_helper.to_array(tensor).tobytes() if is_stored(tensor) else name
