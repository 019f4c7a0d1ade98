"""What a precision means for a backend, and whether a graph can honour it."""

import collections
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from vit_convert.core.errors import BuildError, nearest
from vit_convert.core.layer_names import HOW_TO_NAME, layer_names, matches
from vit_convert.engine.backend.trt import FLOAT_PRECISIONS, PRECISIONS, QUANTIZED_PRECISIONS, Backend
from vit_convert.engine.builder.network import layers


def require_precision(backend: Backend, precision: str, *, has_calibrator: bool) -> None:
    """Refuses what the backend cannot honour, before anything is parsed.

    Args:
        backend: the TensorRT that will build.
        precision: what was asked for.
        has_calibrator: whether TensorRT's own calibration was asked for.

    Raises:
        BuildError: an unknown precision, or one that this backend does not have.
    """
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


def builds_strongly_typed(backend: Backend, *, has_calibrator: bool) -> bool:
    """Whether the network keeps the graph's types: if the backend can, except for its own calibration."""
    return backend.strongly_typed and not has_calibrator


def count_types(backend: Backend, network: Any) -> dict[str, collections.Counter[str]]:
    """Counts the types of a parsed network.

    Args:
        backend: the TensorRT that parsed it.
        network: its `INetworkDefinition`.

    Returns:
        {"products": precision of each matrix product and convolution, "floats": of every floating-point tensor,
        "quantized": of each QuantizeLinear and DequantizeLinear}, each a count by precision ("fp16": 49).
    """
    trt = backend.module
    products = (
        trt.LayerType.MATRIX_MULTIPLY,
        trt.LayerType.CONVOLUTION,
        trt.LayerType.EINSUM,
        backend.find("LayerType.ATTENTION_INPUT"),
    )
    counts: dict[str, collections.Counter[str]] = {
        "products": collections.Counter(),
        "floats": collections.Counter(),
        "quantized": collections.Counter(),
    }
    for layer in layers(network):
        for tensor in _outputs(layer):
            if precision := FLOAT_PRECISIONS.get(tensor.dtype.name):
                counts["floats"][precision] += 1
                if layer.type in products:
                    counts["products"][precision] += 1
        if layer.type in (trt.LayerType.QUANTIZE, trt.LayerType.DEQUANTIZE):
            tensor = layer.get_output(0) if layer.type == trt.LayerType.QUANTIZE else layer.get_input(0)
            # A weakly typed network calls every tensor FLOAT until it is built, and quantizes to nothing but int8.
            precision = QUANTIZED_PRECISIONS.get(tensor.dtype.name, "other") if backend.strongly_typed else "int8"
            counts["quantized"][precision] += 1
    return counts


def require_types(
    counts: dict[str, collections.Counter[str]],
    precision: str,
    *,
    strongly_typed: bool,
    has_calibrator: bool,
    graph: str,
) -> None:
    """Refuses a graph whose types do not give the precision asked for: no engine is silently fp32.

    Args:
        counts: what `count_types` found.
        precision: what was asked for.
        strongly_typed: whether the engine keeps the graph's types; otherwise fp16 comes from a flag.
        has_calibrator: whether int8 ranges come from TensorRT's own calibration.
        graph: the graph's file name, for the message.

    Raises:
        BuildError: they differ.
    """
    products, floats, quantized = counts["products"], counts["floats"], counts["quantized"]
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
    else:  # a builder flag lowers fp32 to fp16, and fp16 tensors may stand in the graph
        wrong, missing = {p: n for p, n in floats.items() if p not in (precision, "fp32")}, False
    if wrong or missing:
        raise BuildError(
            f"{found}; {precision} was asked for",
            fix=f"Build from the {precision} graph (precision is a property of the graph).",
        )


def set_weak_precision(
    backend: Backend,
    builder: Any,
    builder_config: Any,
    network: Any,
    precision: str,
    keep_fp32: Sequence[str],
    *,
    has_calibrator: bool = False,
    ranged: Collection[str] = (),
) -> None:
    """Sets the builder flags of a weakly typed build, and the layers that stay in fp32.

    Args:
        backend: a TensorRT with precision flags.
        builder: its `Builder`.
        builder_config: the `IBuilderConfig` to change.
        network: the parsed network.
        precision: fp32, fp16 or int8.
        keep_fp32: blocks ("block_03"), layers ("block_03/fc2"), scopes or fnmatch patterns of node names.
        has_calibrator: whether int8 ranges come from TensorRT's own calibration; in a graph with Q/DQ nodes they do
            not.
        ranged: the tensors that already have ranges; empty if the calibrator finds them.

    Raises:
        BuildError: the GPU does not support the precision, or a pattern matches no layer.
    """
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
        if has_calibrator:
            # some products have no int8 kernel
            builder_config.set_flag(backend.find("BuilderFlag.PREFER_PRECISION_CONSTRAINTS"))
            _prefer_int8(backend, network, ranged)
        return
    # Either all constraints are obeyed or none is: what stays in fp32 has to, and int8 is left to the timings then.
    builder_config.set_flag(backend.find("BuilderFlag.OBEY_PRECISION_CONSTRAINTS"))
    unmatched = set(keep_fp32)
    for layer in layers(network):
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


def set_ranges(network: Any, ranges: Mapping[str, float], *, graph: str) -> None:
    """Gives tensors of a weakly typed network the ranges by which TensorRT may hold them in int8.

    Args:
        network: the parsed network.
        ranges: by tensor, the |x| that the largest int8 value represents; may be empty.
        graph: the graph's file name, for the message.

    Raises:
        BuildError: the network lacks one of the tensors.
    """
    missing = dict(ranges)
    for layer in layers(network):
        for tensor in _outputs(layer):
            if (threshold := missing.pop(tensor.name, None)) is not None:
                tensor.set_dynamic_range(-threshold, threshold)
    if missing:
        raise BuildError(
            f"{graph}: has no tensor {next(iter(missing))}, which there is a range for",
            fix="Calibrate this graph again.",
        )


def _prefer_int8(backend: Backend, network: Any, ranged: Collection[str]) -> None:
    """Asks for int8 in layers with weights: going by its timings, TensorRT may run all of them in fp16 and not say so.

    These are the graph's convolutions or, if it has none, its products with constants. Other products are attention,
    and stay fp16. If ranges are given, a layer whose input has none was left out of int8, and is not asked for.
    """
    trt = backend.module
    constants: set[str] = set()
    products = []
    for layer in layers(network):
        fed = [tensor.name for i in range(layer.num_inputs) if (tensor := layer.get_input(i)) is not None]
        if layer.type == trt.LayerType.CONSTANT or (layer.type == trt.LayerType.SHUFFLE and constants.issuperset(fed)):
            constants.update(tensor.name for tensor in _outputs(layer))
        elif layer.type == trt.LayerType.MATRIX_MULTIPLY and constants.intersection(fed):
            products.append(layer)
    convolutions = [layer for layer in layers(network) if layer.type == trt.LayerType.CONVOLUTION]
    for layer in convolutions or products:
        if not ranged or layer.get_input(0).name in ranged:
            layer.precision = trt.DataType.INT8


def _outputs(layer: Any) -> Iterator[Any]:
    for i in range(layer.num_outputs):
        yield layer.get_output(i)
