"""What a precision means for a backend, and whether a graph can honour it."""

import collections
import dataclasses
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from vit_convert.core.errors import BuildError, nearest
from vit_convert.core.layer_names import HOW_TO_NAME, layer_names, matches
from vit_convert.engine.backend.trt import FLOAT_PRECISIONS, PRECISIONS, QUANTIZED_PRECISIONS, Backend
from vit_convert.engine.builder.network import ParsedGraph
from vit_convert.engine.builder.request import BuildRequest


@dataclasses.dataclass(frozen=True)
class TypeCounts:
    """The types of a parsed network, each a count by precision ("fp16": 49).

    Attributes:
        products: of matrix products and convolutions.
        floats: of all floating-point tensors.
        quantized: of QuantizeLinear and DequantizeLinear.
    """

    products: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    floats: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    quantized: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)


def require_precision(backend: Backend, request: BuildRequest) -> None:
    """Refuses what the backend cannot honour, before anything is parsed.

    Args:
        backend: the TensorRT that will build.
        request: what was asked for.

    Raises:
        BuildError: an unknown precision, or one that this backend does not have.
    """
    precision, has_calibrator = request.precision, request.has_calibrator
    here = f"{backend.module.__name__} {backend.version}"
    if precision not in PRECISIONS:
        raise BuildError(
            f"precision {precision!r}: unknown.{nearest(precision, PRECISIONS)}", fix=f"Use {', '.join(PRECISIONS)}."
        )
    if not backend.supports(precision):
        raise BuildError(f"precision {precision}: {here} cannot build it", fix="Use fp16, or TensorRT 10 or later.")
    if has_calibrator and precision != "int8":
        raise BuildError(
            f"precision {precision} with a calibrator: only int8 is calibrated",
            fix="Drop the calibrator, or ask for int8.",
        )
    if has_calibrator and not backend.has_calibrator:
        raise BuildError(f"calibrator: {here} has none", fix="Give it the quantized (Q/DQ) graph instead.")


def builds_strongly_typed(backend: Backend, request: BuildRequest) -> bool:
    """Whether the network keeps the graph's types: if the backend can, except for its own calibration."""
    return backend.strongly_typed and not request.has_calibrator


def count_types(parsed: ParsedGraph) -> TypeCounts:
    """Counts the types of a parsed network."""
    backend = parsed.backend
    trt = backend.module
    products = (
        trt.LayerType.MATRIX_MULTIPLY,
        trt.LayerType.CONVOLUTION,
        trt.LayerType.EINSUM,
        backend.find("LayerType.ATTENTION_INPUT"),
    )
    counts = TypeCounts()
    for layer in parsed.layers:
        for tensor in _outputs(layer):
            if precision := FLOAT_PRECISIONS.get(tensor.dtype.name):
                counts.floats[precision] += 1
                if layer.type in products:
                    counts.products[precision] += 1
        if layer.type in (trt.LayerType.QUANTIZE, trt.LayerType.DEQUANTIZE):
            tensor = layer.get_output(0) if layer.type == trt.LayerType.QUANTIZE else layer.get_input(0)
            # In a weakly typed network, every tensor is FLOAT until it is built, and quantization is always to int8.
            precision = QUANTIZED_PRECISIONS.get(tensor.dtype.name, "other") if backend.strongly_typed else "int8"
            counts.quantized[precision] += 1
    return counts


def require_types(counts: TypeCounts, request: BuildRequest, *, strongly_typed: bool, graph: str) -> None:
    """Refuses a graph whose types do not give the precision asked for: no engine is silently fp32.

    Args:
        counts: what `count_types` found.
        request: what was asked for.
        strongly_typed: whether the engine keeps the graph's types; otherwise fp16 comes from a flag.
        graph: the graph's file name, for the message.

    Raises:
        BuildError: they differ.
    """
    products, floats, quantized = counts.products, counts.floats, counts.quantized
    precision, has_calibrator = request.precision, request.has_calibrator
    found = ", ".join(f"{n} in {p}" for p, n in products.items()) or "none"
    found = f"{graph}: matrix products {found}; Q/DQ nodes {dict(quantized) or 'none'}"
    if precision in QUANTIZED_PRECISIONS.values():
        if has_calibrator and quantized:
            raise BuildError(
                f"{found}; TensorRT ignores the calibrator for such a graph",
                fix="Calibrate the fp32 graph, or build without the calibrator.",
            )
        if not has_calibrator and set(quantized) != {precision}:
            raise BuildError(
                f"{found}; {precision} needs only {precision} ones",
                fix=f"Build from the {precision} graph that quantization writes.",
            )
        return
    if quantized:
        raise BuildError(
            f"{found}; {precision} was asked for",
            fix=f"Build from the {precision} graph, or ask for {' or '.join(quantized)}.",
        )
    if precision == "fp32":
        wrong = {p: n for p, n in floats.items() if p != "fp32"}
        missing = False
    elif strongly_typed:
        wrong = {p: n for p, n in products.items() if p not in (precision, "fp32")}
        missing = not products[precision]
    else:  # a builder flag lowers fp32 to fp16, and the graph may contain fp16 tensors as well
        wrong, missing = {p: n for p, n in floats.items() if p not in (precision, "fp32")}, False
    if wrong or missing:
        raise BuildError(
            f"{found}; {precision} was asked for",
            fix=f"Build from the {precision} graph (precision is a property of the graph).",
        )


