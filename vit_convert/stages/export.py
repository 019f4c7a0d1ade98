"""The export stage: from the model to `model.onnx`."""

import dataclasses
from typing import Any

from vit_convert.pipeline import Context, Stage
from vit_convert.stages.checkpoint import model_of
from vit_convert.stages.common import graph_files, preprocess_of, target_name


def _inputs(context: Context) -> Any:
    config = context.config
    return [target_name(context), config.layout, config.taps, config.input, config.layernorm]


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


EXPORT = Stage("export", ("checkpoint",), export, _inputs, lambda c: graph_files(c, "fp32"))
