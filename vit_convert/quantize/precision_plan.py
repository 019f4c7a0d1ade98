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
        runs: most sets that are tried after the bisection, each by a run over some images.
    """

    cosine: float
    top1_drop: float
    runs: int

    def missed(self, result: Measured, fp32: Measured) -> str:
        """Says why a result is over the budget; "" where it is within."""
        if result.cosine < self.cosine:
            return f"cosine {result.cosine:.7f} is below {self.cosine:g}"
        if result.top1 is not None and fp32.top1 is not None and fp32.top1 - result.top1 > self.top1_drop:
            return f"top-1 drops by {fp32.top1 - result.top1:.2f} points, allowed {self.top1_drop:g}"
        return ""


@dataclasses.dataclass(frozen=True)
class Plan:
    """A plan and how it was found.

    Attributes:
        units: names of the quantized units, most harmless first.
        measured: what they lose together.
        left_out: for each other unit, why.
        costs: of each unit, what it was ranked by; empty where nothing had to be ranked, and not each was measured
            alone.
    """

    units: list[str]
    measured: Measured
    left_out: dict[str, str]
    costs: dict[str, float] = dataclasses.field(default_factory=dict)


def search(ranked: Sequence[str], measure: Callable[[Collection[str]], Measured], budget: Budget) -> Plan:
    """Finds a large set within a budget; if nothing was left untried, one to which no further unit can be added.

    The longest prefix of the ranking is found by bisection, as if the loss grew with every unit; then the others are
    tried in turn and kept if the budget allows it, so that one sensitive unit does not keep out those behind it: one by
    one at first, and twice as many at a time after each success.

    Args:
        ranked: units, the most harmless first.
        measure: measures a set.
        budget: what may be lost, and how many sets may be tried; what is not tried is left out.

    Returns:
        The Plan, whose set has been measured as a whole.
    """
    fp32 = measure([])
    within, over = 0, len(ranked) + 1  # prefixes of these lengths are, and are not, within the budget
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
    left_out |= dict.fromkeys(rest, f"not tried, as plan.runs={budget.runs} other sets were tried first")
    return Plan(chosen, measure(chosen), left_out)


def make_plan(sensitivity: Sensitivity, budget: Budget, costs: Callable[[], Mapping[str, float]]) -> Plan:
    """Takes everything where the budget allows it; else ranks the units and searches.

    They are ranked by what each loses alone where all of that was measured, else by their costs, which take no run of
    the model. Sets are first held against the cosine on some of the images; what comes out is held against the whole
    budget on all of them, and shortened where it misses.

    Args:
        sensitivity: measures; what it has measured before is not run again.
        budget: what may be lost.
        costs: of each unit by its name, as `ranking.unit_costs` says them; asked for where not everything fits.

    Returns:
        The Plan.

    Raises:
        CheckError: not one unit is within the budget.
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
    # what is left out may have been so for the company of a unit that only the others show to be bad
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
    """Holds a plan against the budget on all images; where it misses, it is shortened to what the worst of them allow,
    and held again.

    A judgement takes many times as long as a look at some images, so the next length is found only by looks: the
    longest that keeps the cosine on those images that lost most. Where top-1 is what misses, which a few images do not
    show, the length is halved.
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
    """What a set loses on all images; on some of them where one of these is below the budget already, which decides it
    for all."""
    some = sensitivity.measure(names) if names else None
    return some if some is not None and some.cosine < budget.cosine else sensitivity.judge(names)


def write_plan(path: str | os.PathLike[str], plan: Plan, sensitivity: Sensitivity, budget: Budget) -> PrecisionPlan:
    """Writes a plan with its evidence.

    Args:
        path: `precision_plan.json`.
        plan: from `make_plan`.
        sensitivity: that it was made with.
        budget: that it keeps.

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
    """Reads what a plan quantizes.

    Args:
        path: the file.
        precision: that is to be made: int8 or fp8.

    Returns:
        Site names and patterns, for `quantize_only`.

    Raises:
        UsageError: there is no such file, it is not a plan, or one of another precision.
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
