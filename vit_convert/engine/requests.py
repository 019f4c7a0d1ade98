"""The build stage: which graph, profile and options each precision of a bundle gets; the same on an export host and on a GPU host."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections

from vit_convert.bundle import Bundle
from vit_convert.engine.build import BuildRequest, Profile, build_engine
from vit_convert.engine.trt import Backend
from vit_convert.progress import Progress


def target_of(backend: Backend) -> str:
    """The graph dialect that a backend reads: "rtx", "trt8" (typed by flags), "trt10" (either) or "trt11" (typed graphs alone)."""
    if backend.name == "rtx":
        return "rtx"
    if not backend.strongly_typed:
        return "trt8"
    return "trt10" if backend.weakly_typed else "trt11"


def graph_for(bundle: Bundle, precision: str, target: str, *, calibrator: bool = False) -> pathlib.Path:
    """The graph to build a precision from: its own typed one, or for TensorRT 8 the fp32 graph unless it holds Q/DQ pairs."""
    from_fp32 = target == "trt8" and (precision in ("fp32", "fp16") or calibrator)
    return bundle.onnx("fp32" if from_fp32 else precision)


def batch_profile(image_size: Sequence[int], layout: str, batch: Mapping[str, int]) -> Profile:
    """One optimization profile over the batch.

    Args:
        image_size: (height, width) in pixels.
        layout: "NHWC" or "NCHW".
        batch: {"min", "opt", "max"}.

    Returns:
        {"images": (smallest, optimal, largest shape)}.
    """
    shape = (*image_size, 3) if layout == "NHWC" else (3, *image_size)
    low, best, high = ((batch[key], *shape) for key in ("min", "opt", "max"))
    return {"images": (low, best, high)}


def build_bundle(
    backend: Backend,
    bundle: Bundle,
    config: ml_collections.ConfigDict,
    *,
    precisions: Sequence[str],
    target: str,
    image_size: Sequence[int],
    preprocess: Mapping[str, Any],
    progress: Progress,
) -> list[dict[str, Any]]:
    """Builds one engine per precision.

    Args:
        backend: the TensorRT that builds.
        bundle: holds the graphs; gets the engines.
        config: the resolved config.
        precisions: what to build, in order.
        target: the dialect that the graphs are written in.
        image_size: (height, width) in pixels.
        preprocess: the preprocessing record, which travels with each engine.
        progress: what people and machines see.

    Returns:
        Per engine: backend, version, arch, precision, path, bytes, build_seconds, products, fused_attention, warnings.

    Raises:
        BuildError: a graph does not parse, a precision would not be honoured, or TensorRT fails.
    """
    options = config.engine
    timing_cache = pathlib.Path(options.timing_cache) if options.timing_cache else bundle.root / "timing"
    engines = []
    for precision in precisions:
        request = BuildRequest(
            onnx_path=graph_for(bundle, precision, target),
            precision=precision,
            profiles=[batch_profile(image_size, config.layout, config.batch)],
            workspace_gib=options.workspace_gib,
            opt_level=options.opt_level,
            timing_cache=timing_cache,
            tf32=options.tf32,
            keep_fp32=tuple(config.keep_fp32),
            preprocessing=dict(preprocess),
        )
        plan = bundle.plan(backend.name, backend.version, backend.arch, precision)
        result = build_engine(backend, request, plan, progress=progress)
        fused = None if result.fused_attention is None else dataclasses.asdict(result.fused_attention)
        engines.append(
            {
                "backend": backend.name,
                "version": backend.version,
                "arch": backend.arch,
                "precision": precision,
                "path": str(plan.relative_to(bundle.root)),
                "bytes": result.num_bytes,
                "build_seconds": round(result.seconds, 3),
                "products": result.products,
                "fused_attention": fused,
                "fused_attention_unknown": result.layers_missing,
                "warnings": result.warnings,
            }
        )
    return engines
