"""Reads the nodes, types and shapes of an ONNX file without the onnx package, which GPU hosts need not have.

Only the fields that inspection asks for are read; weights stay in their file. Source: onnx/onnx.proto and protobuf's
encoding: a message is a list of (field number, wire type, value).
"""

import dataclasses
import functools
import mmap
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vit_convert.core.errors import BuildError

Shape = tuple[int | str, ...]
DTYPES = {
    1: "float32", 2: "uint8", 3: "int8", 4: "uint16", 5: "int16", 6: "int32", 7: "int64", 8: "string", 9: "bool",
    10: "float16", 11: "float64", 12: "uint32", 13: "uint64", 14: "complex64", 15: "complex128", 16: "bfloat16",
    17: "float8_e4m3fn", 18: "float8_e4m3fnuz", 19: "float8_e5m2", 20: "float8_e5m2fnuz", 21: "uint4", 22: "int4",
    23: "float4_e2m1",
}  # fmt: skip
_BITS = {"float64": 64, "int64": 64, "uint64": 64, "complex64": 64, "complex128": 128, "uint4": 4, "int4": 4}
_BITS |= {"float4_e2m1": 4, **dict.fromkeys(("float32", "int32", "uint32"), 32)}
_BITS |= dict.fromkeys(("float16", "bfloat16", "int16", "uint16"), 16)
_INLINE_BYTES = 1 << 16  # bytes of constants whose values are kept: axes, scales, zero points


@dataclasses.dataclass(frozen=True)
class Value:
    """Type and shape of one value.

    Attributes:
        dtype: numpy's or ml_dtypes' name; "" if the file does not say.
        shape: with a name, or "?", for each dimension that varies; None if the file does not say.
    """

    dtype: str = ""
    shape: Shape | None = None

    def num_bytes(self, sizes: Mapping[str, int]) -> int:
        """Its size in bytes, given the dimensions that vary (1 if not given); 0 if its shape is unknown."""
        if self.shape is None:
            return 0
        count = 1
        for side in self.shape:
            count *= side if isinstance(side, int) else sizes.get(side, 1)
        return (count * _BITS.get(self.dtype, 8) + 7) // 8


@dataclasses.dataclass(frozen=True)
class Node:
    """One node; `attributes` hold ints, floats, strings and lists of them, others as None."""

    name: str
    op: str
    domain: str
    inputs: Sequence[str]
    outputs: Sequence[str]
    attributes: Mapping[str, Any]

    @property
    def label(self) -> str:
        """Its name, or else that of its output."""
        return self.name or next(iter(self.outputs), self.op)

    def input(self, place: int) -> str:
        """The name of an input; "" if there is none, for example in a damaged file."""
        return self.inputs[place] if place < len(self.inputs) else ""

    def output(self, place: int) -> str:
        """The name of an output; "" if there is none."""
        return self.outputs[place] if place < len(self.outputs) else ""


@dataclasses.dataclass(frozen=True)
class Graph:
    """The content of a file.

    Attributes:
        opsets: versions by domain; "" is ONNX's own.
        nodes: in order.
        inputs: of the graph, without its weights.
        outputs: of the graph.
        values: type and shape of all values for which the file gives them, including weights.
        weights: names of the initializers.
        constants: the bytes of the elements of small initializers.
        functions: (domain, name) of model-local functions.
        metadata: properties of the model.
        files: beside this one, which hold weights.
    """

    opsets: Mapping[str, int]
    nodes: Sequence[Node]
    inputs: Sequence[str]
    outputs: Sequence[str]
    values: Mapping[str, Value]
    weights: frozenset[str]
    constants: Mapping[str, bytes]
    functions: frozenset[tuple[str, str]]
    metadata: Mapping[str, str]
    files: frozenset[str] = frozenset()

    def value(self, name: str) -> Value:
        """Type and shape of a value, as far as known."""
        return self.values.get(name, Value())

    @functools.cached_property
    def producers(self) -> dict[str, Node]:
        """The node that makes each value."""
        return {output: node for node in self.nodes for output in node.outputs}


def read_graph(path: str | os.PathLike[str]) -> Graph:
    """Reads an ONNX file.

    Raises:
        BuildError: it cannot be opened, or is not an ONNX file.

    Example:
        >>> read_graph("out/tiny/model.onnx").opsets[""]
        20
    """
    try:
        with open(path, "rb") as file:  # mapped, because it may contain weights, whose pages are never touched
            found = _model(memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)))
    except OSError as e:
        raise BuildError(
            f"{os.fspath(path)}: cannot be read ({e.strerror})", fix="Give an ONNX file or a bundle."
        ) from e
    except (ValueError, IndexError, struct.error, UnicodeDecodeError) as e:
        raise BuildError(f"{os.fspath(path)}: not an ONNX file ({e})", fix="Export it again.") from e
    if not found.nodes or not found.opsets:
        raise BuildError(f"{os.fspath(path)}: holds no graph, or no opset", fix="Give an ONNX file.")
    return found


def _fields(message: Any) -> Iterator[tuple[int, Any]]:
    """The fields of a message: numbers as int, everything else as bytes."""
    data = _bytes(message)
    at, end = 0, len(data)
    while at < end:
        tag, at = _varint(data, at)
        kind = tag & 7
        value: Any
        if kind == 0:
            value, at = _varint(data, at)
        elif kind == 1:
            value, at = data[at : at + 8], at + 8
        elif kind == 5:
            value, at = data[at : at + 4], at + 4
        elif kind == 2:
            size, at = _varint(data, at)
            value, at = data[at : at + size], at + size
        else:
            raise ValueError(f"wire type {kind} at byte {at}")
        if at > end:
            raise ValueError(f"cut short at byte {end}")
        yield tag >> 3, value


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
        if shift > 63:
            raise ValueError(f"a number without an end at byte {at}")


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _bytes(value: Any) -> memoryview:
    """A field that is a message, a text or a fraction; a file that is not ONNX may have a number there."""
    if not isinstance(value, memoryview):
        raise ValueError(f"the number {value} where bytes belong")
    return value


