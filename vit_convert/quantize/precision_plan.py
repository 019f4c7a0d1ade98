"""Precision plans: the largest quantized set within a budget, found by measuring, written as a file that people read
and edit."""

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence

from vit_convert.core.bundle import read_json, write_json
from vit_convert.core.check_results import Loss, PlanBudget, PlanImages, PlanLoss, PlannedUnit, PrecisionPlan
from vit_convert.core.errors import CheckError, UsageError
from vit_convert.core.sensitivity_record import Measured
from vit_convert.quantize.sensitivity import Sensitivity

_ABOUT = (
    "A precision plan: the layers in `sites` are quantized, all others stay fp16. Edit the list (blocks such as "
    "block_03 and patterns such as */fc1 work too) and give this file as config.plan.file; `ranked` and `left_out` "
    "say what each layer costs."
)


@dataclasses.dataclass(frozen=True)
class Budget:
    """What a plan may lose.

    Attributes:
        cosine: smallest allowed cosine to the fp32 output, of any image.
        top1_drop: points of top-1 that may be lost against the fp32 graph; without labels it plays no part.
        runs: maximum number of sets tried after the bisection, each with a run over some images.
    """

    cosine: float
    top1_drop: float
    runs: int

    def missed(self, result: Measured, fp32: Measured) -> str:
        """Says why a result exceeds the budget; "" if it does not."""
        if result.cosine < self.cosine:
            return f"cosine {result.cosine:.7f} is below {self.cosine:g}"
        if result.top1 is not None and fp32.top1 is not None and fp32.top1 - result.top1 > self.top1_drop:
            return f"top-1 drops by {fp32.top1 - result.top1:.2f} points, allowed {self.top1_drop:g}"
        return ""


@dataclasses.dataclass(frozen=True)
class Plan:
    """A plan and how it was found.

    Attributes:
        units: names of the quantized units, least harmful first.
        measured: what they lose together.
        left_out: for each other unit, why.
        costs: of each unit, as used for the ranking; empty if nothing had to be ranked and not every unit was measured
            alone.
    """

    units: list[str]
    measured: Measured
    left_out: dict[str, str]
    costs: dict[str, float] = dataclasses.field(default_factory=dict)


def search(ranked: Sequence[str], measure: Callable[[Collection[str]], Measured], budget: Budget) -> Plan:
    """Finds a large set within a budget; unless some units were left untried, no further unit can be added to it.

    The longest prefix of the ranking is found by bisection, as if the loss grew with every unit; then the others are
    tried in turn and kept if the budget allows it, so that one sensitive unit does not exclude those ranked after it:
    one at a time at first, and twice as many after each success.

    Args:
        ranked: units, least harmful first.
        measure: measures a set.
        budget: what may be lost, and how many sets may be tried; untried units are left out.

    Returns:
        The Plan, whose set has been measured as a whole.
    """
    fp32 = measure([])
    # the longest prefix known to be within the budget, and the shortest known to exceed it
    within, over = 0, len(ranked) + 1
    length = len(ranked)
    while over - within > 1:
        if budget.missed(measure(ranked[:length]), fp32):
            over = length
        else:
            within = length
        length = (within + over) // 2
    chosen, rest, left_out, step = list(ranked[:within]), list(ranked[within:]), {}, 1
    for _ in range(budget.runs):
        if not rest:
            break
        group = rest[:step]
        why = budget.missed(measure([*chosen, *group]), fp32)
        if why and len(group) > 1:
            step = len(group) // 2
            continue
        rest = rest[len(group) :]
        if why:
            left_out[group[0]] = why
        else:
            chosen += group
            step = 2 * len(group)
    left_out |= dict.fromkeys(rest, f"not tried, because plan.runs={budget.runs} other sets were tried first")
    return Plan(chosen, measure(chosen), left_out)


def make_plan(sensitivity: Sensitivity, budget: Budget, costs: Callable[[], Mapping[str, float]]) -> Plan:
    """Quantizes everything if the budget allows it; otherwise ranks the units and searches.

    Units are ranked by their individual losses if all were measured, otherwise by their costs, which need no run of the
    model. Sets are first judged by the cosine on some of the images; the result is judged by the whole budget on all
    images, and shortened if it misses.

    Args:
        sensitivity: measures; what it has measured before is not run again.
        budget: what may be lost.
        costs: returns the cost of each unit by name, as from `ranking.unit_costs`; called only if not everything fits.

    Returns:
        The Plan.

    Raises:
        CheckError: not even one unit is within the budget.
    """
    names = [unit.name for unit in sensitivity.units]
    alone = {name: found.error for name, found in sensitivity.alone().items()}
    by = alone if len(alone) == len(names) else {}
    if fits(sensitivity, budget):
        return Plan(names, sensitivity.judge(names), {}, by)
    by = by or dict(costs())
    ranked = sorted(names, key=by.__getitem__)
    some = search(ranked, sensitivity.measure, dataclasses.replace(budget, top1_drop=math.inf))
    plan = _confirm(sensitivity, budget, some)
    # units may have been left out only because of another one that turned out to be bad on further images
    if not plan.units:
        plan = search(ranked, functools.partial(_judge, sensitivity, budget), budget)
    left_out = some.left_out | plan.left_out
    if not plan.units:
        first = ranked[0]
        raise CheckError(
            f"precision plan: no layer can be {sensitivity.record.precision}; the most harmless is {first}: "
            f"{left_out[first]}",
            fix="Allow more (config.plan.accuracy_budget, config.plan.cosine), or stay with fp16.",
        )
    return dataclasses.replace(
        plan, left_out={name: left_out[name] for name in ranked if name not in plan.units}, costs=by
    )


