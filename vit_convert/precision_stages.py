"""The stages that leave fp32 behind: calibrate, sensitivity, plan and quantize."""

import functools
import pathlib
from typing import TYPE_CHECKING, Any

import numpy as np

from vit_convert import config as configs
from vit_convert.bundle import atomic, hash_file
from vit_convert.calibration_cache import ALGORITHMS, CacheKey, format_cache, save_cache
from vit_convert.errors import CheckError
from vit_convert.pipeline import Context, Stage
from vit_convert.stages import (
    EVALUATION_BATCH,
    check_precision,
    decode,
    evaluation,
    graph_files,
    plain,
    prepare,
    source_identity,
    target_name,
)

if TYPE_CHECKING:
    from vit_convert.quantize.placement import Patterns

QUANTIZED = ("int8", "fp8")
_SMOOTHED = "smooth"  # the fp32 graph after SmoothQuant, `model.smooth.onnx`
_NOISE_IMAGES = 32
# TensorRT compares the first line of a cache with its own version; where none is installed, the last of the generation is assumed.
_CACHE_VERSIONS = {"trt8": "8.6.1", "trt10": "10.16.1"}


def precision_stages() -> list[Stage]:
    """The stages between the fp32 check and the build, in order."""
    return [
        Stage("calibrate", ("export", "images"), calibrate, _calibrate_inputs, _calibrate_outputs, _wants_calibration),
        Stage(
            "sensitivity", ("reference", "calibrate"), scan_sensitivity, _scan_inputs, lambda c: [c.bundle.sensitivity], _wants_sensitivity
        ),
        Stage("plan", ("sensitivity",), plan, _plan_inputs, lambda c: [c.bundle.precision_plan], _wants_plan),
        Stage("quantize", ("check", "calibrate", "plan"), lower, _lower_inputs, _lowered_files, lambda c: bool(_lowered(c))),
    ]


def _lowered(context: Context) -> list[str]:
    """Precisions that need a graph of their own: all but fp32 where precision lives in the graph, Q/DQ alone for TensorRT 8."""
    asked = [precision for precision in configs.precisions(context.config) if precision != "fp32"]
    if target_name(context) == "trt8":
        configs.require_target(context.config, "trt8")
        return ["int8"] if "int8" in asked and not context.config.engine.calibrator else []
    return asked


def _quantized(context: Context) -> list[str]:
    return [precision for precision in configs.precisions(context.config) if precision in QUANTIZED]


# --- calibrate ------------------------------------------------------------------------------------------------------


def _wants_calibration(context: Context) -> bool:
    return bool(_quantized(context)) or context.config.sensitivity


def _calibrate_inputs(context: Context) -> Any:
    calibration = context.config.calibration
    return [plain(calibration), source_identity(calibration.data), _patterns(context), context.config.engine.calibrator]


def _calibrate_outputs(context: Context) -> list[pathlib.Path]:
    smoothed = graph_files(context, _SMOOTHED) if context.config.calibration.smooth else []
    return [context.bundle.calibration, context.bundle.images("calibration"), *smoothed]


def _patterns(context: Context) -> "Patterns":
    config = context.config
    return {"keep_fp32": list(config.keep_fp32), "keep_fp16": list(config.keep_fp16), "quantize_only": list(config.quantize_only)}


def _source_graph(context: Context) -> pathlib.Path:
    """The fp32 graph that is quantized."""
    return context.bundle.onnx(_SMOOTHED if context.config.calibration.smooth else "fp32")


def calibrate(context: Context) -> dict[str, Any]:
    """Decodes the calibration images, smooths the graph if asked to, and measures the ranges of what could be quantized."""
    import onnx_ir as ir

    from vit_convert.quantize.calibrate import calibrate as measure
    from vit_convert.quantize.placement import place

    config = context.config.calibration
    images, source = _calibration_images(context)
    model = ir.load(context.bundle.onnx())
    placement = place(model, attention=config.attention, **_patterns(context))
    for block, reason in placement.declined.items():
        context.progress.warn(f"{block}: attention is not quantized: {reason}")
    smoothed = _smooth(context, model, placement, images) if config.smooth else None
    # The projection reads another tensor where its attention is not quantized, which a plan may choose.
    tensors = placement.tensors() + (place(model, **_patterns(context)).tensors() if config.attention else [])
    target = target_name(context)
    with_cache = target in _CACHE_VERSIONS and not context.config.engine.calibrator
    first = model.graph.inputs[0]
    if with_cache and first.dtype == ir.DataType.FLOAT:
        tensors.insert(0, first.name or "")
    calibration = measure(
        _source_graph(context),
        images,
        prepare(context),
        tensors,
        method=config.method,
        batch_size=config.batch_size,
        progress=context.progress,
    )
    calibration.save(context.bundle.calibration)
    if with_cache:
        _write_cache(context, calibration)
    clipped = sum(calibration.thresholds[name] < 0.999 * calibration.amax[name] for name in calibration.thresholds)
    summary = f"{config.method}, {len(images)} images, {len(calibration.thresholds)} tensors, {clipped} clipped"
    return {
        "method": config.method,
        "num_images": len(images),
        "source": source,
        "num_tensors": len(calibration.thresholds),
        "num_clipped": clipped,
        "smoothed": smoothed,
        "summary": summary + (f", {smoothed['num_norms']} LayerNorms smoothed" if smoothed else ""),
    }


