"""The sensitivity and plan stages: what each layer loses when quantized, and which layers a budget allows."""

import pathlib
from typing import TYPE_CHECKING, Any

import numpy as np

from vit_convert.core import config as configs
from vit_convert.core.bundle import read_json
from vit_convert.core.check_results import PlanResult, SensitivityResult
from vit_convert.core.pipeline import Context, Stage
from vit_convert.stages.calibrate import limits
from vit_convert.stages.common import dialect_for, evaluation, plain, prepare
from vit_convert.stages.other_weights import source_graph, unquantized
from vit_convert.stages.quantize import activation_ranges
from vit_convert.stages.text import samples_file

if TYPE_CHECKING:
    from vit_convert.quantize.precision_plan import Budget

_BATCH = 64  # each run also dequantizes all weights, which many images share


def _wants_sensitivity(context: Context) -> bool:
    return bool(context.config.sensitivity)


def _wants_plan(context: Context) -> bool:
    """A lowering without Q/DQ is planned while its ranges are measured, see `stages.lowering`."""
    return configs.is_planned(context.config) and not context.config.plan.file and not unquantized(context)


def _scan_inputs(context: Context) -> Any:
    config = context.config
    return [config.plan.type, config.plan.num_images, list(config.keep_fp32)]


def _budget(context: Context) -> "Budget":
    from vit_convert.quantize.precision_plan import Budget

    plan = context.config.plan
    return Budget(plan.cosine or context.config.check.int8_cosine, plan.accuracy_budget, plan.runs)


def _plan_inputs(context: Context) -> Any:
    return [plain(context.config.plan), context.config.check.int8_cosine, list(context.config.keep_fp32)]


def _sensitivity(context: Context, path: pathlib.Path) -> Any:
    import onnx_ir as ir

    from vit_convert.images.decode import pick
    from vit_convert.quantize.calibrate import Calibration
    from vit_convert.quantize.half_precision import to_fp16
    from vit_convert.quantize.sensitivity import Sensitivity, candidates

    config, graph = context.config, source_graph(context)
    labelled = evaluation(context)
    split = "evaluation" if context.results.images.num_images else "calibration"
    images = np.load(samples_file(context, split), mmap_mode="r")
    chosen = pick(len(images), config.plan.num_images)
    dialect = dialect_for(context)
    rest = "fp32" if dialect.precision_by_flag else "fp16"  # what a builder flag does to fp32 is not in the graph

    def lower(model: Any) -> Any:
        if rest == "fp32":
            return model
        return to_fp16(model, keep_fp32=config.keep_fp32, amax=activation_ranges(context, graph)[0]).model

    return Sensitivity(
        path,
        graph,
        Calibration.load(context.bundle.calibration),
        candidates(ir.load(graph), limits(context, config.plan.type), attention=config.calibration.attention),
        images[chosen],
        labelled[1][chosen] if labelled else None,
        prepare(context),
        target=dialect.name,
        precision=config.plan.type,
        rest=rest,
        lower=lower,
        source=f"{split} images",
        batch_size=_BATCH,
        depends_on={"keep_fp32": list(config.keep_fp32)},
        known=context.bundle.sensitivity,
        progress=context.progress,
    )


def scan_sensitivity(context: Context) -> SensitivityResult:
    """Quantizes one kind of linear in one block at a time, then one whole block at a time; continues an interrupted
    scan."""
    from vit_convert.report.sensitivity import plot_ranking, ranking

    sensitivity, picture = _sensitivity(context, context.bundle.sensitivity), _picture(context)
    sensitivity.scan()
    if missing := plot_ranking(sensitivity.record, picture):
        picture.unlink(missing_ok=True)  # an earlier scan's
        context.progress.say(f"  no {picture.name}: {missing}")
    worst = ranking(sensitivity.record).units[0]
    images = f"{sensitivity.record.scan_images} {sensitivity.record.source}"
    return SensitivityResult(
        precision=context.config.plan.type,
        num_units=len(sensitivity.units),
        worst=worst,
        summary=f"{len(sensitivity.units)} units on {images}; worst {worst.name}: 1 - cosine {worst.error:.2g}",
    )


def plan(context: Context) -> PlanResult:
    """Finds the largest quantized set within the budget and writes it as `precision_plan.json`."""
    from vit_convert.quantize.precision_plan import make_plan, write_plan
    from vit_convert.quantize.ranking import unit_costs

    # the scan's own file is left as it was
    sensitivity, budget = _sensitivity(context, context.bundle.plan_search), _budget(context)
    if (read_json(context.bundle.plan_search) or {}).get("key") != sensitivity.record.key:
        context.bundle.plan_search.unlink(missing_ok=True)  # another model's

    def costs() -> dict[str, float]:
        return unit_costs(
            source_graph(context),
            sensitivity.calibration,
            sensitivity.units,
            np.load(samples_file(context, "calibration"), mmap_mode="r"),
            prepare(context),
            precision=context.config.plan.type,
            batch_size=context.config.calibration.batch_size,
            progress=context.progress,
        )

    found = make_plan(sensitivity, budget, costs)
    record = write_plan(context.bundle.precision_plan, found, sensitivity, budget)
    measured = record.measured
    share = (
        f"{len(found.units)} of {len(sensitivity.units)} units, {100 * measured.share_of_weights:.0f} % of "
        f"their weights"
    )
    top1 = "" if measured.top1 is None else f", top-1 {measured.top1:.2f} %"
    return PlanResult(
        precision=record.precision,
        budget=record.budget,
        measured=measured,
        fp32=record.fp32,
        images=record.images,
        left_out=record.left_out,
        path=context.bundle.precision_plan.name,
        num_units=len(found.units),
        num_candidates=len(sensitivity.units),
        summary=f"{share} in {record.precision}: cosine {measured.cosine:.5f}{top1}",
    )


def _picture(context: Context) -> pathlib.Path:
    return context.bundle.sensitivity.with_suffix(".png")


def _scanned(context: Context) -> list[pathlib.Path]:
    return [context.bundle.sensitivity, _picture(context)]


def _planned(context: Context) -> list[pathlib.Path]:
    return [context.bundle.precision_plan, context.bundle.plan_search]


SENSITIVITY = Stage(
    "sensitivity",
    ("reference", "calibrate"),
    SensitivityResult,
    scan_sensitivity,
    _scan_inputs,
    _scanned,
    _wants_sensitivity,
)
PLAN = Stage("plan", ("reference", "calibrate", "sensitivity"), PlanResult, plan, _plan_inputs, _planned, _wants_plan)