def _number(value: Any) -> int:
    if not isinstance(value, int):
        raise ValueError("bytes where a number belongs")
    return value


def _text(value: Any) -> str:
    return bytes(_bytes(value)).decode("utf-8")


def _packed(value: Any) -> list[int]:
    """Repeated integers, packed into one field or one by one."""
    if isinstance(value, int):
        return [_signed(value)]
    found, at = [], 0
    while at < len(value):
        number, at = _varint(value, at)
        found.append(_signed(number))
    return found


def _model(data: memoryview) -> Graph:
    opsets: dict[str, int] = {}
    metadata: dict[str, str] = {}
    functions = set()
    graph = None
    for number, value in _fields(data):
        if number == 8:
            row = dict(_fields(value))
            opsets[_text(row[1]) if 1 in row else ""] = _number(row.get(2, 0))
        elif number == 7:
            graph = value
        elif number == 14:
            row = dict(_fields(value))
            metadata[_text(row[1]) if 1 in row else ""] = _text(row[2]) if 2 in row else ""
        elif number == 25:
            row = dict(_fields(value))
            functions.add((_text(row[10]) if 10 in row else "", _text(row[1]) if 1 in row else ""))
    opsets = {("" if domain == "ai.onnx" else domain): version for domain, version in opsets.items()}
    nodes: list[Node] = []
    inputs: list[str] = []
    outputs: list[str] = []
    values: dict[str, Value] = {}
    weights: dict[str, bytes | None] = {}
    files = set()
    for number, value in _fields(graph) if graph is not None else ():
        if number == 1:
            nodes.append(_node(value))
        elif number == 5:
            name, found, content = _tensor(value)
            values[name], weights[name] = found, content
            files.add(_location(value))
        elif number in (11, 12, 13):
            name, found = _value_info(value)
            values.setdefault(name, found)
            (inputs if number == 11 else outputs if number == 12 else []).append(name)
    constants = {name: content for name, content in weights.items() if content is not None}
    inputs = [name for name in inputs if name not in weights]
    beside = frozenset(files - {""})
    known = (frozenset(weights), constants, frozenset(functions), metadata, beside)
    return Graph(opsets, nodes, inputs, outputs, values, *known)


def _node(data: memoryview) -> Node:
    inputs, outputs, attributes = [], [], {}
    texts = {3: "", 4: "", 7: ""}
    for number, value in _fields(data):
        if number == 1:
            inputs.append(_text(value))
        elif number == 2:
            outputs.append(_text(value))
        elif number in texts:
            texts[number] = _text(value)
        elif number == 5:
            name, found = _attribute(value)
            attributes[name] = found
    domain = "" if texts[7] == "ai.onnx" else texts[7]
    return Node(texts[3], texts[4], domain, tuple(inputs), tuple(outputs), attributes)


def _attribute(data: memoryview) -> tuple[str, Any]:
    name, found = "", None
    several: list[int] = []
    for number, value in _fields(data):
        if number == 1:
            name = _text(value)
        elif number == 2:
            found = struct.unpack("<f", _bytes(value))[0]
        elif number == 3:
            found = _signed(_number(value))
        elif number == 4:
            found = bytes(_bytes(value)).decode("utf-8", "replace")
        elif number == 8:
            several += _packed(value)
    return name, several or found


def _value_info(data: memoryview) -> tuple[str, Value]:
    name, dtype, shape = "", "", None
    for number, value in _fields(data):
        if number == 1:
            name = _text(value)
        elif number == 2:
            for kind, inner in _fields(value):
                if kind == 1:  # a tensor; TensorRT does not support sequences, maps and optionals
                    dtype, shape = _tensor_type(inner)
    return name, Value(dtype, shape)


def _tensor_type(data: memoryview) -> tuple[str, Shape | None]:
    dtype, shape = "", None
    for number, value in _fields(data):
        if number == 1:
            dtype = DTYPES.get(_number(value), f"type {value}")
        elif number == 2:
            shape = tuple(_side(dict(_fields(side))) for kind, side in _fields(value) if kind == 1)
    return dtype, shape


def _location(data: memoryview) -> str:
    """The file that holds a tensor's values; "" for this one."""
    for number, value in _fields(data):
        if number == 13:
            entry = dict(_fields(value))
            if 1 in entry and _text(entry[1]) == "location":
                return _text(entry[2]) if 2 in entry else ""
    return ""


def _side(row: Mapping[int, Any]) -> int | str:
    return _signed(_number(row[1])) if 1 in row else _text(row[2]) if 2 in row else "?"


def _tensor(data: memoryview) -> tuple[str, Value, bytes | None]:
    name, dtype, shape, content = "", "", [], None
    for number, value in _fields(data):
        if number == 1:
            shape += _packed(value)
        elif number == 2:
            dtype = DTYPES.get(_number(value), f"type {value}")
        elif number == 8:
            name = _text(value)
        elif number == 9 and len(_bytes(value)) <= _INLINE_BYTES:
            content = bytes(value)
        elif number == 5 and not isinstance(value, int) and len(value) <= _INLINE_BYTES and dtype in ("int8", "uint8"):
            content = bytes(number & 255 for number in _packed(value))  # small integers may be stored in wider ones
    return name, Value(dtype, tuple(shape)), content