def set_weak_precision(parsed: ParsedGraph, builder: Any, builder_config: Any, request: BuildRequest) -> None:
    """Sets the builder flags of a weakly typed build, and the layers that stay in fp32.

    Args:
        parsed: by a TensorRT with precision flags.
        builder: its `Builder`.
        builder_config: the `IBuilderConfig` to change.
        request: for fp32, fp16 or int8.

    Raises:
        BuildError: the GPU does not support the precision, or a pattern matches no layer.
    """
    backend, precision, keep_fp32 = parsed.backend, request.precision, request.keep_fp32
    trt = backend.module
    if precision == "fp32":
        return
    if not (builder.platform_has_fast_int8 if precision == "int8" else builder.platform_has_fast_fp16):
        raise BuildError(
            f"precision {precision}: {backend.gpu.name if backend.gpu else 'this GPU'} has no fast {precision}",
            fix="Use fp32.",
        )
    builder_config.set_flag(backend.find("BuilderFlag.FP16"))
    if precision == "int8":
        builder_config.set_flag(backend.find("BuilderFlag.INT8"))
    if not keep_fp32:
        if request.has_calibrator:
            # some products have no int8 kernel
            builder_config.set_flag(backend.find("BuilderFlag.PREFER_PRECISION_CONSTRAINTS"))
            _prefer_int8(parsed, request.ranges)
        return
    # Constraints are obeyed either all or not at all: then what must stay fp32 does, and int8 is left to the timings.
    builder_config.set_flag(backend.find("BuilderFlag.OBEY_PRECISION_CONSTRAINTS"))
    unmatched = set(keep_fp32)
    for layer in parsed.layers:
        names = layer_names(layer.name)
        matching = [pattern for pattern in keep_fp32 if matches([pattern], names)]
        unmatched.difference_update(matching)
        computed = [
            i
            for i, tensor in enumerate(_outputs(layer))
            if tensor.dtype.name in FLOAT_PRECISIONS and tensor.is_execution_tensor
        ]
        if matching and computed and layer.type != trt.LayerType.CONSTANT:
            layer.precision = trt.DataType.FLOAT
            for i in computed:
                layer.set_output_type(i, trt.DataType.FLOAT)
    if unmatched:
        raise BuildError(
            f"keep_fp32 {', '.join(sorted(unmatched))}: no layer has such a name",
            fix=HOW_TO_NAME,
        )


def set_ranges(parsed: ParsedGraph, ranges: Mapping[str, float]) -> None:
    """Gives tensors of a weakly typed network ranges, so that TensorRT may hold them in int8.

    Args:
        parsed: the graph.
        ranges: by tensor, the |x| that the largest int8 value represents; may be empty.

    Raises:
        BuildError: the network lacks one of the tensors.
    """
    missing = dict(ranges)
    for layer in parsed.layers:
        for tensor in _outputs(layer):
            if (threshold := missing.pop(tensor.name, None)) is not None:
                tensor.set_dynamic_range(-threshold, threshold)
    if missing:
        raise BuildError(
            f"{parsed.graph}: has no tensor {next(iter(missing))}, for which there is a range",
            fix="Calibrate this graph again.",
        )


def _prefer_int8(parsed: ParsedGraph, ranged: Collection[str]) -> None:
    """Asks for int8 in layers with weights: judging by its timings, TensorRT might silently run all of them in fp16.

    These are the graph's convolutions or, if it has none, its products with constants. Other products are attention,
    and stay fp16. If ranges are given, a layer whose input has none was excluded from int8, so int8 is not asked for.
    """
    trt = parsed.backend.module
    constants: set[str] = set()
    products = []
    for layer in parsed.layers:
        fed = [tensor.name for i in range(layer.num_inputs) if (tensor := layer.get_input(i)) is not None]
        if layer.type == trt.LayerType.CONSTANT or (layer.type == trt.LayerType.SHUFFLE and constants.issuperset(fed)):
            constants.update(tensor.name for tensor in _outputs(layer))
        elif layer.type == trt.LayerType.MATRIX_MULTIPLY and constants.intersection(fed):
            products.append(layer)
    convolutions = [layer for layer in parsed.layers if layer.type == trt.LayerType.CONVOLUTION]
    for layer in convolutions or products:
        if not ranged or layer.get_input(0).name in ranged:
            layer.precision = trt.DataType.INT8


def _outputs(layer: Any) -> Iterator[Any]:
    for i in range(layer.num_outputs):
        yield layer.get_output(i)
