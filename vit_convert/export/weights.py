"""Weights on their way from the checkpoint to external data: only described while the graph changes, and computed one
by one when it is saved."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from vit_convert.core.errors import ExportError

_META = "vit_convert.weight"


@dataclasses.dataclass(frozen=True)
class Weight:
    """How to compute an initializer from parameters of the checkpoint.

    Attributes:
        sources: names of the parameters, nearly always just one.
        shape: shape of the result.
        compute: makes the result from the parameters; a view where possible.
        num_read: number of elements in all parameters together, if it differs from that of the result.
    """

    sources: tuple[str, ...]
    shape: tuple[int, ...]
    compute: Callable[..., np.ndarray]
    num_read: int | None = None

    def then(self, shape: tuple[int, ...], step: Callable[[np.ndarray], np.ndarray]) -> "Weight":
        """The weight after one more step."""
        return Weight(self.sources, shape, lambda *parameters: step(self.compute(*parameters)), self.num_read)


def concatenate(weights: Sequence[Weight], axis: int) -> Weight:
    """Several weights side by side."""
    shape = list(weights[0].shape)
    shape[axis] = sum(weight.shape[axis] for weight in weights)
    counts = [len(weight.sources) for weight in weights]

    def compute(*parameters: np.ndarray) -> np.ndarray:
        rest = iter(parameters)
        parts = [weight.compute(*itertools.islice(rest, count)) for weight, count in zip(weights, counts)]
        return np.concatenate(parts, axis)

    return Weight(tuple(source for weight in weights for source in weight.sources), tuple(shape), compute)


def describe(model: ir.Model) -> None:
    """Marks every initializer without a value as the parameter with its name."""
    for value in model.graph.initializers.values():
        if value.const_value is None:
            assert value.name is not None and value.shape is not None
            value.meta[_META] = Weight((value.name,), value.shape.numpy(), lambda parameter: parameter)


def weight_of(value: ir.Value | None) -> Weight | None:
    """The description of a weight; None for anything else."""
    return None if value is None else value.meta.get(_META)


def add_weight(graph: ir.Graph, name: str, weight: Weight) -> ir.Value:
    """Adds an initializer that is computed when the model is saved.

    Args:
        graph: gets the initializer.
        name: its name; a suffix is added when the name is taken by another weight.
        weight: what it holds.

    Returns:
        The new value.
    """
    value = ir.Value(name=_unique(graph, name), type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(weight.shape))
    value.meta[_META] = weight
    graph.initializers.add(value)
    return value


def replace_weight(graph: ir.Graph, old: ir.Value, weight: Weight) -> ir.Value:
    """Adds a replacement for one reader of a weight, under the weight's own name if nobody else reads the old one.

    Args:
        graph: gets the initializer.
        old: a weight that the reader still reads.
        weight: the replacement.

    Returns:
        The new value.
    """
    assert old.name is not None
    if len(old.uses()) == 1:
        graph.initializers.pop(old.name)
    return add_weight(graph, old.name, weight)


def convolution_kernel(weight: Weight) -> Weight:
    """A matrix [K, N] as the kernel of a 1 × 1 convolution: [N, K, 1, 1]."""
    rows, columns = weight.shape
    return weight.then((columns, rows, 1, 1), lambda matrix: matrix.T.reshape(columns, rows, 1, 1))


def add_constant(graph: ir.Graph, name: str, value: np.ndarray | Sequence[int]) -> ir.Value:
    """Adds an initializer whose value is known; numbers that are not an array become int64, as for shapes and axes."""
    tensor = ir.tensor(np.asarray(value))
    constant = ir.Value(
        name=_unique(graph, name), type=ir.TensorType(tensor.dtype), shape=ir.Shape(np.shape(value)), const_value=tensor
    )
    graph.initializers.add(constant)
    return constant


def _unique(graph: ir.Graph, name: str) -> str:
    unique, n = name, 1
    while unique in graph.initializers:
        unique, n = f"{name}.{n}", n + 1
    return unique


def fold_weights(model: ir.Model) -> int:
    """Folds Reshape and Transpose of a weight into the weight, in place.

    Args:
        model: the graph; weights are described, not computed.

    Returns:
        The number of nodes removed.
    """
    folded = 0
    for node in list(model.graph):
        weight = weight_of(node.inputs[0]) if node.inputs else None
        if weight is None or node.op_type not in ("Reshape", "Transpose"):
            continue
        if node.op_type == "Reshape":
            target = node.inputs[1]
            if target is None or target.const_value is None:
                continue
            probe = np.broadcast_to(np.float32(0), weight.shape).reshape(target.const_value.numpy())
            shape = probe.shape
            folded_weight = weight.then(shape, functools.partial(np.reshape, shape=shape))
        else:
            perm = tuple(node.attributes["perm"].as_ints())
            folded_weight = weight.then(
                tuple(weight.shape[i] for i in perm), functools.partial(np.transpose, axes=perm)
            )
        source = node.inputs[0]
        assert source is not None
        ir.convenience.replace_all_uses_with(node.outputs[0], replace_weight(model.graph, source, folded_weight))
        model.graph.remove(node, safe=True)
        folded += 1
    return folded


def bind(model: ir.Model, params: Mapping[str, np.ndarray]) -> None:
    """Gives every weight its value, lazily: nothing is computed or copied before the model is saved.

    Args:
        model: the graph, changed in place.
        params: the checkpoint's canonical parameters.

    Raises:
        ExportError: a weight's parameter is missing or has another size than was traced.
    """
    # the shapes of a checkpoint's leaves are known without reading or inflating them
    described = getattr(params, "leaves", params)
    for value in model.graph.initializers.values():
        weight = weight_of(value)
        if weight is None:
            continue
        for source in weight.sources:
            if source not in params:
                raise ExportError(f"{source}: traced, but not among the {len(params)} parameters")
        num_read = math.prod(weight.shape) if weight.num_read is None else weight.num_read
        if sum(described[source].size for source in weight.sources) != num_read:
            shapes = ", ".join(f"{source} {described[source].shape}" for source in weight.sources)
            raise ExportError(f"{value.name}: traced with shape {weight.shape}, the checkpoint has {shapes}")

        def compute(weight: Weight = weight, name: str | None = value.name) -> ir.TensorProtocol:
            result = weight.compute(*(np.asarray(params[source]) for source in weight.sources))
            if result.shape != weight.shape:
                raise ExportError(
                    f"{name}: traced with shape {weight.shape}, the parameters {weight.sources} give {result.shape}"
                )
            return ir.tensor(np.ascontiguousarray(result, dtype=np.float32), name=name)

        value.const_value = ir.LazyTensor(
            compute,
            dtype=ir.DataType.FLOAT,
            shape=ir.Shape(weight.shape),
            name=value.name,
        )
