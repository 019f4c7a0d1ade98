"""The stages of one conversion, from the checkpoint to the engines; each imports what it needs when it runs."""

import dataclasses
import functools
import gc
import os
import pathlib
import sys
from typing import Any

import numpy as np

from vit_convert import config as configs
from vit_convert.errors import UsageError
from vit_convert.image_size import ImageRange, parse_range, sizes_of
from vit_convert.pipeline import Context, Stage, file_identity

EVALUATION_BATCH = 32
_BACKEND_TARGETS = {"rtx": "rtx", "none": "rtx"}


def stages() -> list[Stage]:
    """All stages in order; each reads what the ones before it left in the bundle."""
    from vit_convert.calibrate_stage import calibrate_stage  # these modules use what stands below
    from vit_convert.plan_stages import plan_stages
    from vit_convert.quantize_stage import quantize_stage
    from vit_convert.reference_stage import compute_reference, reference_files, reference_inputs

    return [
        Stage("checkpoint", (), load, _checkpoint_inputs),
        Stage("images", ("checkpoint",), decode_images, _images_inputs, _images_outputs),
        Stage("export", ("checkpoint",), export, _export_inputs, lambda c: graph_files(c, "fp32")),
        Stage("reference", ("checkpoint", "images"), compute_reference, reference_inputs, lambda c: list(reference_files(c).values())),
        Stage("check", ("reference", "export"), check, lambda c: plain(c.config.check)),
        calibrate_stage(),
        *plan_stages(),
        quantize_stage(),
        Stage("build", ("export", "quantize"), build, _build_inputs, _plans, lambda c: c.config.engine.backend != "none"),
        Stage("verify", ("reference", "build"), verify, lambda c: plain(c.config.check), needed=_can_run),
        Stage("benchmark", ("build",), benchmark, lambda c: plain(c.config.benchmark), needed=_can_run),
    ]


# --- checkpoint -----------------------------------------------------------------------------------------------------


def _checkpoint_inputs(context: Context) -> Any:
    config = context.config
    sizes = config.image_size if configs.is_dynamic(config) else configs.image_size(config)
    asked = [config.family, config.variant, sizes, config.outputs, config.num_classes, config.posemb_grid, config.preprocess]
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
    sizes = _image_range(context, arch)
    size = sizes.optimal if sizes else arch.image_size
    shown = str(sizes) if sizes else "x".join(map(str, size))
    return {
        "path": str(checkpoint.path),
        "sha256": checkpoint.sha256,
        "family": arch.family,
        "variant": arch.variant,
        "layout": checkpoint.layout.value,
        "num_params": checkpoint.num_params,
        "image_size": list(size),
        "image_range": sizes.to_dict() if sizes else None,
        "patch_size": arch.patch_size,
        "source_image_size": list(source),
        "num_classes": arch.num_classes,
        "pool": arch.pool,
        "output": "logits" if arch.num_classes else "features",
        "warnings": checkpoint.warnings,
        "preprocess": preprocess_for(family, size).to_dict(),
        "summary": f"ViT {arch.variant}, {checkpoint.num_params:,} parameters, {shown}",
    }


def _image_range(context: Context, architecture: Any) -> ImageRange | None:
    """The range of image sizes asked for, checked against the patches; None where one size is asked for."""
    from vit_convert.checkpoint.variants import check_image_size

    if not configs.is_dynamic(context.config):
        return None
    configs.require_resizable(context.config, architecture.family)
    sizes = parse_range(context.config.image_size, architecture.image_size)
    for size in (sizes.smallest, sizes.optimal, sizes.largest):
        check_image_size(size, architecture.patch_size)
    if min(sizes.smallest) < 2 * architecture.patch_size:
        raise UsageError(
            f"config.image_size={context.config.image_size!r}: a side of one patch ({architecture.patch_size} pixels)",
            fix="Begin with two patches: for one, backends differ in what interpolation between the corners means.",
        )
    return sizes


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
    model = model_of(context)
    num_params = sum(int(leaf.size) for leaf in model.params.values())
    family = "vit_jax" if config.preprocess == "auto" else config.preprocess
    return {
        "path": "",
        "sha256": "",
        "family": "user",
        "variant": getattr(config.model, "__name__", "model"),
        "num_params": num_params,
        "image_size": list(size),
        "image_range": None,
        "output": model.output,
        "warnings": [],
        "preprocess": preprocess_for(family, size).to_dict(),
        "summary": f"user model, {num_params:,} parameters, {'x'.join(map(str, size))}",
    }


def model_of(context: Context) -> Any:
    if "model" not in context.scratch:
        from vit_convert.models.model import user_model, vit_model

        if context.config.model is not None:
            made = context.config.model()
            module, variables = made if isinstance(made, tuple) else (made, None)
            size = configs.image_size(context.config)
            assert size is not None  # the checkpoint stage asks for it
            context.scratch["model"] = user_model(module, variables, image_shape=(*size, 3), output=context.config.outputs)
        else:
            checkpoint = _checkpoint(context)
            context.scratch["model"] = vit_model(checkpoint.architecture, checkpoint.params)
    return context.scratch["model"]


def _let_go_of_model(context: Context) -> None:
    """Frees the checkpoint and what JAX holds of it, so that onnxruntime does not come on top."""
    context.scratch.clear()
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
    gc.collect()  # a graph's nodes and values refer to each other


