"""The residual stream of a pre-norm transformer, found in its graph: who writes it, who reads it, along which axis its
channels lie.

It is known by what is done to it, whatever the model's family: values are added to each other, tokens are chosen, put
together or put elsewhere, and all else reads it through LayerNorms. Anything that is not understood ends the search and
says why, so that no weight is changed by half.
"""

import dataclasses
import math
from collections.abc import Collection

import onnx_ir as ir

from vit_convert.core.operators import ADD_NORM, NORM
from vit_convert.quantize.graph import linear_weight
from vit_convert.quantize.guard import is_product

_ALIGNED = ("Add", "Expand")  # as NumPy broadcasts, axes count from the last one
_RESHAPES = ("Reshape", "Squeeze", "Unsqueeze")
_SAME = ("Concat", "Slice", "Identity", "Resize")


class Declined(Exception):
    """Why a stream is not one that we understand, in words."""


@dataclasses.dataclass(frozen=True)
class Constant:
    """A constant that a node reads.

    Attributes:
        node: that reads it.
        index: of the node's input.
        axis: along which its channels of the stream lie.
    """

    node: ir.Node
    index: int
    axis: int


@dataclasses.dataclass(frozen=True)
class Other:
    """What is no linear and reads what a LayerNorm gives, or tokens chosen of it, or their mean.

    Attributes:
        value: that it reads; the graph may give it, too.
        axis: of the value's channels.
        uses: the nodes and which of their inputs it is.
    """

    value: ir.Value
    axis: int
    uses: tuple[tuple[ir.Node, int], ...]


@dataclasses.dataclass(frozen=True)
class Norm:
    """A LayerNorm of the stream.

    Attributes:
        node: the LayerNorm.
        output: what it gives.
        readers: the linears that multiply it, or tokens chosen of it, or their mean, by a weight.
        others: what else reads it.
    """

    node: ir.Node
    output: ir.Value
    readers: tuple[ir.Node, ...]
    others: tuple[Other, ...]


@dataclasses.dataclass(frozen=True)
class Stream:
    """A residual stream.

    Attributes:
        width: how many channels.
        writers: the constants that make it: weights and biases of linears, tables.
        norms: what reads it, in graph order.
    """

    width: int
    writers: tuple[Constant, ...]
    norms: tuple[Norm, ...]


def is_norm(node: ir.Node) -> bool:
    """Whether a node is a LayerNorm."""
    return node.op_type in ("LayerNormalization", ADD_NORM, NORM)


def stream_of(norm: ir.Node, order: Collection[ir.Node]) -> Stream:
    """The stream that a LayerNorm reads.

    Args:
        norm: one for which `is_norm` holds.
        order: all nodes of the graph, in order.

    Raises:
        Declined: something writes or reads it that is not understood.
    """
    x = norm.inputs[0]
    assert x is not None
    search = _Search(x, _norm_axis(norm))
    positions = {node: position for position, node in enumerate(order)}
    norms = sorted(search.norms, key=positions.__getitem__)
    found = [_norm(node, search.width) for node in norms]
    for row in found[:-1]:
        if row.others:
            raise Declined(f"{row.output.name} is read by more than linears")
    if not any(row.readers for row in found):
        raise Declined("no linear reads its LayerNorms")
    return Stream(search.width, tuple(search.writers), tuple(found))


