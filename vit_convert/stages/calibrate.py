"""The calibrate stage: ranges of all tensors that could be quantized, and the fp32 graph that quantization starts
from."""

import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vit_convert.core import config as configs
from vit_convert.core.calibration_cache import ALGORITHMS, CacheKey, format_cache, hash_source, key_path, save_cache
from vit_convert.core.errors import UsageError
from vit_convert.core.pipeline import Context, Stage
from vit_convert.core.stage_results import CalibrateResult, LeftOut, Shifted, Widened
from vit_convert.stages.calibration_samples import calibration_samples
from vit_convert.stages.common import (
    backend_named,
    builds_here,
    dialect_for,
    graph_files,
    plain,
    prepare,
    source_identity,
    with_weights,
)
from vit_convert.stages.images import IMAGES
from vit_convert.stages.lowering import measure_lowering
from vit_convert.stages.other_weights import SMOOTHED, change_weights, changes_weights, source_graph, unquantized
from vit_convert.stages.text import (
    calibration_source,
    identity,
    samples_file,
    takes_text,
)

if TYPE_CHECKING:
    from vit_convert.quantize.calibrate import Calibration
    from vit_convert.quantize.placement import Patterns, Site


def _wanted(context: Context) -> bool:
    return bool(configs.quantized(context.config)) or context.config.sensitivity


def _inputs(context: Context) -> Any:
    calibration = context.config.calibration
    engine = context.config.engine
    if takes_text(context):
        source = identity(context, calibration_source(context))
    else:
        source = source_identity(calibration.data, labelled=False)
    may = [_may_leave_out(context), _may_shift(context)]
    planned = configs.is_planned(context.config) and bool(unquantized(context))
    budget = [plain(context.config.plan), context.config.check.int8_cosine, IMAGES.inputs(context)] if planned else []
    return [plain(calibration), source, patterns(context), engine.calibrator, unquantized(context), *budget, *may]


def _outputs(context: Context) -> list[pathlib.Path]:
    smoothed = graph_files(context, SMOOTHED) if changes_weights(context) else []
    labels = [context.bundle.labels("calibration")] if context.config.calibration.data else []
    images = [samples_file(context, "calibration"), *labels]
    cache = (
        [context.bundle.calibration_cache, key_path(context.bundle.calibration_cache)] if _with_cache(context) else []
    )
    name = unquantized(context)
    ranges = [context.bundle.ranges(name), *with_weights(context.bundle.lowering(f"{name}.int8"))] if name else []
    return [context.bundle.calibration, *images, *smoothed, *cache, *ranges]


def _with_cache(context: Context) -> bool:
    """Whether the ranges are also written in the format of TensorRT's own cache."""
    return bool(dialect_for(context).cache_version)


def patterns(context: Context) -> "Patterns":
    """The config's patterns: what must not be quantized, and what quantization is limited to."""
    config = context.config
    return {
        "keep_fp32": list(config.keep_fp32),
        "keep_fp16": list(config.keep_fp16),
        "quantize_only": list(config.quantize_only),
    }


def _may_leave_out(context: Context) -> bool:
    """Whether a product that loses too much stays out of int8; not if the user named what to quantize."""
    config = context.config
    int8 = "int8" in configs.quantized(config) or config.plan.type == "int8"
    return int8 and not config.quantize_only and not config.plan.file


def _may_shift(context: Context) -> bool:
    """Whether tensors may be shifted: biases of a Q/DQ graph can undo the shift, but TensorRT's own calibration cache
    has none."""
    config = context.config
    int8 = "int8" in configs.quantized(config) or config.plan.type == "int8"
    return int8 and bool(config.calibration.shift) and not config.engine.calibrator and not unquantized(context)


def limits(context: Context, precision: str) -> "Patterns":
    """The config's patterns and, for int8, the layers that lose too much by calibration's measurements."""
    from vit_convert.quantize.calibrate import Calibration

    found = patterns(context)
    if precision == "int8":
        found["leave_out"] = list(Calibration.load(context.bundle.calibration).left_out)
    return found