def _confirm(sensitivity: Sensitivity, budget: Budget, found: Plan) -> Plan:
    """Judges a plan by the budget on all images; if it misses, shortens it to what the worst images allow, and judges
    again.

    Judging all images takes many times as long as a glimpse of some, so the next length is found by glimpses alone: the
    longest that keeps the cosine on the images that lost most. If top-1 misses, which a few images cannot show, the
    length is halved.
    """
    units, fp32 = found.units, sensitivity.judge([])
    left_out: dict[str, str] = {}
    while units:
        whole = sensitivity.judge(units)
        if not (why := budget.missed(whole, fp32)):
            return Plan(units, whole, left_out)
        over = len(units)
        if whole.cosine < budget.cosine:
            within = 0
            while over - within > 1:
                length = (within + over) // 2
                if sensitivity.glimpse(units[:length]).cosine < budget.cosine:
                    over = length
                else:
                    within = length
        else:
            within = over // 2
        left_out |= dict.fromkeys(units[within:], why)
        units = units[:within]
    return Plan([], fp32, left_out)


def fits(sensitivity: Sensitivity, budget: Budget) -> bool:
    """Whether all units together are within the budget."""
    everything = [unit.name for unit in sensitivity.units]
    found = _judge(sensitivity, budget, everything)
    return found.cosine >= budget.cosine and not budget.missed(found, sensitivity.judge([]))


def _judge(sensitivity: Sensitivity, budget: Budget, names: Collection[str]) -> Measured:
    """What a set loses on all images, or just on some if one of these already misses the budget, which settles it."""
    some = sensitivity.measure(names) if names else None
    return some if some is not None and some.cosine < budget.cosine else sensitivity.judge(names)


def write_plan(path: str | os.PathLike[str], plan: Plan, sensitivity: Sensitivity, budget: Budget) -> PrecisionPlan:
    """Writes a plan together with its evidence.

    Args:
        path: `precision_plan.json`.
        plan: from `make_plan`.
        sensitivity: the measurements that it was made with.
        budget: the one that it meets.

    Returns:
        What was written.
    """
    units = {unit.name: unit for unit in sensitivity.units}
    alone = {name: Loss.part_of(found).to_dict() for name, found in sensitivity.alone().items()}
    num_weights = sum(unit.num_weights for unit in units.values())
    ranked = sorted(plan.costs, key=plan.costs.__getitem__)
    share = sum(units[name].num_weights for name in plan.units) / num_weights
    record = PrecisionPlan(
        about=_ABOUT,
        precision=sensitivity.record.precision,
        sites=tuple(site.name for name in units if name in plan.units for site in units[name].sites),
        left_out=plan.left_out,
        budget=PlanBudget(
            cosine=budget.cosine, top1_drop_points=budget.top1_drop if sensitivity.record.labelled else None
        ),
        measured=PlanLoss(**Loss.part_of(plan.measured).to_dict(), share_of_weights=share),
        fp32=Loss.part_of(sensitivity.judge([])),
        images=PlanImages(source=sensitivity.record.source, num_images=sensitivity.record.num_images),
        ranked=tuple(PlannedUnit(unit=name, cost=plan.costs[name], **alone.get(name, {})) for name in ranked),
    )
    write_json(path, record.to_dict())
    return record


def read_plan(path: str | os.PathLike[str], precision: str) -> list[str]:
    """Reads which sites a plan quantizes.

    Args:
        path: the file.
        precision: to quantize to: int8 or fp8.

    Returns:
        Site names and patterns, for `quantize_only`.

    Raises:
        UsageError: there is no such file, it is not a plan, or it is for another precision.
    """
    record = read_json(path)
    fix = "Let config.precision=auto write one, or leave config.plan.file empty."
    if not isinstance(record, dict) or not isinstance(record.get("sites"), list):
        raise UsageError(f"precision plan {path}: missing, or no JSON object with a list `sites`", fix=fix)
    if not record["sites"]:
        raise UsageError(
            f"precision plan {path}: `sites` is empty, so nothing would be {precision}", fix="Ask for fp16."
        )
    if record.get("precision", precision) != precision:
        raise UsageError(f"precision plan {path}: made for {record['precision']}, {precision} is asked for", fix=fix)
    return [str(name) for name in record["sites"]]