class _Search:
    """Walks from one value to all of its stream, both ways."""

    def __init__(self, start: ir.Value, axis: int):
        self.width = _sizes(start)[axis]
        self.writers: list[Constant] = []
        self.norms: list[ir.Node] = []
        self._axes: dict[ir.Value, int] = {}
        self._waiting: list[ir.Value] = []
        self._add(start, axis)
        while self._waiting:
            value = self._waiting.pop()
            if value.is_graph_output():
                raise Declined(f"{value.name} is an output of the graph")
            self._backwards(value, self._axes[value])
            for node, index in value.uses():
                self._forwards(node, index, value, self._axes[value])

    def _add(self, value: ir.Value, axis: int) -> None:
        if not 0 <= axis < len(_sizes(value)) or _sizes(value)[axis] != self.width:
            raise Declined(f"{value.name} {value.shape} has no {self.width} channels along axis {axis}")
        if value not in self._axes:
            self._axes[value] = axis
            self._waiting.append(value)
        elif self._axes[value] != axis:
            raise Declined(f"{value.name}: its channels lie along axis {axis} and {self._axes[value]}")

    def _backwards(self, value: ir.Value, axis: int) -> None:
        node = value.producer()
        if node is None:
            raise Declined(f"{value.name} is an input of the graph")
        if linear_weight(node) is not None:
            self._linear(node, value, axis)
        elif node.op_type == "Add" or (node.op_type == ADD_NORM and value is node.outputs[0]):
            self._operands(node, 2, axis)
        elif keeps_channels(node):
            self._operands(node, len(node.inputs) if node.op_type == "Concat" else 1, axis)
        else:
            raise Declined(f"{node.op_type} {node.name} writes it")

    def _linear(self, node: ir.Node, value: ir.Value, axis: int) -> None:
        convolution = node.op_type == "Conv"
        grouped = node.attributes.get_int("group", 1) != 1
        if axis != (1 if convolution else len(_sizes(value)) - 1) or grouped:
            raise Declined(f"{node.op_type} {node.name} does not write whole channels")
        if (weight := node.inputs[1]) is None or weight.const_value is None:
            raise Declined(f"{node.op_type} {node.name} is quantized already")
        self.writers.append(Constant(node, 1, 0 if convolution else 1))
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        if bias is not None:
            self._constant(node, 2, bias, len(_sizes(bias)) - 1)

    def _operands(self, node: ir.Node, count: int, axis: int) -> None:
        """What a node makes the stream of, channels along an axis of its output."""
        for index, value in enumerate(node.inputs[:count]):
            before = axis_before(node, index, axis)
            if value is not None and value.const_value is not None:
                self._constant(node, index, value, before)
            elif value is not None:
                self._add(value, before)

    def _constant(self, node: ir.Node, index: int, value: ir.Value, axis: int) -> None:
        sizes = _sizes(value)
        if value.const_value is None or not 0 <= axis < len(sizes) or sizes[axis] != self.width:
            raise Declined(f"{value.name} {value.shape} adds no constant for each of {self.width} channels")
        self.writers.append(Constant(node, index, axis))

    def _forwards(self, node: ir.Node, index: int, value: ir.Value, axis: int) -> None:
        if is_norm(node) and (index == 0 or (node.op_type == ADD_NORM and index == 1)):
            if _norm_axis(node) != axis or math.prod(_sizes(value)[axis:]) != self.width:
                raise Declined(f"{node.name} is not over its channels alone")
            if node not in self.norms:
                self.norms.append(node)
            if node.op_type == ADD_NORM:
                self._add(node.outputs[0], axis)
        elif node.op_type == "Add" or (keeps_channels(node) and (index == 0 or node.op_type == "Concat")):
            self._add(node.outputs[0], axis_after(node, index, axis))
        elif node.op_type != "Shape":
            raise Declined(f"{node.op_type} {node.name} reads it")


def keeps_channels(node: ir.Node) -> bool:
    """Whether a node chooses, repeats or joins tokens, or puts them elsewhere."""
    return node.op_type in (*_SAME, *_RESHAPES, "Expand", "Transpose", "Gather")


def axis_after(node: ir.Node, index: int, axis: int) -> int:
    """Along which axis of a node's output the channels of an input lie.

    Raises:
        Declined: along none.
    """
    before, after = _sizes(node.inputs[index]), _sizes(node.outputs[0])
    if node.op_type == "Transpose":
        return tuple(node.attributes["perm"].as_ints()).index(axis)
    if node.op_type == "Gather" and axis > node.attributes.get_int("axis", 0) % len(before):
        return axis + len(after) - len(before)  # one axis for each of the indices'
    return _axis(node, before, after, axis)


def axis_before(node: ir.Node, index: int, axis: int) -> int:
    """Along which axis of a node's input the channels of its output lie.

    Raises:
        Declined: along none.
    """
    before, after = _sizes(node.inputs[index]), _sizes(node.outputs[0])
    if node.op_type == "Transpose":
        return tuple(node.attributes["perm"].as_ints())[axis]
    if node.op_type == "Gather" and axis > node.attributes.get_int("axis", 0) % len(before) + len(after) - len(before):
        return axis + len(before) - len(after)
    return _axis(node, after, before, axis)