def calibrate(context: Context) -> CalibrateResult:
    """Decodes the calibration images, smooths the graph if asked to, and measures the ranges of all tensors that could
    be quantized."""
    import onnx_ir as ir

    from vit_convert.quantize.calibrate import calibrate as measure
    from vit_convert.quantize.placement import place
    from vit_convert.quantize.shift import shiftable

    config = context.config.calibration
    model = ir.load(context.bundle.onnx())
    placement = place(model, attention=config.attention, **patterns(context))
    if not placement.sites:
        _refuse_to_quantize_nothing(context)
    images, source = calibration_samples(context)
    for block, reason in placement.declined.items():
        context.progress.warn(f"{block}: attention is not quantized: {reason}")
    changed = change_weights(context, model, placement.sites, images)
    # If a plan leaves attention unquantized, the projection reads another tensor.
    tensors = placement.tensors() + (place(model, **patterns(context)).tensors() if config.attention else [])
    with_cache = _with_cache(context)
    first = model.graph.inputs[0]
    if with_cache and first.dtype == ir.DataType.FLOAT:
        tensors.insert(0, first.name or "")
    calibration = measure(
        source_graph(context),
        images,
        prepare(context),
        tensors,
        method=config.method,
        batch_size=config.batch_size,
        device=config.device,
        progress=context.progress,
    )
    if _may_shift(context):
        calibration = calibration.shift(
            *shiftable(ir.load(source_graph(context)), place(model, **patterns(context)).sites)
        )
    left_out: list[LeftOut] = []
    rotated, lowering = changed.rotated, unquantized(context)
    if _may_leave_out(context) and not lowering:
        linears = [site for site in place(model, **patterns(context)).sites if site.weight]
        calibration = calibration.leave_out([site.tensor for site in linears], config.max_error)
        left_out = _left_out(context, calibration, linears)
    calibration.save(context.bundle.calibration)
    if with_cache:
        _write_cache(context, calibration)
    share = None
    if lowering:
        may = _may_leave_out(context)
        measured = measure_lowering(context, lowering, images, patterns(context), may_leave_out=may)
        left_out = _left_out(context, measured.calibration, measured.linears)
        rotated, share = measured.rotated, measured.share
    clipped = sum(calibration.thresholds[name] < 0.999 * calibration.amax[name] for name in calibration.thresholds)
    what = "texts" if takes_text(context) else "images"
    summary = f"{config.method}, {len(images)} {what}, {len(calibration.thresholds)} tensors, {clipped} clipped"
    widened = _widened(calibration)
    if widened:
        summary += f", {len(widened)} wider than entropy, {_most(widened)}"
    if calibration.device != "cpu":
        summary += f", on {calibration.device}"
    if calibration.shifts:
        summary += f", {len(calibration.shifts)} shifted"
    if left_out:
        summary += f", {', '.join(site for row in left_out for site in row.sites)} left out of int8"
    if share and share.products:
        summary += f", {', '.join(row.site for row in share.products)} for the output's sake"
    return CalibrateResult(
        method=config.method,
        device=calibration.device,
        num_images=len(images),
        source=source,
        num_tensors=len(calibration.thresholds),
        num_clipped=clipped,
        widened=tuple(widened),
        left_out=tuple(left_out),
        output_share=share,
        shifted=tuple(_shifted(calibration)),
        smoothed=changed.smoothed,
        rotated=rotated,
        summary=summary + changed.summary_of(rotated),
    )


def _widened(calibration: "Calibration") -> list[Widened]:
    """The tensors whose threshold the guard widened, with the error of their products at each threshold; largest error
    by entropy first."""
    return [
        Widened(
            tensor=name,
            amax=calibration.amax[name],
            entropy=cost.candidates[0],
            threshold=calibration.thresholds[name],
            error_entropy=cost.errors[0],
            error=cost.cheapest,
            error_minmax=cost.errors[-1],
        )
        for name, cost in calibration.widened().items()
    ]