def _calibration_images(context: Context) -> tuple[np.ndarray, str]:
    from vit_convert.images.noise import seeded_noise

    config = context.config.calibration
    if config.data:
        return decode(context, "calibration", config.data, config.num_images).images, config.data
    height, width = context.results["checkpoint"]["image_size"]
    images = seeded_noise(min(config.num_images, _NOISE_IMAGES), height, width)
    context.progress.warn("calibration.data is empty: ranges come from noise, so the quantized engine shows speed and not accuracy")
    with atomic(context.bundle.images("calibration")) as temporary, open(temporary, "wb") as f:
        np.save(f, images)
    return images, "seeded noise"


def _batches(context: Context, images: np.ndarray, size: int) -> Any:
    normalize = prepare(context)
    return (normalize(np.asarray(images[start : start + size])) for start in range(0, len(images), size))


def _smooth(context: Context, model: Any, placement: Any, images: np.ndarray) -> dict[str, Any]:
    """Writes `model.smooth.onnx`; the quantize stage checks it against JAX like the fp32 graph."""
    from vit_convert.onnx_file import save_onnx
    from vit_convert.quantize.ranges import largest
    from vit_convert.quantize.smooth import find_norms, smooth

    config = context.config.calibration
    norms, _ = find_norms(model, placement.sites)
    batches = _batches(context, images, config.batch_size)
    amax = largest(context.bundle.onnx(), [norm.tensor for norm in norms], batches, per_channel=True)
    result = smooth(model, placement.sites, amax, strength=config.smooth)
    for tensor, reason in result.declined.items():
        context.progress.warn(f"{tensor}: not smoothed: {reason}")
    save_onnx(result.model, context.bundle.onnx(_SMOOTHED))
    factors = {name: [float(s.min()), float(s.max())] for name, s in result.factors.items()}
    return {"strength": config.smooth, "num_norms": len(norms), "factors_min_max": factors, "declined": result.declined}


def _write_cache(context: Context, calibration: Any) -> None:
    """Writes the ranges as TensorRT's own cache, with the key that `engine.calibrator` asks for.

    It holds the graph's input and the inputs of the quantized linears (and of attention products), which is what our own Q/DQ graph
    holds. A cache that TensorRT writes has every tensor; reading ours, it says which ones miss a scale and runs those in fp16 or fp32.
    """
    engine, target = context.config.engine, target_name(context)
    version = _CACHE_VERSIONS[target]
    if engine.backend not in ("none", "rtx"):
        from vit_convert.engine.trt import load_backend

        version = load_backend(engine.backend).version
    algorithm = calibration.method if calibration.method in ALGORITHMS else "entropy"
    key = CacheKey(algorithm, version, hash_file(_source_graph(context)))
    save_cache(context.bundle.calibration_cache, key, format_cache(key, calibration.thresholds), num_images=calibration.num_images)


# --- sensitivity and plan -------------------------------------------------------------------------------------------


def _wants_sensitivity(context: Context) -> bool:
    return context.config.sensitivity or _wants_plan(context)


def _wants_plan(context: Context) -> bool:
    return configs.is_planned(context.config) and not context.config.plan.file


def _scan_inputs(context: Context) -> Any:
    return [context.config.plan.type, context.config.plan.num_images, list(context.config.keep_fp32)]


def _plan_inputs(context: Context) -> Any:
    return [plain(context.config.plan), context.config.check.int8_cosine]


