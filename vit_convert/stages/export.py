"""The export stage: writes the model as `model.onnx`, and the other lowerings for `tune` to choose from."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vit_convert.core import chosen_lowering
from vit_convert.core import config as configs
from vit_convert.core.bundle import Bundle, write_json
from vit_convert.core.errors import ExportError
from vit_convert.core.pipeline import Context, Stage
from vit_convert.core.stage_results import ExportResult, Lowering
from vit_convert.core.text_length import varies
from vit_convert.core.user_code import user_code
from vit_convert.stages.calibrate import patterns
from vit_convert.stages.checkpoint import model_of
from vit_convert.stages.common import dialect_for, graph_files, preprocess_of, with_weights

if TYPE_CHECKING:
    from vit_convert.export.exporter import ExportReport


def _inputs(context: Context) -> Any:
    config = context.config
    return [dialect_for(context).name, config.layout, config.taps, config.input, _lowerings(context)]


def _outputs(context: Context) -> list[pathlib.Path]:
    spelled = (context.bundle.lowering(name) for name in _lowerings(context))
    return [
        *graph_files(context, "fp32"),
        context.bundle.signature,
        *(file for path in spelled for file in with_weights(path)),
    ]


def export(context: Context) -> ExportResult:
    """Traces, substitutes and writes model.onnx and its lowerings, and removes lowerings that are no longer asked
    for."""
    from vit_convert.export.targets import lowering_named, target_named

    checkpoint, preprocess, name = context.results.checkpoint, preprocess_of(context), dialect_for(context).name
    dynamic = varies(checkpoint.sizes)
    target = target_named(name, dynamic=dynamic)
    spelled = {lowering: lowering_named(name, lowering) for lowering in _lowerings(context)}
    options: dict[str, Any] = {
        "layout": context.config.layout,
        "taps": context.config.taps,
        "dynamic_patch": checkpoint.patch_size if checkpoint.image_range else 0,
        "dynamic_length": checkpoint.text_range is not None,
        "pixels": (preprocess.scale, preprocess.offset) if context.config.input == "uint8" else None,
    }
    report = _export(context, context.bundle.onnx(), target, options)
    signature = model_of(context).signature.of_graph(
        context.config.layout, uint8=context.config.input == "uint8", dynamic=dynamic
    )
    write_json(context.bundle.signature, signature.to_dict())
    _require_names(context)
    _remove_lowerings(context.bundle, keep=list(spelled))
    written = {}
    for lowering, spelled_target in spelled.items():
        found = _export(context, context.bundle.lowering(lowering), spelled_target, options)
        written[lowering] = Lowering.part_of(found)
    applied = sum(rule.applied for rule in report.rules)
    summary = (
        f"{report.num_nodes} nodes, {report.nodes_per_block} a block, {applied} substitutions, opset {report.opset}"
    )
    summary += f"; also as {', '.join(written)}" if written else ""
    return ExportResult(
        **{field.name: getattr(report, field.name) for field in dataclasses.fields(report)},
        target=name,
        lowerings=written,
        lowering=next(iter(_advised(context)), ""),
        int8_lowering=_advised_int8(context),
        summary=summary,
    )


def _export(context: Context, path: pathlib.Path, target: Any, options: dict[str, Any]) -> "ExportReport":
    """Exports the model; any error in a user's own model counts as a failed export, since it may run any code."""
    from vit_convert.export.exporter import export_model

    model = model_of(context)
    own = context.config.model is not None
    with user_code(f"config.model: {path.name} of {model.name}", ExportError) if own else contextlib.nullcontext():
        return export_model(model, path, target=target, **options)


def _require_names(context: Context) -> None:
    """Refuses config patterns that match nothing in the graph, right away, even if no later stage uses them."""
    if not any(patterns(context).values()):
        return
    import onnx_ir as ir

    from vit_convert.quantize.placement import place

    place(ir.load(context.bundle.onnx()), attention=context.config.calibration.attention, **patterns(context))


def _lowerings(context: Context) -> list[str]:
    return chosen_lowering.lowerings(context.config, _advised(context), _advised_int8(context))


def _advised(context: Context) -> tuple[str, ...]:
    """The lowerings for fp16 engines, the fastest first: our kernels for GroupNorms, which a host may not have, and
    TensorRT's attention plugin where it has a kernel."""
    dialect, checkpoint = dialect_for(context), context.results.checkpoint
    if "fp16" not in configs.precisions(context.config) or checkpoint.image_range:
        return ()
    from vit_convert.export.passes import attention_plugin, group_norms

    # a user's own model has neither
    found = (
        (dialect.norm_lowering, checkpoint.group_norms and all(map(group_norms.fits, checkpoint.group_norms))),
        (
            dialect.fp16_lowering,
            checkpoint.attentions and all(attention_plugin.fits(*sizes) for sizes in checkpoint.attentions),
        ),
    )
    return tuple(lowering for lowering, fits in found if lowering and fits)


def _advised_int8(context: Context) -> str:
    """The lowering for int8 engines: our kernels where this host has them and TensorRT's attention plugin, whose place
    they take, has a kernel."""
    from vit_convert import kernels

    dialect = dialect_for(context)
    known, fits = dialect.int8_lowerings, dialect.fp16_lowering in _advised(context)
    return known[0] if known and fits and kernels.library().is_file() else ""


def _remove_lowerings(bundle: Bundle, *, keep: Sequence[str]) -> None:
    for path in bundle.lowerings.glob("*.onnx"):
        if path.stem not in keep:
            for file in with_weights(path):
                file.unlink(missing_ok=True)


EXPORT = Stage("export", ("checkpoint",), ExportResult, export, _inputs, _outputs)
