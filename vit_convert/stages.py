"""The stages of one conversion, from the checkpoint to the engines; each imports what it needs when it runs."""

import dataclasses
import functools
import os
import pathlib
from typing import Any

import numpy as np

from vit_convert import config as configs
from vit_convert.bundle import atomic
from vit_convert.compare import Tolerance, top1_accuracy
from vit_convert.errors import CheckError, UsageError
from vit_convert.pipeline import Context, Stage, file_identity

_EVALUATION_BATCH = 32
_BACKEND_TARGETS = {"rtx": "rtx", "none": "rtx"}


def stages() -> list[Stage]:
    """All stages in order; each reads what the ones before it left in the bundle."""
    return [
        Stage("checkpoint", (), load, _checkpoint_inputs),
        Stage("images", ("checkpoint",), decode_images, _images_inputs, _images_outputs),
        Stage("reference", ("checkpoint", "images"), compute_reference, lambda c: c.config.check.num_images, lambda c: [c.bundle.reference]),
        Stage("export", ("checkpoint",), export, _export_inputs, lambda c: _graph_files(c, "fp32")),
        Stage("check", ("reference", "export"), check, lambda c: _plain(c.config.check)),
        Stage("calibrate", ("export", "images"), calibrate, _calibrate_inputs, lambda c: [c.bundle.calibration], _wants_calibration),
        Stage("quantize", ("check", "calibrate"), lower, _lower_inputs, _lowered_files, lambda c: bool(_lowered(c))),
        Stage("build", ("export", "quantize"), build, _build_inputs, _plans, lambda c: c.config.engine.backend != "none"),
    ]


# --- checkpoint -----------------------------------------------------------------------------------------------------


def _checkpoint_inputs(context: Context) -> Any:
    config = context.config
    asked = [config.family, config.variant, configs.image_size(config), config.outputs, config.num_classes, config.posemb_grid, config.preprocess]
    if config.model is not None:
        import time

        return [asked, time.time_ns()]  # nothing tells cheaply whether a user's function returns what it did
    from vit_convert.checkpoint.containers import split_subtree

    path = _checkpoint_path(context)
    file, _ = split_subtree(path)
    return [asked, str(path), file_identity(file) if os.path.exists(file) else None]


def _checkpoint_path(context: Context) -> pathlib.Path:
    from vit_convert.checkpoint.fetch import fetch, is_address

    if "checkpoint_path" not in context.scratch:
        given = context.config.checkpoint
        context.scratch["checkpoint_path"] = fetch(given, progress=context.progress) if is_address(given) else pathlib.Path(given)
    return context.scratch["checkpoint_path"]


def load(context: Context) -> dict[str, Any]:
    """Loads and verifies the checkpoint, or calls the user's model function."""
    config = context.config
    if config.model is not None:
        return _load_user_model(context)
    checkpoint = _checkpoint(context)
    for warning in checkpoint.warnings:
        context.progress.warn(warning)
    arch = checkpoint.architecture
    if config.num_classes and config.num_classes != arch.num_classes:
        raise UsageError(f"config.num_classes={config.num_classes}: the checkpoint's head has {arch.num_classes} classes")
    from vit_convert.images.preprocess import preprocess_for

    family = checkpoint.layout.value if config.preprocess == "auto" else config.preprocess
    source = checkpoint.source_image_size
    return {
        "path": str(checkpoint.path),
        "sha256": checkpoint.sha256,
        "family": arch.family,
        "variant": arch.variant,
        "layout": checkpoint.layout.value,
        "num_params": checkpoint.num_params,
        "image_size": list(arch.image_size),
        "source_image_size": list(source),
        "num_classes": arch.num_classes,
        "pool": arch.pool,
        "output": "logits" if arch.num_classes else "features",
        "warnings": checkpoint.warnings,
        "preprocess": preprocess_for(family, arch.image_size).to_dict(),
        "summary": f"ViT {arch.variant}, {checkpoint.num_params:,} parameters, {'x'.join(map(str, arch.image_size))}",
    }