def _sensitivity(context: Context) -> Any:
    import onnx_ir as ir

    from vit_convert.images.decode import pick
    from vit_convert.quantize.calibrate import Calibration
    from vit_convert.quantize.sensitivity import Sensitivity, candidates
    from vit_convert.quantize.typed import to_fp16

    config, graph = context.config, _source_graph(context)
    labelled = evaluation(context)
    split = "evaluation" if context.results["images"]["num_images"] else "calibration"
    images = np.load(context.bundle.images(split), mmap_mode="r")
    chosen = pick(len(images), config.plan.num_images)
    target = target_name(context)
    rest = "fp32" if target == "trt8" else "fp16"  # which TensorRT 8 makes of fp32 by a flag, not in the graph

    def lower(model: Any) -> Any:
        if rest == "fp32":
            return model
        return to_fp16(model, keep_fp32=config.keep_fp32, amax=_activation_ranges(context, graph)[0]).model

    return Sensitivity(
        context.bundle.sensitivity,
        graph,
        Calibration.load(context.bundle.calibration),
        candidates(ir.load(graph), _patterns(context), attention=config.calibration.attention),
        images[chosen],
        labelled[1][chosen] if labelled else None,
        prepare(context),
        target=target,
        precision=config.plan.type,
        rest=rest,
        lower=lower,
        source=f"{split} images",
        batch_size=EVALUATION_BATCH,
        progress=context.progress,
    )


def scan_sensitivity(context: Context) -> dict[str, Any]:
    """Quantizes one linear kind of one block at a time, and one block at a time; continues what was interrupted."""
    from vit_convert.report.sensitivity import plot_ranking, ranking

    sensitivity = _sensitivity(context)
    sensitivity.scan()
    picture = context.bundle.sensitivity.with_suffix(".png")
    if missing := plot_ranking(sensitivity.record, picture):
        context.progress.say(f"  no {picture.name}: {missing}")
    worst = ranking(sensitivity.record)["units"][0]
    images = f"{sensitivity.record['num_images']} {sensitivity.record['source']}"
    return {
        "precision": context.config.plan.type,
        "num_units": len(sensitivity.units),
        "worst": worst,
        "summary": f"{len(sensitivity.units)} units on {images}; worst {worst['name']}: 1 - cosine {worst['error']:.2g}",
    }


def plan(context: Context) -> dict[str, Any]:
    """Finds the largest quantized set within the budget and writes it as `precision_plan.json`."""
    from vit_convert.quantize.plan import Budget, make_plan, write_plan

    config = context.config
    sensitivity = _sensitivity(context)
    budget = Budget(config.plan.cosine or config.check.int8_cosine, config.plan.accuracy_budget)
    found = make_plan(sensitivity, budget)
    record = write_plan(context.bundle.precision_plan, found, sensitivity, budget)
    measured = record["measured"]
    share = f"{len(found.units)} of {len(sensitivity.units)} units, {100 * measured['share_of_weights']:.0f} % of their weights"
    top1 = "" if measured["top1"] is None else f", top-1 {measured['top1']:.2f} %"
    return {
        **{key: record[key] for key in ("precision", "budget", "measured", "fp32", "images", "left_out")},
        "path": context.bundle.precision_plan.name,
        "num_units": len(found.units),
        "num_candidates": len(sensitivity.units),
        "summary": f"{share} in {record['precision']}: cosine {measured['cosine']:.5f}{top1}",
    }


def _plan_file(context: Context) -> pathlib.Path | None:
    given = context.config.plan.file
    return pathlib.Path(given) if given else context.bundle.precision_plan if configs.is_planned(context.config) else None


def _place(context: Context, model: Any, precision: str) -> Any:
    from vit_convert.quantize.placement import place
    from vit_convert.quantize.plan import read_plan

    patterns = _patterns(context)
    if (path := _plan_file(context)) is not None:
        patterns["quantize_only"] = read_plan(path, precision)
    return place(model, attention=context.config.calibration.attention, **patterns)


# --- quantize -------------------------------------------------------------------------------------------------------


def _lower_inputs(context: Context) -> Any:
    path = _plan_file(context)
    planned = hash_file(path) if path is not None and path.exists() else str(path)
    return [_lowered(context), target_name(context), plain(context.config.check), list(context.config.keep_fp32), planned]


def _lowered_files(context: Context) -> list[pathlib.Path]:
    return [file for precision in _lowered(context) for file in graph_files(context, precision)]


