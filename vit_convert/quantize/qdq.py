"""Writes Q/DQ pairs into a graph: symmetric int8 or fp8, per tensor for activations and per output channel for
weights."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import ml_dtypes
import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from vit_convert.core.dialect import Dialect, dialect_named
from vit_convert.core.errors import CalibrationError, UsageError, nearest
from vit_convert.quantize.calibrate import Calibration
from vit_convert.quantize.graph import DEQUANTIZED, derived, initializer, read_weight
from vit_convert.quantize.guard import Shift
from vit_convert.quantize.placement import Site
from vit_convert.quantize.shift import SHIFTED, add_back, add_to_bias, fold_into_producers, subtract

INT8_MAX = 127  # -128 is not used, so that the range is symmetric
E4M3_MAX = 448


@dataclasses.dataclass(frozen=True)
class Format:
    """A type to quantize to.

    Attributes:
        dtype: its ONNX type.
        largest: the number that the largest |x| becomes: scale = amax / largest.
        min_opset: the first opset whose QuantizeLinear supports the type.
        encode: maps x / scale, float32, to the type.
    """

    dtype: ir.DataType
    largest: int
    min_opset: int
    encode: Callable[[np.ndarray], np.ndarray]


FORMATS = {
    # rint rounds half to even, as QuantizeLinear does.
    "int8": Format(ir.DataType.INT8, INT8_MAX, 13, lambda x: np.clip(np.rint(x), -INT8_MAX, INT8_MAX).astype(np.int8)),
    "fp8": Format(
        ir.DataType.FLOAT8E4M3FN,
        E4M3_MAX,
        19,
        lambda x: np.clip(x, -E4M3_MAX, E4M3_MAX).astype(ml_dtypes.float8_e4m3fn),
    ),
}


def quantize(
    model: ir.Model,
    calibration: Calibration,
    sites: Sequence[Site],
    *,
    target: str,
    precision: str = "int8",
    shift_biases: bool = True,
) -> ir.Model:
    """Puts a Q/DQ pair on every site.

    A tensor has one pair, shared by all sites that read it; other readers (the residual stream) keep the unquantized
    tensor. Zero points are explicit everywhere: TensorRT 8.6 demands them, and without one, QuantizeLinear means uint8.
    A weight becomes an int8 or fp8 initializer with DequantizeLinear; for a dialect that cannot store those, it stays
    fp32 with a pair of its own. Scales for the other dialects are fp16 values (rounded up), so that the FP16 pass keeps
    them exactly. If calibration shifts a tensor, its int8 pair quantizes the difference (`shift`), and the biases of
    its readers add the constant times the sums of the quantized weights. FP8 uses each tensor's whole range
    (`Calibration.amax`): its steps shrink with the value, so clipping would gain nothing. Weights are read one by one,
    now for their scales and again when the model is saved.

    Args:
        model: the fp32 graph; left as it is.
        calibration: ranges for every site's tensor.
        sites: what `placement.place` chose.
        target: name of the dialect that the graph is for.
        precision: int8 or fp8 (E4M3).
        shift_biases: False adds each constant right after the pair instead, so that any reader gets the plain tensor.

    Returns:
        A new model; unchanged weights are shared with the given one.

    Raises:
        CalibrationError: a site's tensor has no range.
        UsageError: the graph's opset does not suit the target or the precision, or there is no such precision.

    Source: NVIDIA TensorRT developer guide, "Explicit quantization": symmetric, scale = amax / 127; Micikevicius et
    al., "FP8 Formats for Deep Learning", arXiv:2209.05433: E4M3 reaches 448.
    """
    if precision not in FORMATS:
        raise UsageError(
            f"precision {precision!r} is not quantized.{nearest(precision, FORMATS)}",
            fix=f"Use {' or '.join(FORMATS)}.",
        )
    dialect, opset, number = dialect_named(target), model.opset_imports[""], FORMATS[precision]
    if precision not in dialect.precisions:
        raise UsageError(f"target {dialect.name} reads no {precision} graph", fix="Use int8, or TensorRT 10 or later.")
    if dialect.max_opset and opset > dialect.max_opset:
        raise UsageError(
            f"target {dialect.name} reads opset {dialect.max_opset} at most, the graph has {opset}",
            fix=f"Export with target={dialect.name}.",
        )
    if opset < number.min_opset:
        raise UsageError(
            f"{precision} needs opset {number.min_opset}, the graph has {opset}",
            fix="Export with target=trt10, trt11 or rtx.",
        )
    ranges = calibration.amax if precision == "fp8" else calibration.thresholds
    model = model.clone()
    writer = _Writer(model.graph, number, dialect)
    values = {v.name: v for node in model.graph for v in node.outputs} | {v.name: v for v in model.graph.inputs}
    missing = [s for s in sites if s.amax is None and s.tensor not in ranges]
    if missing:
        raise CalibrationError(
            f"{missing[0].name}: no range for {missing[0].tensor}",
            fix="Calibrate again; the calibration is of another placement.",
        )

    shifts = calibration.shifts if precision == "int8" else {}
    dequantized: dict[str, ir.Value] = {}
    for site in sites:
        node = values[site.node].producer()
        assert node is not None
        if site.tensor not in dequantized:
            threshold = ranges[site.tensor] if site.amax is None else site.amax
            shift = shifts.get(site.tensor)
            dequantized[site.tensor] = writer.activation(values[site.tensor], threshold, shift, back=not shift_biases)
        if shift_biases and site.tensor in shifts and site.weight:
            sums = writer.weight_sums(model.graph.initializers[site.weight])
            add_to_bias(model.graph, node, np.float32(shifts[site.tensor].offset) * sums)
        _replace(node, site.tensor, dequantized[site.tensor])
        if site.weight and site.weight not in dequantized:
            dequantized[site.weight] = writer.weight(model.graph.initializers[site.weight], node)
        if site.weight:
            _replace(node, site.weight, dequantized[site.weight])
    if shift_biases:
        fold_into_producers(model.graph, [name for name in shifts if name in dequantized])
    RemoveUnusedNodesPass()(model)
    return model


def weight_scales(weight: np.ndarray, largest: int = INT8_MAX) -> np.ndarray:
    """Computes a weight's scales.

    Args:
        weight: [K, N] of a matrix product or [N, K, ...] of a convolution, float.
        largest: the number that the largest |w| of an output channel becomes: 127 for int8, 448 for fp8.

    Returns:
        [N] float32, amax / largest of each output channel; 1 for an all-zero channel.
    """
    inputs = tuple(axis for axis in range(weight.ndim) if axis != channel_axis(weight.ndim))
    amax = np.maximum(weight.max(axis=inputs), -weight.min(axis=inputs)).astype(np.float32)
    return np.where(amax > 0, amax / np.float32(largest), np.float32(1))


def channel_axis(rank: int) -> int:
    """The axis of a weight's output channels: the last of a matrix product's, the first of a convolution's."""
    return 1 if rank == 2 else 0