# --- images and reference -------------------------------------------------------------------------------------------


def _images_inputs(context: Context) -> Any:
    return [source_identity(context.config.evaluation.data), context.config.evaluation.num_images]


def source_identity(data: str) -> Any:
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
    split = decode(context, "evaluation", data, context.config.evaluation.num_images)
    labelled = split.labels is not None
    return {"num_images": len(split.images), "labelled": labelled, "summary": f"{len(split.images)} evaluation images"}


def decode(context: Context, name: str, data: str, limit: int) -> Any:
    from vit_convert.images.decode import decode_split
    from vit_convert.images.sources import open_images

    height, width = context.results["checkpoint"]["image_size"]
    return decode_split(
        open_images(data),
        context.bundle.images(name),
        context.bundle.labels(name),
        height,
        width,
        preprocess_of(context),
        limit=limit,
        progress=context.progress,
    )


def preprocess_of(context: Context) -> Any:
    from vit_convert.images.preprocess import Preprocess

    return Preprocess.from_dict(context.results["checkpoint"]["preprocess"])


def prepare(context: Context) -> Any:
    """Maps a uint8 batch to the graph's input."""
    normalize = np.asarray if context.config.input == "uint8" else preprocess_of(context).normalize
    nchw = context.config.layout == "NCHW"
    return lambda batch: np.ascontiguousarray(normalize(batch).transpose(0, 3, 1, 2)) if nchw else normalize(batch)


def evaluation(context: Context) -> tuple[np.ndarray, np.ndarray] | None:
    """Labelled images, or None where the config has none."""
    if not context.results["images"].get("labelled"):
        return None
    return np.load(context.bundle.images("evaluation"), mmap_mode="r"), np.load(context.bundle.labels("evaluation"))


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
    config = context.config
    return [target_name(context), config.layout, config.taps, config.input, config.layernorm]


def graph_files(context: Context, precision: str) -> list[pathlib.Path]:
    path = context.bundle.onnx(precision)
    return [path, path.with_name(path.name + ".data")]


def export(context: Context) -> dict[str, Any]:
    """Traces, substitutes and writes model.onnx."""
    from vit_convert.export.exporter import export_model
    from vit_convert.export.targets import target_named

    checkpoint, preprocess = context.results["checkpoint"], preprocess_of(context)
    dynamic = checkpoint["image_range"] is not None
    report = export_model(
        model_of(context),
        context.bundle.onnx(),
        image_size=tuple(checkpoint["source_image_size" if dynamic else "image_size"]),
        target=target_named(target_name(context), context.config.layernorm),
        layout=context.config.layout,
        taps=context.config.taps,
        dynamic_patch=checkpoint["patch_size"] if dynamic else 0,
        pixels=(preprocess.scale, preprocess.offset) if context.config.input == "uint8" else None,
    )
    applied = sum(rule["applied"] for rule in report.rules)
    summary = f"{report.num_nodes} nodes, {report.nodes_per_block} a block, {applied} substitutions, opset {report.opset}"
    return {**dataclasses.asdict(report), "target": target_name(context), "summary": summary}


def check(context: Context) -> dict[str, Any]:
    """Checks model.onnx against JAX, block by block, and its top-1."""
    from vit_convert.check_stage import check_precision

    _let_go_of_model(context)
    return check_precision(context, "fp32")


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
    config = context.config
    return [backend.name, backend.version, backend.arch, plain(config.engine), plain(config.batch), configs.precisions(config)]


def build(context: Context) -> dict[str, Any]:
    """Builds an engine for each precision."""
    from vit_convert.engine.requests import build_bundle

    engines = build_bundle(
        _backend(context.config.engine.backend),
        context.bundle,
        context.config,
        precisions=configs.precisions(context.config),
        target=target_name(context),
        image_size=sizes_of(context.results["checkpoint"]),
        preprocess=context.results["checkpoint"]["preprocess"],
        progress=context.progress,
    )
    summary = ", ".join(f"{e['precision']} {e['bytes'] / 2**20:.1f} MiB" for e in engines)
    return {"engines": engines, "summary": f"{engines[0]['backend']} {engines[0]['version']}: {summary}"}


def _can_run(context: Context) -> bool:
    """Whether this host runs the engines it builds: TensorRT-RTX builds without a GPU, TensorRT never does."""
    return context.config.engine.backend != "none" and _backend(context.config.engine.backend).gpu is not None


def verify(context: Context) -> dict[str, Any]:
    """Runs the engines against the reference, as `python -m vit_convert.engine verify` does on a GPU host."""
    from vit_convert.engine.facts import read_facts
    from vit_convert.engine.stages import verify_bundle

    return verify_bundle(
        _backend(context.config.engine.backend),
        context.bundle,
        context.config,
        read_facts(context.bundle),
        precisions=configs.precisions(context.config),
        progress=context.progress,
    )


def benchmark(context: Context) -> dict[str, Any]:
    """Measures the engines and recommends one of them."""
    from vit_convert.engine.stages import benchmark_bundle

    return benchmark_bundle(
        _backend(context.config.engine.backend),
        context.bundle,
        context.config,
        precisions=configs.precisions(context.config),
        warmup_seconds=1.0,
        progress=context.progress,
    )


def plain(config: Any) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in config.to_dict().items()}
