"""The quantize stage: writes and checks a typed graph for each lower precision, and reports what int8 and fp8 cost in
accuracy."""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from vit_convert.core import config as configs
from vit_convert.core.bundle import hash_file
from vit_convert.core.check_results import GraphCheck, LargestActivation, LoweredGraph, QuantizeResult, Verdict
from vit_convert.core.errors import CheckError
from vit_convert.core.pipeline import Context, Stage
from vit_convert.stages.calibrate import limits
from vit_convert.stages.check import EXTREMES, check_precision
from vit_convert.stages.common import dialect_for, graph_files, plain, signature_of
from vit_convert.stages.other_weights import SMOOTHED, changes_weights, source_graph, unquantized

OUTSIDE = "outside"  # the encoder blocks


def _lowered(context: Context) -> list[str]:
    """Precisions that need a graph of their own: all but fp32; for TensorRT 8, where fp16 is a builder flag, only those
    with Q/DQ."""
    dialect = dialect_for(context)
    configs.require_dialect(context.config, dialect)
    calibrated_by_tensorrt = {"int8"} if dialect.precision_by_flag and context.config.engine.calibrator else set()
    asked = configs.precisions(context.config)
    return [
        precision for precision in asked if dialect.has_graph(precision) and precision not in calibrated_by_tensorrt
    ]


def _lowers_by_flag(context: Context) -> bool:
    """Whether precision is a builder flag (TensorRT 8): there is no typed graph to check."""
    return dialect_for(context).precision_by_flag and bool({"fp16", "int8"} & {*configs.precisions(context.config)})


def _plan_file(context: Context) -> pathlib.Path | None:
    """The plan of a graph with Q/DQ, if there is one."""
    given = context.config.plan.file
    planned = configs.is_planned(context.config) and not unquantized(context)
    return pathlib.Path(given) if given else context.bundle.precision_plan if planned else None


def _place(context: Context, model: Any, precision: str) -> Any:
    from vit_convert.quantize.placement import place
    from vit_convert.quantize.precision_plan import read_plan

    chosen = limits(context, precision)
    if (path := _plan_file(context)) is not None:
        chosen["quantize_only"] = read_plan(path, precision)
    return place(model, attention=context.config.calibration.attention, **chosen)


def _inputs(context: Context) -> Any:
    path = _plan_file(context)
    planned = hash_file(path) if path is not None and path.exists() else str(path)
    graphs = [_lowered(context), _lowers_by_flag(context), dialect_for(context).name]
    return [*graphs, plain(context.config.check), list(context.config.keep_fp32), planned]


def _outputs(context: Context) -> list[pathlib.Path]:
    return [file for precision in _lowered(context) for file in graph_files(context, precision)]


def lower(context: Context) -> QuantizeResult:
    """Writes and checks one typed graph per lower precision; if one misses its tolerance, the others are still
    measured."""
    checks: dict[str, GraphCheck] = {}
    failed: CheckError | None = None
    lowered = _lowered(context)
    if changes_weights(context) and configs.quantized(context.config):
        # if the fp32 graph is wrong, there is no point in quantizing it
        checks[SMOOTHED] = check_precision(context, SMOOTHED)
    activations = functools.cache(functools.partial(activation_ranges, context))
    for precision in lowered:
        graph = _write_graph(context, precision, activations)
        try:
            checks[precision] = check_precision(context, precision).of(graph)
        except CheckError as e:
            if isinstance(e.result, GraphCheck):
                checks[precision] = e.result.of(graph)
            failed = failed or e
    verdicts = {
        precision: _verdict(context, precision, checks)
        for precision in lowered
        if precision in configs.QUANTIZED and precision in checks
    }
    ranges = _ranges_by_flag(context, activations) if _lowers_by_flag(context) else None
    parts = [
        f"{precision}: cosine {found.cosine:.6f}" + ("" if found.top1 is None else f", top-1 {found.top1:.2f} %")
        for precision, found in checks.items()
    ]
    if ranges:
        parts.append(f"fp16 has to hold {max(row.max_abs for row in ranges.values()):.3g}")
    result = QuantizeResult(checks=checks, verdicts=verdicts, max_abs_activation=ranges, summary="; ".join(parts))
    if failed is not None:
        failed.result = result
        raise failed
    return result


def _write_graph(context: Context, precision: str, activations: Any) -> LoweredGraph:
    """Writes one lower precision's graph."""
    import onnx_ir as ir

    from vit_convert.core.onnx_file import save_onnx
    from vit_convert.quantize.calibrate import Calibration
    from vit_convert.quantize.half_precision import to_bf16, to_fp16
    from vit_convert.quantize.qdq import quantize

    if precision == "int8" and (lowering := unquantized(context)):
        return _write_ranges(context, lowering)
    dialect, keep_fp32 = dialect_for(context), context.config.keep_fp32
    source = source_graph(context) if precision in configs.QUANTIZED else context.bundle.onnx()
    model = ir.load(source)
    made = LoweredGraph()
    if precision in configs.QUANTIZED:
        placement = _place(context, model, precision)
        model = quantize(
            model,
            Calibration.load(context.bundle.calibration),
            placement.sites,
            target=dialect.name,
            precision=precision,
        )
        made = LoweredGraph(quantized=tuple(site.name for site in placement.sites))
    if not dialect.precision_by_flag:
        amax, per_block = activations(source)
        typed = (
            to_bf16(model, keep_fp32=keep_fp32)
            if precision == "bf16"
            else to_fp16(model, keep_fp32=keep_fp32, amax=amax)
        )
        for name, largest in typed.overflowing.items():
            context.progress.warn(f"{name}: |w| reaches {largest:.3g}, beyond fp16; it stays fp32")
        model = typed.model
        made = dataclasses.replace(
            made,
            fp32_islands=typed.islands,
            num_casts=typed.num_casts,
            num_subnormal=typed.num_subnormal,
            max_abs_activation=per_block,
        )
    save_onnx(model, context.bundle.onnx(precision))
    return made


