"""Turns a float32 graph into a typed fp16 (or bf16) one: the graph states the precision, so every TensorRT builds the
same thing.

Every node computes in half precision, except islands that stay float32:
- what `keep_fp32` names;
- statistics: a mean and the elementwise arithmetic around it (LayerNorm written in primitives squares and sums values
  of 1e3);
- the normalisation of uint8 pixels by a Mul and an Add, and the interpolation of a position table: few numbers, which
  should be exact;
- nodes that read or write a tensor whose measured range does not fit, and nodes with a weight that does not fit;
- nodes that only move data to such nodes;
- nodes with a graph of their own (Loop, If, Scan), and all in it;
- operators that the opset does not define for the type (Conv in bf16 before opset 22, QuantizeLinear in fp16 before
  opset 19). LayerNormalization itself is typed half with stash_type=1: internally, its statistics are float32. Softmax
  is also typed half: TensorRT's fused attention accumulates it in float32. onnxruntime on the CPU computes most fp16
  operators in float32 and drops the roundings between them, so its error is a lower bound and it shows no overflow:
  pass `amax`, measured in float32, to be safe from overflows.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes.common import LiftConstantsToInitializersPass, RemoveUnusedNodesPass, ShapeInferencePass

from vit_convert.core.layer_names import check_patterns, matches
from vit_convert.quantize.graph import DEQUANTIZED, derived, initializer, names_by_node, node_blocks, read_weight

FP16_MAX = 65504.0
FP16_SMALLEST_NORMAL = 2.0**-14
# Other images exceed a range measured on a few: twice the measured range must fit.
RANGE_LIMIT = FP16_MAX / 2

_ELEMENTWISE = frozenset(
    {"Add", "Sub", "Mul", "Div", "Pow", "Sqrt", "Reciprocal", "Max", "Relu", "Neg", "Cast", "Identity"}
)
_MOVEMENT = frozenset(
    {"Transpose", "Reshape", "Slice", "Gather", "Concat", "Split", "Expand", "Squeeze", "Unsqueeze", "Identity"}
)
_REDUCTIONS = frozenset({"ReduceMean", "ReduceSum", "ReduceSumSquare", "ReduceL2"})


@dataclasses.dataclass(frozen=True)
class TypedModel:
    """A typed graph and how it was made.

    Attributes:
        model: the graph; weights are cast one by one while it is saved.
        islands: for each node (first output's name) that stays float32, why.
        overflowing: for each weight beyond the type's range, its largest |w|.
        num_subnormal: number of non-zero weights that are below the type's smallest normal value and lose digits.
        num_casts: Cast nodes in the graph.
    """

    model: ir.Model
    islands: dict[str, str]
    overflowing: dict[str, float]
    num_subnormal: int
    num_casts: int


def to_fp16(
    model: ir.Model, *, keep_fp32: Sequence[str] = (), amax: Mapping[str, float] | None = None, io_fp32: bool = True
) -> TypedModel:
    """Types a graph fp16.

    Args:
        model: a float32 graph, with or without Q/DQ pairs; left as it is.
        keep_fp32: patterns of what stays float32: blocks ("block_03"), layers ("block_03/fc2"), scopes or fnmatch
            patterns.
        amax: measured largest |x| of activations (`Calibration.amax`); those above RANGE_LIMIT stay float32.
        io_fp32: keep the graph's inputs and outputs float32, each with one cast; False types them fp16 too.

    Returns:
        The TypedModel.

    Raises:
        UsageError: a pattern matches nothing.
    """
    return _Typing(model, ir.DataType.FLOAT16, keep_fp32, amax or {}, io_fp32).run()


def to_bf16(model: ir.Model, *, keep_fp32: Sequence[str] = (), io_fp32: bool = True) -> TypedModel:
    """Types a graph bf16, whose range is float32's; see `to_fp16`. Before opset 22 Conv stays float32."""
    return _Typing(model, ir.DataType.BFLOAT16, keep_fp32, {}, io_fp32).run()


class _Typing:
    def __init__(
        self, model: ir.Model, half: ir.DataType, keep_fp32: Sequence[str], amax: Mapping[str, float], io_fp32: bool
    ):
        self._model = model.clone()
        self._graph = self._model.graph
        self._half = half
        self._floats = (ir.DataType.FLOAT, half)
        self._keep_fp32 = keep_fp32
        self._amax = amax
        self._io_fp32 = io_fp32
        self._overflowing: dict[str, float] = {}
        self._num_subnormal = 0
        self._casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        self._half_copies: dict[ir.Value, ir.Value] = {}

    def run(self) -> TypedModel:
        LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(self._model)
        if any(v.dtype is None for node in self._graph for v in node.outputs):
            ShapeInferencePass()(self._model)
        self._scan_weights()
        islands = self._islands()
        for value in list(self._graph.initializers.values()):
            self._type_weight(value, islands)
        io_dtype = ir.DataType.FLOAT if self._io_fp32 else self._half
        for value in self._graph.inputs:
            if value.dtype == ir.DataType.FLOAT:
                value.type = ir.TensorType(io_dtype)  # not value.dtype: clones share the type object
        for node in list(ir.traversal.RecursiveGraphIterator(self._graph)):
            self._type(node, ir.DataType.FLOAT if node in islands else self._half)
        for index, value in enumerate(self._graph.outputs):
            if value.dtype in self._floats and value.dtype != io_dtype:
                self._output(index, value, io_dtype)
        RemoveUnusedNodesPass()(self._model)
        num_casts = sum(node.op_type == "Cast" for node in self._graph)
        reasons = {node.outputs[0].name or "": reason for node, reason in islands.items() if node.graph is self._graph}
        return TypedModel(self._model, reasons, self._overflowing, self._num_subnormal, num_casts)

    def _scan_weights(self) -> None:
        if self._half != ir.DataType.FLOAT16:
            return
        for value in self._graph.initializers.values():
            if value.dtype == ir.DataType.FLOAT and value.const_value is not None:
                largest, num_subnormal = read_weight(value.const_value, _largest_and_subnormal)
                self._num_subnormal += num_subnormal
                if largest > FP16_MAX:
                    self._overflowing[value.name or ""] = largest

    def _islands(self) -> dict[ir.Node, str]:
        """Decides which nodes stay float32, and why."""
        names = names_by_node(self._graph, node_blocks(self._graph))
        check_patterns("keep_fp32", self._keep_fp32, set().union(*names.values()))
        statistics, normalization = _statistics(self._graph), _normalization(self._graph)
        opset = self._model.opset_imports[""]
        islands: dict[ir.Node, str] = {}
        for node in self._graph:
            if matches(self._keep_fp32, names[node]):
                islands |= dict.fromkeys((node, *_within(node)), "keep_fp32")
            elif node in statistics:
                islands[node] = "statistics"
            elif node in normalization:
                islands[node] = "normalises pixels"
            elif node.op_type == "Resize":
                islands[node] = "interpolates"
            elif within := _within(node):
                islands |= dict.fromkeys((node, *within), f"{node.op_type} has a graph of its own")
            elif (
                value := next(
                    (v for v in (*node.inputs, *node.outputs) if v is not None and self._range(v) > RANGE_LIMIT), None
                )
            ) is not None:
                islands[node] = f"{value.name} reaches {self._range(value):.3g}"
            elif weight := next((v.name for v in node.inputs if v is not None and v.name in self._overflowing), None):
                islands[node] = f"{weight} reaches {self._overflowing[weight]:.3g}"
            elif not _defined_for(node, self._half, opset):
                islands[node] = f"{node.op_type} has no {self._half.name} in opset {opset}"
        for node in reversed(self._graph):
            readers = [use.node for output in node.outputs for use in output.uses()]
            if (
                node.op_type in _MOVEMENT
                and node not in islands
                and readers
                and all(reader in islands for reader in readers)
            ):
                islands[node] = "feeds only float32"
        return islands

    def _range(self, value: ir.Value) -> float:
        return self._amax.get((value.name or "").removesuffix(DEQUANTIZED), 0.0)

    def _type(self, node: ir.Node, dtype: ir.DataType) -> None:
        """Gives one node its type: inputs of another type are cast, and float outputs follow."""
        if node.op_type == "Cast":
            if node.attributes["to"].as_int() == ir.DataType.FLOAT:
                node.attributes["to"] = ir.AttrInt64("to", dtype)
                node.outputs[0].type = ir.TensorType(dtype)
            return
        reads_float = False
        for index, value in enumerate(node.inputs):
            if value is not None and value.dtype in self._floats:
                node.replace_input_with(index, self._as(value, dtype))
                reads_float = True
        for value in node.outputs:
            if value.dtype == ir.DataType.FLOAT and reads_float:
                value.type = ir.TensorType(dtype)

    def _as(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """Returns the value in a type: itself, another copy of a weight, or the output of the one Cast that all its
        readers share."""
        if value.dtype == dtype:
            return value
        if value in self._half_copies:
            return self._half_copies[value]
        if (value, dtype) not in self._casts:
            name = f"{value.name}/{dtype.name.lower()}"
            cast = ir.node("Cast", [value], {"to": dtype}, name=name)
            result = cast.outputs[0]
            result.name, result.dtype, result.shape = name, dtype, value.shape
            self._insert(cast, value.producer())
            self._casts[value, dtype] = result
        return self._casts[value, dtype]

    def _type_weight(self, value: ir.Value, islands: Mapping[ir.Node, str]) -> None:
        """Casts a weight in place, or adds a half copy if islands read it as well."""
        tensor = value.const_value
        in_half = [use.node not in islands for use in value.uses()]
        if value.dtype != ir.DataType.FLOAT or tensor is None or not any(in_half):
            return
        name = value.name if all(in_half) else f"{value.name}/{self._half.name.lower()}"
        cast = derived(tensor, self._half, lambda weight: weight.astype(self._half.numpy()), name or "")
        if all(in_half):
            value.const_value, value.type = cast, ir.TensorType(self._half)
        else:
            self._half_copies[value] = initializer(self._graph, cast)

    def _output(self, index: int, value: ir.Value, dtype: ir.DataType) -> None:
        """Casts an output, which keeps its name."""
        name, value.name = value.name, f"{value.name}/inner"
        cast = ir.node("Cast", [value], {"to": dtype}, name=f"{name}/Cast")
        result = cast.outputs[0]
        result.name, result.dtype, result.shape = name, dtype, value.shape
        self._insert(cast, value.producer())
        self._graph.outputs[index] = result

    def _insert(self, node: ir.Node, after: ir.Node | None) -> None:
        if after is not None:
            self._graph.insert_after(after, node)
        else:
            self._graph.insert_before(self._graph[0], node)


def _within(node: ir.Node) -> list[ir.Node]:
    """The nodes in a node's own graphs, at any depth."""
    graphs: list[ir.Graph] = []
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            graphs.append(attribute.as_graph())
        elif attribute.type == ir.AttributeType.GRAPHS:
            graphs.extend(attribute.as_graphs())
    return [inner for graph in graphs for inner in ir.traversal.RecursiveGraphIterator(graph)]


def _largest_and_subnormal(weight: np.ndarray) -> tuple[float, int]:
    magnitude = np.abs(weight)
    return float(magnitude.max(initial=0.0)), int(
        np.count_nonzero((magnitude < FP16_SMALLEST_NORMAL) & (magnitude > 0))
    )


def _statistics(graph: ir.Graph) -> set[ir.Node]:
    """Finds means (of any axis), the squares that feed them and the elementwise nodes that follow: primitive LayerNorm
    up to its bias."""
    found: set[ir.Node] = set()
    for node in graph:
        if node.op_type in _REDUCTIONS:
            found.add(node)
            source = node.inputs[0].producer() if node.inputs[0] is not None else None
            if source is not None and (
                source.op_type == "Pow" or (source.op_type == "Mul" and source.inputs[0] is source.inputs[1])
            ):
                found.add(source)
        elif node.op_type in _ELEMENTWISE and any(producer in found for producer in node.predecessors()):
            found.add(node)
    return found


def _normalization(graph: ir.Graph) -> set[ir.Node]:
    """Finds the Cast, Mul and Add that normalise uint8 pixels."""
    found: set[ir.Node] = set()
    for node in graph:
        before = node.predecessors()
        if node.op_type == "Mul" and any(p.op_type == "Cast" and p.inputs[0] in graph.inputs for p in before):
            found |= {node, *before}
        elif node.op_type == "Add" and any(p in found for p in before):
            found.add(node)
    return found


@functools.cache
def _allowed(op_type: str, opset: int) -> tuple[tuple[frozenset[str], ...], tuple[frozenset[str], ...]]:
    schema = onnx.defs.get_schema(op_type, opset)
    return tuple(frozenset(p.types) for p in schema.inputs), tuple(frozenset(p.types) for p in schema.outputs)


def _defined_for(node: ir.Node, dtype: ir.DataType, opset: int) -> bool:
    """Whether the operator's schema allows a type wherever this node has float32."""
    wanted = f"tensor({dtype.name.lower()})"
    for values, types in zip((node.inputs, node.outputs), _allowed(node.op_type, opset)):
        for index, value in enumerate(values):
            # The last parameter of a variadic operator stands for all further ones.
            if (
                value is not None
                and value.dtype == ir.DataType.FLOAT
                and wanted not in types[min(index, len(types) - 1)]
            ):
                return False
    return True