def _checkpoint(context: Context) -> Any:
    if "checkpoint" not in context.scratch:
        from vit_convert.checkpoint.load import load_checkpoint

        config = context.config
        context.scratch["checkpoint"] = load_checkpoint(
            _checkpoint_path(context),
            family=config.family,
            variant=config.variant,
            image_size=configs.image_size(config),
            outputs=config.outputs,
            posemb_grid=config.posemb_grid,
        )
    return context.scratch["checkpoint"]


def _load_user_model(context: Context) -> dict[str, Any]:
    from vit_convert.images.preprocess import preprocess_for

    config = context.config
    size = configs.image_size(config)
    if size is None:
        raise UsageError("config.model is given and config.image_size is not", fix="Set config.image_size = (height, width).")
    model = _model(context)
    num_params = sum(int(leaf.size) for leaf in model.params.values())
    family = "vit_jax" if config.preprocess == "auto" else config.preprocess
    return {
        "path": "",
        "sha256": "",
        "family": "user",
        "variant": getattr(config.model, "__name__", "model"),
        "num_params": num_params,
        "image_size": list(size),
        "output": model.output,
        "warnings": [],
        "preprocess": preprocess_for(family, size).to_dict(),
        "summary": f"user model, {num_params:,} parameters, {'x'.join(map(str, size))}",
    }


def _model(context: Context) -> Any:
    if "model" not in context.scratch:
        from vit_convert.models.model import user_model, vit_model

        if context.config.model is not None:
            made = context.config.model()
            module, variables = made if isinstance(made, tuple) else (made, None)
            context.scratch["model"] = user_model(module, variables, output=context.config.outputs)
        else:
            checkpoint = _checkpoint(context)
            context.scratch["model"] = vit_model(checkpoint.architecture, checkpoint.params)
    return context.scratch["model"]


# --- images and reference -------------------------------------------------------------------------------------------


def _images_inputs(context: Context) -> Any:
    return [_source_identity(context.config.evaluation.data), context.config.evaluation.num_images]


def _source_identity(data: str) -> Any:
    if not data:
        return "noise"
    from vit_convert.images.sources import open_images

    return [data, open_images(data).fingerprint]


def _images_outputs(context: Context) -> list[pathlib.Path]:
    return [context.bundle.images("evaluation")] if context.config.evaluation.data else []


def decode_images(context: Context) -> dict[str, Any]:
    """Decodes the evaluation images once, at the model's size."""
    data = context.config.evaluation.data
    if not data:
        return {"num_images": 0, "summary": "no evaluation data"}
    split = _decode(context, "evaluation", data, context.config.evaluation.num_images)
    labelled = split.labels is not None
    return {"num_images": len(split.images), "labelled": labelled, "summary": f"{len(split.images)} evaluation images"}


def _decode(context: Context, name: str, data: str, limit: int) -> Any:
    from vit_convert.images.decode import decode_split
    from vit_convert.images.sources import open_images

    height, width = context.results["checkpoint"]["image_size"]
    return decode_split(
        open_images(data),
        context.bundle.images(name),
        context.bundle.labels(name),
        height,
        width,
        _preprocess(context),
        limit=limit,
        progress=context.progress,
    )


def _preprocess(context: Context) -> Any:
    from vit_convert.images.preprocess import Preprocess

    return Preprocess.from_dict(context.results["checkpoint"]["preprocess"])


def _prepare(context: Context) -> Any:
    """Maps a uint8 batch to the graph's input."""
    normalize, nchw = _preprocess(context).normalize, context.config.layout == "NCHW"
    return lambda batch: np.ascontiguousarray(normalize(batch).transpose(0, 3, 1, 2)) if nchw else normalize(batch)


def _evaluation(context: Context) -> tuple[np.ndarray, np.ndarray] | None:
    """Labelled images, or None where the config has none."""
    if not context.results["images"].get("labelled"):
        return None
    return np.load(context.bundle.images("evaluation"), mmap_mode="r"), np.load(context.bundle.labels("evaluation"))