def _axis(node: ir.Node, given: tuple[int, ...], wanted: tuple[int, ...], axis: int) -> int:
    """The axis of the same channels in the other one of a node's input and output."""
    if node.op_type in _RESHAPES:
        behind = math.prod(given[axis + 1 :])
        found = [i for i, size in enumerate(wanted) if size == given[axis] and math.prod(wanted[i + 1 :]) == behind]
        if len(found) != 1 or min(given[axis:]) < 0:
            raise Declined(f"{node.op_type} {node.name} takes its channels apart")
        return found[0]
    if node.op_type in ("Gather", "Concat") and node.attributes.get_int("axis", 0) % len(given) == axis:
        raise Declined(f"{node.op_type} {node.name} chooses or joins channels")
    return axis + len(wanted) - len(given) if node.op_type in _ALIGNED else axis


def _norm(node: ir.Node, width: int) -> Norm:
    output = node.outputs[-1] if node.op_type in (ADD_NORM, NORM) else node.outputs[0]
    if node.op_type == "LayerNormalization" and any(value.uses() for value in node.outputs[1:]):
        raise Declined(f"{node.name}: its mean is read")
    readers: list[ir.Node] = []
    others: list[Other] = []
    _read(output, _norm_axis(node), readers, others)
    for other in others:
        sizes = _sizes(other.value)
        if other.axis != len(sizes) - 1 and not (len(sizes) == 4 and other.axis == 1):
            raise Declined(f"{other.value.name} {other.value.shape} is read by more than linears")
    if any(_sizes(reader.inputs[1])[_input_axis(reader)] != width for reader in readers):
        raise Declined(f"{node.name} is read by a product over other channels")
    return Norm(node, output, tuple(readers), tuple(others))


def _read(value: ir.Value, axis: int, readers: list[ir.Node], others: list[Other]) -> None:
    linears: list[ir.Node] = []
    left: list[tuple[ir.Node, int]] = []
    for node, index in value.uses():
        contracted = 1 if node.op_type == "Conv" else len(_sizes(value)) - 1
        behind = _axis_behind(node, axis) if index == 0 else None
        if index == 0 and linear_weight(node) is not None and is_product(node) and axis == contracted:
            linears.append(node)
        elif behind is not None:
            _read(node.outputs[0], behind, readers, others)
        elif node.op_type != "Shape":
            left.append((node, index))
    if left or value.is_graph_output():  # then linears read what is turned back, too, under the name that it had
        others.append(Other(value, axis, (*left, *((node, 0) for node in linears))))
    else:
        readers += linears


def _axis_behind(node: ir.Node, axis: int) -> int | None:
    """Along which axis the channels lie behind a node that chooses tokens or takes their mean; None behind any
    other."""
    if (axes := _mean_axes(node)) is not None:
        kept = bool(node.attributes.get_int("keepdims", 1))
        return None if axis in axes else axis if kept else axis - sum(other < axis for other in axes)
    if not keeps_channels(node) or node.op_type == "Concat":
        return None
    try:
        return axis_after(node, 0, axis)
    except Declined:
        return None


def _mean_axes(node: ir.Node) -> tuple[int, ...] | None:
    if node.op_type != "ReduceMean" or node.inputs[0] is None:
        return None
    given = node.inputs[1] if len(node.inputs) > 1 else None
    if "axes" in node.attributes:
        axes = tuple(node.attributes["axes"].as_ints())
    elif given is not None and given.const_value is not None:
        axes = tuple(int(axis) for axis in given.const_value.numpy().reshape(-1))
    else:
        return None
    return tuple(axis % len(_sizes(node.inputs[0])) for axis in axes)


def _input_axis(linear: ir.Node) -> int:
    return 1 if linear.op_type == "Conv" else 0


def _norm_axis(node: ir.Node) -> int:
    if node.op_type in (ADD_NORM, NORM):
        return 1
    return node.attributes.get_int("axis", -1) % len(_sizes(node.inputs[0]))


def _sizes(value: ir.Value | None) -> tuple[int, ...]:
    """The sizes of a value; -1 for those that vary."""
    shape = value.shape if value is not None else None
    if value is not None and shape is None and value.const_value is not None:
        return tuple(value.const_value.shape.numpy())
    if value is None or shape is None:
        raise Declined(f"{value.name if value is not None else 'a value'} has no known shape")
    return tuple(size if isinstance(size, int) else -1 for size in shape)