def _write_ranges(context: Context, lowering: str) -> LoweredGraph:
    """Writes, as Q/DQ pairs, what an engine computes from a lowering and its ranges; that graph is only checked, never
    built."""
    import onnx_ir as ir

    from vit_convert.core.onnx_file import save_onnx
    from vit_convert.quantize.calibrate import Calibration
    from vit_convert.quantize.qdq import quantize
    from vit_convert.quantize.ranged import sites_with_ranges

    model, ranges = (
        ir.load(context.bundle.lowering(f"{lowering}.int8")),
        Calibration.load(context.bundle.ranges(lowering)),
    )
    sites = sites_with_ranges(model, ranges.thresholds)
    save_onnx(quantize(model, ranges, sites, target="trt8"), context.bundle.onnx("int8"))
    return LoweredGraph(quantized=tuple(site.name for site in sites))


def _ranges_by_flag(context: Context, activations: Any) -> dict[str, LargestActivation]:
    """The largest |x| of each block; warns of blocks that fp16 cannot hold and `keep_fp32` does not name; refuses
    unknown names."""
    import onnx_ir as ir

    from vit_convert.core.layer_names import check_patterns, matches
    from vit_convert.quantize.graph import names_by_node, node_blocks
    from vit_convert.quantize.half_precision import FP16_MAX

    keep_fp32, graph = context.config.keep_fp32, ir.load(context.bundle.onnx()).graph
    blocks = node_blocks(graph)
    names = names_by_node(graph, blocks)
    check_patterns("keep_fp32", keep_fp32, set().union(*names.values()))
    amax, per_block = activations(context.bundle.onnx())
    lowered = {node: block for node, block in blocks.items() if not matches(keep_fp32, names[node])}
    above = {block: row for block, row in _largest_by_block(lowered, amax).items() if row.max_abs > FP16_MAX}
    if above:
        largest = max(above.values(), key=lambda row: row.max_abs)
        to_keep = (*keep_fp32, *(row.tensor if block == OUTSIDE else block for block, row in above.items()))
        said = f"{', '.join(above)}: up to {largest.max_abs:.3g} ({largest.tensor}), fp16 holds {FP16_MAX:.0f}"
        context.progress.warn(f'{said}; build with --config.keep_fp32="{to_keep}"')
    found: dict[str, LargestActivation] = per_block
    return found


def activation_ranges(context: Context, graph: pathlib.Path) -> tuple[dict[str, float], dict[str, LargestActivation]]:
    """The largest |x| of every activation on the reference images, and of each block; running fp16 under onnxruntime
    would not show overflows."""
    import onnx_ir as ir

    from vit_convert.quantize.activation_max import extremes, magnitudes
    from vit_convert.quantize.graph import activations, distinct_activations, moved, node_blocks

    model = ir.load(graph)
    same = moved(model.graph)
    found = context.scratch.get(EXTREMES, {}).get(graph.name)
    if not found:  # the check did not run in this process, or not on all images at once
        with np.load(context.bundle.reference) as file:
            inputs = {tensor.name: file[tensor.name] for tensor in signature_of(context).inputs}
        found = extremes(graph, distinct_activations(model.graph), [inputs])
    largest = magnitudes(found)
    amax = {name: float(largest[same.get(name, name)]) for name in activations(model.graph)}
    return amax, _largest_by_block(node_blocks(model.graph), amax)


def _largest_by_block(blocks: Mapping[Any, str | None], amax: Mapping[str, float]) -> dict[str, LargestActivation]:
    """The largest |x| of each block, and the tensor that reaches it, among these nodes."""
    found: dict[str, LargestActivation] = {}
    for node, block in blocks.items():
        for value in node.outputs:
            row = LargestActivation(tensor=value.name, max_abs=amax.get(value.name, 0.0))
            if row.max_abs > found.setdefault(block or OUTSIDE, row).max_abs:
                found[block or OUTSIDE] = row
    return found


def _verdict(context: Context, precision: str, checks: Mapping[str, GraphCheck]) -> Verdict:
    """Whether a quantized graph is accurate enough to be worth its speed, compared with fp16 (with fp32 if fp16 has no
    graph)."""
    base = "fp16" if "fp16" in checks else "fp32"
    plain_top1 = checks["fp16"].top1 if base == "fp16" else context.results.check.top1
    found, allowed = checks[precision], context.config.check.max_top1_drop
    top1 = found.top1
    if top1 is None or plain_top1 is None:
        unknown = (
            "its accuracy is that of both towers"
            if context.results.checkpoint.pair
            else ("without labelled images its accuracy is unknown")
        )
        text = f"{precision}: cosine to JAX {found.cosine:.5f}" + (f"; {unknown}" if found.passed else "")
        return Verdict(against=base, accurate=None if found.passed else False, text=text)
    drop = plain_top1 - top1
    text = (
        f"{precision} loses {drop:.2f} points of top-1 against {base} ({top1:.2f} % against {plain_top1:.2f} %), "
        f"allowed {allowed:g}"
    )
    return Verdict(
        against=base,
        top1=top1,
        drop_points=round(drop, 4),
        allowed_points=allowed,
        accurate=bool(drop <= allowed),
        text=text,
    )


def _wanted(context: Context) -> bool:
    return bool(_lowered(context)) or _lowers_by_flag(context)


QUANTIZE = Stage("quantize", ("check", "calibrate", "plan"), QuantizeResult, lower, _inputs, _outputs, _wanted)