def _shifted(calibration: "Calibration") -> list[Shifted]:
    """The tensors that are shifted, and how much that reduces the error of their products, largest gain first."""
    rows = [
        Shifted(
            tensor=name,
            offset=shift.offset,
            threshold=shift.threshold,
            error=shift.error,
            error_symmetric=calibration.costs[name].cheapest,
        )
        for name, shift in calibration.shifts.items()
    ]
    return sorted(rows, key=lambda row: row.error - row.error_symmetric)


def _left_out(context: Context, calibration: "Calibration", linears: Sequence["Site"]) -> list[LeftOut]:
    """The products that stay out of int8, worst first, with a warning for each.

    Raises:
        UsageError: no product is left.
    """
    allowed, rows = context.config.calibration.max_error, []
    for tensor, error in sorted(calibration.left_out.items(), key=lambda item: -item[1]):
        sites = tuple(dict.fromkeys(site.name for site in linears if site.tensor == tensor))
        rows.append(LeftOut(sites=sites, tensor=tensor, error=error, max_error=allowed))
        context.progress.warn(
            f"{', '.join(sites)}: stays fp16: at every threshold int8 costs {error:.2g} of the product, "
            f"calibration.max_error allows {allowed:g}; config.quantize_only would quantize it nevertheless"
        )
    if linears and all(site.tensor in calibration.left_out for site in linears):
        raise UsageError(
            f"config.calibration.max_error={allowed:g}: every product loses more, the least {rows[-1].sites[0]}: "
            f"{rows[-1].error:.2g}; nothing would be quantized",
            fix="Allow more, name layers in config.quantize_only, or ask for fp16.",
        )
    return rows


def _most(widened: Sequence[Widened]) -> str:
    first = widened[0]
    threshold = f"{first.entropy:.3g} → {first.threshold:.3g}"
    return f"most {first.tensor}: {threshold}, error of its products {first.error_entropy:.2g} → {first.error:.2g}"


def _refuse_to_quantize_nothing(context: Context) -> None:
    given = {key: value for key, value in patterns(context).items() if value}
    said = "".join(f", config.{key}={value}" for key, value in given.items())
    why = (
        "these leave no linear" if given else "the graph has no product or convolution of an activation with a constant"
    )
    raise UsageError(
        f"config.precision={context.config.precision}{said}: {why}, so nothing would be quantized",
        fix="Leave less out (config.keep_fp16, config.keep_fp32, config.quantize_only)." if given else "Ask for fp16.",
    )


def _write_cache(context: Context, calibration: Any) -> None:
    """Writes the ranges in the format of TensorRT's own cache, with a key that identifies their source.

    It holds the graph's input and the inputs of the quantized linears (and of attention products), as our own Q/DQ
    graph does. A cache written by TensorRT has every tensor. When TensorRT reads ours, it reports the tensors without a
    scale and runs them in fp16 or fp32.
    """
    from vit_convert.engine.backend.graph_file import hash_graph

    version = dialect_for(context).cache_version
    if builds_here(context) and (backend := backend_named(context.config.engine.backend)).has_calibrator:
        version = backend.version
    algorithm = calibration.method if calibration.method in ALGORITHMS else "entropy"
    images = samples_file(context, "calibration")
    graph, preprocessing = hash_graph(source_graph(context)), context.results.checkpoint.preprocess
    key = CacheKey(
        algorithm, version, hash_source(graph, images, num_images=calibration.num_images, preprocessing=preprocessing)
    )
    ranges = {name: t for name, t in calibration.thresholds.items() if name not in calibration.left_out}
    save_cache(context.bundle.calibration_cache, key, format_cache(key, ranges), num_images=calibration.num_images)


CALIBRATE = Stage("calibrate", ("export",), CalibrateResult, calibrate, _inputs, _outputs, _wanted)