def compute_reference(context: Context) -> dict[str, Any]:
    """Computes JAX outputs and taps on a few images, and JAX's top-1 on the labelled ones."""
    from vit_convert.images.decode import pick
    from vit_convert.images.noise import seeded_noise

    model, count = _model(context), context.config.check.num_images
    normalize = _preprocess(context).normalize
    if context.results["images"]["num_images"]:
        images = np.load(context.bundle.images("evaluation"), mmap_mode="r")
        source, raw = "evaluation images", np.asarray(images[pick(len(images), count)])
    else:
        height, width = context.results["checkpoint"]["image_size"]
        source, raw = "seeded noise", seeded_noise(count, height, width)
    inputs = normalize(raw)
    outputs = model.run(inputs)
    for name, value in outputs.items():
        if not np.isfinite(value).all():
            raise CheckError(f"{name}: the JAX model itself gives NaN or infinity on {source}", fix="Check the checkpoint and the preprocessing.")
    fed = _prepare(context)(raw)
    with atomic(context.bundle.reference) as temporary, open(temporary, "wb") as f:
        np.savez(f, images=fed, **outputs)
    result = {"source": source, "num_images": len(raw), "tensors": list(outputs), "summary": f"{len(raw)} images, {source}"}
    if labelled := _evaluation(context):
        logits = []
        with context.progress.bar("JAX top-1", total=len(labelled[0])) as advance:
            for start in range(0, len(labelled[0]), _EVALUATION_BATCH):
                batch = normalize(np.asarray(labelled[0][start : start + _EVALUATION_BATCH]))
                logits.append(model.run(batch)[model.output])
                advance(len(batch))
        result["top1"] = top1_accuracy(np.concatenate(logits), labelled[1])
        result["summary"] += f", top-1 {result['top1']:.2f} %"
    return result


# --- export and check -----------------------------------------------------------------------------------------------


def target_name(context: Context) -> str:
    """The target asked for, or the one that the backend reads."""
    asked = context.config.target
    if asked != "auto":
        return asked
    backend = context.config.engine.backend
    if backend in _BACKEND_TARGETS:
        return _BACKEND_TARGETS[backend]
    from vit_convert.engine.requests import target_of

    return target_of(_backend(backend))


def _export_inputs(context: Context) -> Any:
    return [target_name(context), context.config.layout, context.config.taps]


def _graph_files(context: Context, precision: str) -> list[pathlib.Path]:
    path = context.bundle.onnx(precision)
    return [path, path.with_name(path.name + ".data")]


def export(context: Context) -> dict[str, Any]:
    """Traces, substitutes and writes model.onnx."""
    from vit_convert.export.exporter import export_model
    from vit_convert.export.targets import target_named

    report = export_model(
        _model(context),
        context.bundle.onnx(),
        image_size=tuple(context.results["checkpoint"]["image_size"]),
        target=target_named(target_name(context)),
        layout=context.config.layout,
        taps=context.config.taps,
    )
    context.scratch.clear()  # the checkpoint and JAX's copies of it are not needed any more
    applied = sum(rule["applied"] for rule in report.rules)
    summary = f"{report.num_nodes} nodes, {report.nodes_per_block} a block, {applied} substitutions, opset {report.opset}"
    return {**dataclasses.asdict(report), "target": target_name(context), "summary": summary}


def _tolerance(context: Context, precision: str) -> Tolerance:
    check = context.config.check
    if precision == "fp32":
        return Tolerance(check.atol, check.rtol, check.cosine)
    return Tolerance(0.0, float("inf"), check.int8_cosine if precision in ("int8", "fp8") else check.fp16_cosine)


def check(context: Context) -> dict[str, Any]:
    """Checks model.onnx against JAX, block by block, and its top-1."""
    return _check_precision(context, "fp32")


