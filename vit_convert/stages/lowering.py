"""A lowering whose ranges are measured here, in place of Q/DQ pairs: its weights, its ranges, and what of it stays out
of int8."""

import dataclasses
import math
import pathlib
import tempfile
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vit_convert.core import config as configs
from vit_convert.core.errors import CheckError
from vit_convert.core.pipeline import Context
from vit_convert.core.stage_results import OutputShare, Rotated, ShareOfProduct
from vit_convert.stages.common import dialect_for, evaluation, prepare
from vit_convert.stages.other_weights import even_out
from vit_convert.stages.text import samples_file

if TYPE_CHECKING:
    from vit_convert.quantize.calibrate import Calibration
    from vit_convert.quantize.output_share import Choice
    from vit_convert.quantize.placement import Patterns, Site
    from vit_convert.quantize.precision_plan import Budget

_IMAGES = 48  # calibration images on which the output is judged


@dataclasses.dataclass(frozen=True)
class MeasuredLowering:
    """What measuring a lowering found.

    Attributes:
        calibration: ranges of what products read, with those left out for their own error.
        linears: the products that the config allows in int8.
        share: what else is left out, for its share in the output's error; None where that was not asked for.
        rotated: what was rotated.
    """

    calibration: "Calibration"
    linears: list["Site"]
    share: OutputShare | None
    rotated: Rotated | None


def measure_lowering(
    context: Context, lowering: str, images: np.ndarray, asked: "Patterns", *, may_leave_out: bool
) -> MeasuredLowering:
    """Writes a lowering with evened-out channels, and its ranges from the same images by the same method.

    Tensors that no product reads are not clipped, and those whose product stays out of int8 get no range.

    Args:
        context: of the conversion.
        lowering: its name.
        images: for calibration.
        asked: the config's patterns.
        may_leave_out: whether products that cost too much stay out of int8.
    """
    import onnx_ir as ir

    from vit_convert.core.onnx_file import save_onnx
    from vit_convert.export.passes.fused_encoder import quantized_tensors, with_what_leads_to, write_in_fp16
    from vit_convert.quantize.calibrate import calibrate as measure
    from vit_convert.quantize.placement import place

    config, path = context.config.calibration, context.bundle.lowering(f"{lowering}.int8")
    source = context.bundle.lowering(lowering)
    model = ir.load(source)
    read, other = quantized_tensors(model, branches=config.branches)
    linears = [site for site in _as_asked(context, place(model).sites, asked) if site.tensor in read]
    rotated = even_out(context, source, path, linears, images)
    options: Any = {"batch_size": config.batch_size, "device": config.device, "progress": context.progress}
    found = measure(path, images, prepare(context), read, method=config.method, **options)
    rest = measure(path, images, prepare(context), other, method="minmax", **options)
    if may_leave_out:
        found = found.leave_out([site.tensor for site in linears], config.max_error)
    ranges, amax = {**rest.thresholds, **found.thresholds}, {**rest.amax, **found.amax}

    def without(tensors: set[str]) -> "Calibration":
        gone = with_what_leads_to(ir.load(path), tensors)
        kept = {name: threshold for name, threshold in ranges.items() if name not in gone}
        return dataclasses.replace(found, thresholds=kept, amax=amax)

    in_fp16 = {*read} - ({site.tensor for site in linears} - {*found.left_out})
    budget = _budget(context) if may_leave_out else None
    share, dear = None, set[str]()
    if budget is not None:
        share, dear = _by_share(context, path, without(in_fp16), linears, images, budget)
    model = ir.load(path)
    write_in_fp16(model, in_fp16 | dear)
    save_onnx(model, path)
    without(in_fp16 | dear).save(context.bundle.ranges(lowering))
    return MeasuredLowering(found, linears, share, rotated)


def _budget(context: Context) -> "Budget | None":
    """What the output may lose: a plan's budget for precision=auto, else `calibration.min_cosine`; None for nothing to
    keep to."""
    from vit_convert.quantize.precision_plan import Budget

    config = context.config
    if configs.is_planned(config):
        return Budget(config.plan.cosine or config.check.int8_cosine, config.plan.accuracy_budget, 0)
    if config.calibration.min_cosine and config.calibration.data:  # noise shows no accuracy
        return Budget(config.calibration.min_cosine, math.inf, 0)
    return None