def lower(context: Context) -> dict[str, Any]:
    """Writes and checks one typed graph per lower precision; an accuracy miss fails after all of them were measured."""
    checks: dict[str, Any] = {}
    failed: CheckError | None = None
    lowered = _lowered(context)
    if context.config.calibration.smooth and set(lowered) & set(QUANTIZED):
        checks[_SMOOTHED] = check_precision(context, _SMOOTHED)  # what is not exact in fp32 need not be quantized
    activations = functools.cache(functools.partial(_activation_ranges, context))
    for precision in lowered:
        detail = _write_graph(context, precision, activations)
        try:
            checks[precision] = {**check_precision(context, precision), **detail}
        except CheckError as e:
            checks[precision] = {**getattr(e, "result", {}), **detail}
            failed = failed or e
    verdicts = {precision: _verdict(context, precision, checks) for precision in lowered if precision in QUANTIZED}
    result = {"checks": checks, "verdicts": verdicts}
    if failed is not None:
        failed.result = result  # type: ignore[attr-defined]
        raise failed
    summary = "; ".join(f"{p}: cosine {c['cosine']:.6f}" + (f", top-1 {c['top1']:.2f} %" if "top1" in c else "") for p, c in checks.items())
    return {**result, "summary": summary}


def _write_graph(context: Context, precision: str, activations: Any) -> dict[str, Any]:
    """Writes one lower precision's graph and returns what there is to say about it."""
    import onnx_ir as ir

    from vit_convert.onnx_file import save_onnx
    from vit_convert.quantize.calibrate import Calibration
    from vit_convert.quantize.qdq import quantize
    from vit_convert.quantize.typed import to_bf16, to_fp16

    target, keep_fp32 = target_name(context), context.config.keep_fp32
    source = _source_graph(context) if precision in QUANTIZED else context.bundle.onnx()
    model = ir.load(source)
    detail: dict[str, Any] = {}
    if precision in QUANTIZED:
        placement = _place(context, model, precision)
        model = quantize(model, Calibration.load(context.bundle.calibration), placement.sites, target=target, precision=precision)
        detail["quantized"] = [site.name for site in placement.sites]
    if target != "trt8":
        amax, per_block = activations(source)
        typed = to_bf16(model, keep_fp32=keep_fp32) if precision == "bf16" else to_fp16(model, keep_fp32=keep_fp32, amax=amax)
        for name, largest in typed.overflowing.items():
            context.progress.warn(f"{name}: |w| reaches {largest:.3g}, beyond fp16; it stays fp32")
        model = typed.model
        detail |= {"fp32_islands": typed.islands, "num_casts": typed.num_casts, "num_subnormal": typed.num_subnormal}
        detail["max_abs_activation"] = per_block
    save_onnx(model, context.bundle.onnx(precision))
    return detail


def _activation_ranges(context: Context, graph: pathlib.Path) -> tuple[dict[str, float], dict[str, Any]]:
    """The largest |x| of every activation on the reference images, and that of each block; onnxruntime's fp16 shows no overflow."""
    import onnx_ir as ir

    from vit_convert.quantize.graph import activations, node_blocks
    from vit_convert.quantize.ranges import largest

    model = ir.load(graph)
    with np.load(context.bundle.reference) as file:
        found = largest(graph, activations(model.graph), [file["images"]])
    amax = {name: float(value) for name, value in found.items()}
    blocks: dict[str, dict[str, Any]] = {}
    for node, block in node_blocks(model.graph).items():
        for value in node.outputs:
            row = {"tensor": value.name, "max_abs": amax.get(value.name or "", 0.0)}
            if row["max_abs"] > blocks.setdefault(block or "outside", row)["max_abs"]:
                blocks[block or "outside"] = row
    return amax, blocks


def _verdict(context: Context, precision: str, checks: dict[str, Any]) -> dict[str, Any]:
    """Whether a quantized graph is accurate enough to be worth its speed; fp32 stands in where fp16 has no graph of its own."""
    base = "fp16" if "fp16" in checks else "fp32"
    plain_top1 = checks["fp16"].get("top1") if base == "fp16" else context.results["check"].get("top1")
    top1, allowed = checks[precision].get("top1"), context.config.check.max_top1_drop
    if top1 is None or plain_top1 is None:
        cosine = checks[precision].get("cosine", 0.0)
        text = f"{precision}: no labelled images, so its accuracy is unknown; cosine to JAX {cosine:.5f}"
        return {"against": base, "accurate": None, "text": text}
    drop = plain_top1 - top1
    passed = bool(drop <= allowed)
    text = f"{precision} loses {drop:.2f} points of top-1 against {base} ({top1:.2f} % against {plain_top1:.2f} %), allowed {allowed:g}"
    return {"against": base, "top1": top1, "drop_points": round(drop, 4), "allowed_points": allowed, "accurate": passed, "text": text}
