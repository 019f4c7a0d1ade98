"""A graph without those of its blocks that repeat another one: what depends on the structure alone need not be asked of
all blocks."""

import collections
import dataclasses
from collections.abc import Iterable
from typing import Any

import onnx

from vit_convert.checks.node_keys import attributes_key, content_key, is_stored
from vit_convert.core.layer_names import block_of

_PAIRS = ("QuantizeLinear", "DequantizeLinear")
_FLOATS = (
    onnx.TensorProto.FLOAT,
    onnx.TensorProto.FLOAT16,
    onnx.TensorProto.BFLOAT16,
    onnx.TensorProto.DOUBLE,
    onnx.TensorProto.FLOAT8E4M3FN,
)


@dataclasses.dataclass(frozen=True)
class Shortened:
    """A graph with fewer blocks.

    Attributes:
        proto: its weights stay in the file of the whole graph.
        left_out: the blocks without which it does, by name; each equals the next one but for weights.
    """

    proto: Any
    left_out: tuple[str, ...]


def shortened(proto: Any) -> Shortened | None:
    """Leaves out of each run of equal blocks all but the last.

    Two blocks are equal if they consist of the same nodes, connected in the same way, with the same attributes and
    constants, and with weights of the same shapes. A weight is what is named after its block; one of integers or of
    a single number counts as a constant, but for the scales and zero points of Q/DQ pairs.

    Args:
        proto: a graph in which the output of each block is named after it ("block_03"); left as it is.

    Returns:
        None if no two neighbours are equal, or if something else reads what a block computes.
    """
    if any(attribute.HasField("g") or attribute.graphs for node in proto.graph.node for attribute in node.attribute):
        return None  # a body may read any value
    blocks = _Blocks(proto)
    runs = blocks.runs()
    if not runs:
        return None
    short, left_out = onnx.ModelProto(), []
    short.CopyFrom(proto)
    for first, last in runs:
        before, after = blocks.names[first - 1], blocks.names[last - 1]
        for number in blocks.nodes[last]:
            node = short.graph.node[number]
            node.input[:] = [before if name == after else name for name in node.input]
        left_out += blocks.names[first:last]
    _prune(short.graph)
    if {name for node in short.graph.node for name in node.output} & {*left_out}:
        return None
    return Shortened(short, tuple(left_out))


class _Blocks:
    """The blocks of a graph.

    Args:
        proto: the graph.

    Attributes:
        names: of the blocks, and of their outputs, in order.
        nodes: of each block, the numbers of its nodes: those that read the block before it, or what follows from it.
    """

    def __init__(self, proto: Any):
        self._graph = proto.graph
        self._constants = {tensor.name: tensor for tensor in self._graph.initializer}
        self._producers: dict[str, tuple[int, int]] = {}
        self.names: list[str] = []
        self._block: dict[str, int] = {}  # by value: the last block that it depends on, one beyond for its output
        self._varies = {value.name for value in self._graph.input} - {*self._constants}
        self.nodes: dict[int, list[int]] = collections.defaultdict(list)
        for number, node in enumerate(self._graph.node):
            self._take(number, node)

    def _take(self, number: int, node: Any) -> None:
        block = max((self._block.get(name, 0) for name in node.input), default=0)
        self.nodes[block].append(number)
        if any(name in self._varies for name in node.input):
            self._varies.update(node.output)
        for index, name in enumerate(node.output):
            self._producers[name] = (number, index)
            self._block[name] = block
            if name and block_of(name) == name:
                self.names.append(name)
                self._block[name] = len(self.names)

    def runs(self) -> list[tuple[int, int]]:
        """The first and the last of each run of equal blocks; the first block of all, which contains what precedes the
        blocks, belongs to none."""
        types = {value.name: value.type.SerializeToString() for value in self._graph.value_info}
        found: list[tuple[int, int]] = []
        keys = [None, *(self._key(block) for block in range(1, len(self.names)))]
        for block in range(2, len(self.names)):
            one, other = self.names[block - 2], self.names[block - 1]
            alike = keys[block] == keys[block - 1] and one in types and types[one] == types.get(other)
            if alike and found and found[-1][1] == block - 1:
                found[-1] = (found[-1][0], block)
            elif alike:
                found.append((block - 1, block))
        return found

    def _key(self, block: int) -> tuple[Any, ...]:
        """What a block computes, without its weights."""
        places = {number: place for place, number in enumerate(self.nodes[block])}
        return tuple(self._node_key(self._graph.node[number], block, places) for number in self.nodes[block])

    def _node_key(self, node: Any, block: int, places: dict[int, int]) -> tuple[Any, ...]:
        inputs = tuple(
            self._input_key(name, block, places, is_weight=bool(index) and node.op_type in _PAIRS)
            for index, name in enumerate(node.input)
        )
        ends = tuple(name == self.names[block] for name in node.output)
        return (node.domain, node.op_type, attributes_key(node), inputs, ends)

    def _input_key(self, name: str, block: int, places: dict[int, int], *, is_weight: bool) -> tuple[Any, ...]:
        if name in self._constants:
            return self._constant_key(self._constants[name], block, is_weight=is_weight)
        if name == self.names[block - 1]:
            return ("the block before",)
        number, index = self._producers.get(name, (-1, 0))
        if number in places:
            return ("within", places[number], index)
        if number < 0 or name in self._varies:
            return ("outside", name)
        return ("derived", self._node_key(self._graph.node[number], block, {}), index)

    def _constant_key(self, tensor: Any, block: int, *, is_weight: bool) -> tuple[Any, ...]:
        kind = (tensor.data_type, tuple(tensor.dims))
        if block_of(tensor.name) == self.names[block]:
            single = tensor.data_type not in _FLOATS or max(tensor.dims, default=1) == 1
            if is_weight or not (single and is_stored(tensor)):
                return ("weight", *kind)
        return ("constant", *kind, content_key(tensor, tensor.name))


def _prune(graph: Any) -> None:
    """Removes the nodes and constants from which no output follows."""
    read = {value.name for value in graph.output}
    nodes = []
    for node in reversed(graph.node):
        if read & {*node.output}:
            nodes.append(node)
            read.update(node.input)
    _keep(graph.node, list(reversed(nodes)))
    _keep(graph.initializer, [tensor for tensor in graph.initializer if tensor.name in read])
    produced = {name for node in graph.node for name in node.output}
    _keep(graph.value_info, [value for value in graph.value_info if value.name in produced])


def _keep(field: Any, values: Iterable[Any]) -> None:
    kept = [type(value).FromString(value.SerializeToString()) for value in values]
    del field[:]
    field.extend(kept)