def _by_share(
    context: Context,
    path: pathlib.Path,
    ranges: "Calibration",
    linears: Sequence["Site"],
    images: np.ndarray,
    budget: "Budget",
) -> tuple[OutputShare, set[str]]:
    """What stays out of int8 for its share in the output's error, and the tensors that its products read.

    Args:
        context: of the conversion.
        path: the lowering.
        ranges: of all that may be in int8.
        linears: the products that may.
        images: for calibration.
        budget: what the output may lose.
    """
    import onnx_ir as ir

    from vit_convert.images.decode import pick
    from vit_convert.quantize.output_share import choose, multiplications, units_by_tensor
    from vit_convert.quantize.ranged import sites_with_ranges
    from vit_convert.quantize.sensitivity import Sensitivity

    config, model, labels = context.config, ir.load(path), None
    units = units_by_tensor(model, sites_with_ranges(model, ranges.thresholds))
    tensors = {site.tensor for site in linears}
    products = [unit for unit in units if unit.sites[0].tensor in tensors]
    source, most = "calibration images", _IMAGES
    if configs.is_planned(config):
        most = config.plan.num_images
        if context.results.images.num_images:
            images, source = np.load(samples_file(context, "evaluation"), mmap_mode="r"), "evaluation images"
            labelled = evaluation(context)
            labels = None if labelled is None else labelled[1]
    chosen = pick(len(images), most)
    times = multiplications(path, products, images, prepare(context))
    with tempfile.TemporaryDirectory() as folder:
        sensitivity = Sensitivity(
            pathlib.Path(folder) / "search.json",
            path,
            ranges,
            units,
            np.asarray(images[chosen]),
            None if labels is None else labels[chosen],
            prepare(context),
            target=dialect_for(context).name,
            precision="int8",
            rest="fp32",  # what a builder flag does to fp32 is not in the graph
            lower=lambda graph: graph,
            source=source,
            batch_size=config.calibration.batch_size,
            progress=context.progress,
        )
        found = choose(sensitivity, times, budget)
    said = _told(context, found, times, budget, (len(chosen), source))
    names = {row.site for row in said.products}
    return said, {site.tensor for unit in products if unit.name in names for site in unit.sites}


def _told(
    context: Context, found: "Choice", times: Mapping[str, float], budget: "Budget", images: tuple[int, str]
) -> OutputShare:
    """The choice as the report has it; says what stays fp16, and why.

    Raises:
        CheckError: a plan is asked for, and nothing in int8 is within its budget.
    """
    number, source = images
    if found.missed and configs.is_planned(context.config):
        raise CheckError(
            f"config.precision=auto: with every product in fp16 that may be, {found.missed}",
            fix="Allow more (config.plan.accuracy_budget, config.plan.cosine), or stay with fp16.",
        )
    if found.missed:
        context.progress.warn(
            f"config.calibration.min_cosine={budget.cosine:g} is out of reach: with every product in fp16 that may be, "
            f"{found.missed} of {number} {source}; none is left out for it"
        )
    elif found.left_out:
        context.progress.warn(
            f"{', '.join(found.left_out)}: stay{'s' * (len(found.left_out) == 1)} fp16, as they cost the output most "
            f"for their time: cosine {found.cosine_before:.4f} → {found.cosine:.4f}, the smallest of {number} {source}"
        )
    left_out = () if found.missed else found.left_out
    whole = sum(times.values())
    return OutputShare(
        products=tuple(
            ShareOfProduct(site=name, share=found.shares[name], multiplications=times[name] / whole)
            for name in left_out
        ),
        min_cosine=budget.cosine,
        cosine_before=found.cosine_before,
        cosine=found.cosine_before if found.missed else found.cosine,
        num_images=number,
        source=source,
    )


def _as_asked(context: Context, sites: Sequence["Site"], asked: "Patterns") -> list["Site"]:
    """The sites of a lowering that the config's patterns leave in INT8.

    The patterns name layers of model.onnx, where queries, keys and values may be three linears. In the lowering they
    are one, which is quantized if all three would be.
    """
    import onnx_ir as ir

    from vit_convert.quantize.placement import place

    meant = {site.name for site in place(ir.load(context.bundle.onnx()), **asked).sites}

    def is_meant(site: "Site") -> bool:
        parts = {f"{site.block}/{kind}" for kind in ("query", "key", "value")}
        return site.name in meant or (site.kind == "qkv" and parts <= meant)

    return [site for site in sites if is_meant(site)]