def _check_precision(context: Context, precision: str) -> dict[str, Any]:
    """Compares one graph with the reference; a miss raises CheckError that carries the result for the report."""
    from vit_convert.export.check import batch_sizes, check_graph, graph_logits

    path, output = context.bundle.onnx(precision), context.results["checkpoint"]["output"]
    with np.load(context.bundle.reference) as file:
        reference = {name: file[name] for name in file.files}
    tolerance = _tolerance(context, precision)
    judged = list(reference) if precision == "fp32" else [output]  # what lower precision does inside is reported, the result is judged
    rows = check_graph(path, reference, batch_sizes(len(reference["images"])), tolerance, judged=judged)
    final = next(row for row in rows if row.tensor == output)
    missed = [row for row in rows if row.passed is False]
    result: dict[str, Any] = {
        "precision": precision,
        "passed": not missed,
        "tolerance": str(tolerance),
        "max_abs": final.max_abs,
        "max_rel": final.max_rel,
        "cosine": final.cosine,
        "blocks": [dataclasses.asdict(row) for row in rows],
        "summary": f"max abs {final.max_abs:.2g} ({final.max_rel:.2g} of scale), cosine {final.cosine:.7f}",
    }
    if missed:
        first = min(missed, key=lambda row: list(reference).index(row.tensor))
        worst = max(missed, key=lambda row: row.max_rel)
        raise _missed(
            f"{path.name}: {worst.tensor} differs from JAX by {worst.max_abs:.3g} ({worst.max_rel:.3g} of its scale), "
            f"cosine {worst.cosine:.6f}, at batch {worst.batch}; needed {tolerance}. First to miss: {first.tensor}.",
            result,
        )
    if labelled := _evaluation(context):
        logits = graph_logits(
            path, labelled[0], _prepare(context), output, batch_size=_EVALUATION_BATCH, label=f"{precision} top-1", progress=context.progress
        )
        result["top1"] = top1_accuracy(logits, labelled[1])
        result["summary"] += f", top-1 {result['top1']:.2f} %"
        drop, allowed = context.results["reference"]["top1"] - result["top1"], context.config.check.max_top1_drop
        if drop > allowed:
            result["passed"] = False
            raise _missed(f"{path.name}: top-1 is {result['top1']:.2f} %, {drop:.2f} points below JAX; allowed {allowed:g}", result)
    return result


def _missed(message: str, result: dict[str, Any]) -> CheckError:
    error = CheckError(message, fix="README, 'How to read the checks', says what usually causes it.")
    error.result = result  # type: ignore[attr-defined]
    return error


# --- calibration and lower precisions -------------------------------------------------------------------------------


def _lowered(context: Context) -> list[str]:
    """Precisions that need a graph of their own: all but fp32 where precision lives in the graph, Q/DQ alone for TensorRT 8."""
    asked = [precision for precision in configs.precisions(context.config) if precision != "fp32"]
    if target_name(context) == "trt8":
        if unsupported := {"bf16", "fp8"} & set(asked):
            raise UsageError(f"config.precision={context.config.precision}: target trt8 has no {', '.join(sorted(unsupported))}")
        return ["int8"] if "int8" in asked and not context.config.engine.calibrator else []
    return asked


def _wants_calibration(context: Context) -> bool:
    return bool({"int8", "fp8"} & set(configs.precisions(context.config)))


def _calibrate_inputs(context: Context) -> Any:
    calibration = context.config.calibration
    lists = [list(context.config[key]) for key in ("keep_fp32", "keep_fp16", "quantize_only")]
    return [_plain(calibration), _source_identity(calibration.data), lists]


def _place(context: Context, model: Any) -> Any:
    from vit_convert.quantize.placement import place

    config = context.config
    return place(
        model,
        attention=config.calibration.attention,
        keep_fp32=config.keep_fp32,
        keep_fp16=config.keep_fp16,
        quantize_only=config.quantize_only,
    )


def calibrate(context: Context) -> dict[str, Any]:
    """Decodes the calibration images and measures the ranges of the tensors that will be quantized."""
    import onnx_ir as ir

    from vit_convert.images.noise import seeded_noise
    from vit_convert.quantize.calibrate import calibrate as measure

    config = context.config.calibration
    if config.data:
        images, source = _decode(context, "calibration", config.data, config.num_images).images, config.data
    else:
        height, width = context.results["checkpoint"]["image_size"]
        images, source = seeded_noise(min(config.num_images, _EVALUATION_BATCH), height, width), "seeded noise"
        context.progress.warn("calibration.data is empty: ranges come from noise, so the INT8 engine shows speed and not accuracy")
        with atomic(context.bundle.images("calibration")) as temporary, open(temporary, "wb") as f:
            np.save(f, images)
    placement = _place(context, ir.load(context.bundle.onnx()))
    for block, reason in placement.declined.items():
        context.progress.warn(f"{block}: attention is not quantized: {reason}")
    calibration = measure(
        context.bundle.onnx(),
        images,
        _prepare(context),
        placement.tensors(),
        method=config.method,
        batch_size=config.batch_size,
        progress=context.progress,
    )
    calibration.save(context.bundle.calibration)
    clipped = sum(calibration.thresholds[name] < 0.999 * calibration.amax[name] for name in calibration.thresholds)
    return {
        "method": config.method,
        "num_images": len(images),
        "source": source,
        "num_tensors": len(calibration.thresholds),
        "num_clipped": clipped,
        "summary": f"{config.method}, {len(images)} images, {len(calibration.thresholds)} tensors, {clipped} clipped",
    }