def round_up_to_fp16(scale: np.ndarray) -> np.ndarray:
    """Returns the smallest fp16 values that are not below the given float32 ones, as float32."""
    half = scale.astype(np.float16)
    low = half.astype(np.float32) < scale
    return np.where(low, np.nextafter(half, np.float16(np.inf)), half).astype(np.float32)


def _replace(node: ir.Node, name: str, value: ir.Value) -> None:
    for index, old in enumerate(node.inputs):
        if old is not None and old.name == name:
            node.replace_input_with(index, value)


class _Writer:
    """Adds pairs to one graph."""

    def __init__(self, graph: ir.Graph, number: Format, dialect: Dialect):
        self._graph = graph
        self._number = number
        self._stores_weights = dialect.stores_quantized_weights

    def activation(self, x: ir.Value, amax: float, shift: Shift | None = None, *, back: bool = False) -> ir.Value:
        """One pair after x, with one scale; returns what the sites read instead of x. For a shifted x, that is the
        difference, or x with the constant restored."""
        read, nodes = (x, []) if shift is None else subtract(self._graph, x, shift.offset)
        amax = amax if shift is None else shift.threshold
        # A tensor that is zero on all calibration images has no range of its own.
        scale = np.float32(amax or 1.0) / np.float32(self._number.largest)
        pair, result = self._pair(x, self._scales(np.asarray(scale)), {}, read)
        if shift is not None and back:
            name, result.name = result.name, f"{x.name}{SHIFTED}{DEQUANTIZED}"
            result, added = add_back(self._graph, x, result, name or "")
            pair = [*pair, added]
        pair = [*nodes, *pair]
        if (producer := x.producer()) is not None:
            self._graph.insert_after(producer, pair)
        else:
            self._graph.insert_before(self._graph[0], pair)
        return result

    def weight(self, w: ir.Value, reader: ir.Node) -> ir.Value:
        """A channel-wise pair on w, or its quantized values with DequantizeLinear; returns what the reader gets instead
        of w."""
        tensor, number = w.const_value, self._number
        assert tensor is not None
        scales = self._scales(read_weight(tensor, functools.partial(weight_scales, largest=number.largest)))
        axis = {"axis": channel_axis(len(tensor.shape))}
        if not self._stores_weights:
            nodes, result = self._pair(w, scales, axis)
        else:
            name = f"{w.name}/{number.dtype.name.lower()}"
            along = scales if len(tensor.shape) == 2 else scales.reshape(-1, *[1] * (len(tensor.shape) - 1))
            stored = derived(tensor, number.dtype, lambda weight: number.encode(weight / along), name)
            node, result = self._dequantize(initializer(self._graph, stored), w, self._scale_inputs(w, scales), axis)
            nodes = [node]
        self._graph.insert_before(reader, nodes)
        return result

    def weight_sums(self, w: ir.Value) -> np.ndarray:
        """The sum of each output channel of the quantized weight: [N] float32."""
        tensor, number = w.const_value, self._number
        assert tensor is not None

        def sums(weight: np.ndarray) -> np.ndarray:
            scales = self._scales(weight_scales(weight, number.largest))
            axes = tuple(axis for axis in range(weight.ndim) if axis != channel_axis(weight.ndim))
            quantized = number.encode(weight / np.expand_dims(scales, axes)).astype(np.float64)
            return (quantized.sum(axis=axes) * scales).astype(np.float32)

        return read_weight(tensor, sums)

    def _scales(self, scales: np.ndarray) -> np.ndarray:
        return round_up_to_fp16(scales) if self._stores_weights else scales

    def _pair(
        self, x: ir.Value, scales: np.ndarray, attributes: dict[str, int], read: ir.Value | None = None
    ) -> tuple[list[ir.Node], ir.Value]:
        """The pair named after x, on the given value."""
        parameters = self._scale_inputs(x, scales)
        quantize = ir.node(
            "QuantizeLinear", [x if read is None else read, *parameters], attributes, name=f"{x.name}/QuantizeLinear"
        )
        quantized = quantize.outputs[0]
        quantized.name, quantized.dtype, quantized.shape = f"{x.name}/quantized", self._number.dtype, x.shape
        node, result = self._dequantize(quantized, x, parameters, attributes)
        return [quantize, node], result

    def _dequantize(
        self, q: ir.Value, x: ir.Value, parameters: list[ir.Value], attributes: dict[str, int]
    ) -> tuple[ir.Node, ir.Value]:
        node = ir.node("DequantizeLinear", [q, *parameters], attributes, name=f"{x.name}/DequantizeLinear")
        result = node.outputs[0]
        result.name, result.dtype, result.shape = f"{x.name}{DEQUANTIZED}", ir.DataType.FLOAT, x.shape
        return node, result

    def _scale_inputs(self, x: ir.Value, scales: np.ndarray) -> list[ir.Value]:
        zeros = np.zeros(scales.shape, self._number.dtype.numpy())
        tensors = (
            ir.tensor(scales, name=f"{x.name}/scale"),
            ir.tensor(zeros, dtype=self._number.dtype, name=f"{x.name}/zero_point"),
        )
        return [initializer(self._graph, tensor) for tensor in tensors]