def _lower_inputs(context: Context) -> Any:
    return [_lowered(context), target_name(context), _plain(context.config.check), list(context.config.keep_fp32)]


def _lowered_files(context: Context) -> list[pathlib.Path]:
    return [file for precision in _lowered(context) for file in _graph_files(context, precision)]


def lower(context: Context) -> dict[str, Any]:
    """Writes and checks one typed graph per lower precision; an accuracy miss fails after all of them were measured."""
    import onnx_ir as ir

    from vit_convert.onnx_file import save_onnx
    from vit_convert.quantize.calibrate import Calibration
    from vit_convert.quantize.qdq import quantize
    from vit_convert.quantize.typed import to_bf16, to_fp16

    config, target = context.config, target_name(context)
    checks: dict[str, Any] = {}
    failed: CheckError | None = None
    for precision in _lowered(context):
        model = ir.load(context.bundle.onnx())
        detail: dict[str, Any] = {}
        if precision == "int8":
            placement = _place(context, model)
            calibration = Calibration.load(context.bundle.calibration)
            model = quantize(model, calibration, placement.sites, target=target)
            detail["quantized"] = [site.name for site in placement.sites]
        if target != "trt8":
            typed = to_bf16(model, keep_fp32=config.keep_fp32) if precision == "bf16" else to_fp16(model, keep_fp32=config.keep_fp32)
            for name, largest in typed.overflowing.items():
                context.progress.warn(f"{name}: |w| reaches {largest:.3g}, beyond fp16; it stays fp32")
            model = typed.model
            detail |= {"fp32_islands": typed.islands, "num_casts": typed.num_casts, "num_subnormal": typed.num_subnormal}
        save_onnx(model, context.bundle.onnx(precision))
        del model
        try:
            checks[precision] = {**_check_precision(context, precision), **detail}
        except CheckError as e:
            checks[precision] = {**getattr(e, "result", {}), **detail}
            failed = failed or e
    summary = "; ".join(f"{p}: cosine {c['cosine']:.6f}" + (f", top-1 {c['top1']:.2f} %" if "top1" in c else "") for p, c in checks.items())
    if failed is not None:
        failed.result = {"checks": checks}  # type: ignore[attr-defined]
        raise failed
    return {"checks": checks, "summary": summary}


# --- build ----------------------------------------------------------------------------------------------------------


@functools.cache
def _backend(name: str) -> Any:
    from vit_convert.engine.trt import load_backend

    return load_backend(name)


def _plans(context: Context) -> list[pathlib.Path]:
    backend = _backend(context.config.engine.backend)
    return [_plan(context, backend, precision) for precision in configs.precisions(context.config)]


def _plan(context: Context, backend: Any, precision: str) -> pathlib.Path:
    return context.bundle.plan(backend.name, backend.version, backend.arch, precision)


def _build_inputs(context: Context) -> Any:
    backend = _backend(context.config.engine.backend)
    return [backend.name, backend.version, backend.arch, _plain(context.config.engine), _plain(context.config.batch), configs.precisions(context.config)]


def build(context: Context) -> dict[str, Any]:
    """Builds an engine for each precision."""
    from vit_convert.engine.requests import build_bundle

    engines = build_bundle(
        _backend(context.config.engine.backend),
        context.bundle,
        context.config,
        precisions=configs.precisions(context.config),
        target=target_name(context),
        image_size=context.results["checkpoint"]["image_size"],
        preprocess=context.results["checkpoint"]["preprocess"],
        progress=context.progress,
    )
    summary = ", ".join(f"{e['precision']} {e['bytes'] / 2**20:.1f} MiB" for e in engines)
    return {"engines": engines, "summary": f"{engines[0]['backend']} {engines[0]['version']}: {summary}"}


def _plain(config: Any) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in config.to_dict().items()}
