"""Chooses which products stay out of INT8 by what each costs the model's output for the time that it takes.

What INT8 costs a product itself says little about the output: a large error in one layer may be averaged away by those
after it, and a small one in another reach the output whole. So the output is measured, with everything in INT8 and then
with one product at a time, and those go that cost most for their multiplications, until the output is good enough.
"""

import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from vit_convert.core.progress import Progress
from vit_convert.quantize.activations import ActivationRun, Normalize
from vit_convert.quantize.guard import channels_of
from vit_convert.quantize.placement import Site
from vit_convert.quantize.precision_plan import Budget
from vit_convert.quantize.sensitivity import Sensitivity, Unit

_SMALL = 0.1  # part of the allowed error below which nobody asks what of a kind of product causes it


@dataclasses.dataclass(frozen=True)
class Choice:
    """What stays out of INT8.

    Attributes:
        left_out: names of units, the dearest first.
        shares: of each unit that may be left out: the mean of 1 - cosine to the fp32 output with it alone in INT8, on
            the images that lost most with all in INT8; empty if everything fits.
        cosine_before: the smallest cosine of any image with everything in INT8.
        cosine: with what is left.
        missed: why what is left exceeds the budget nevertheless; "" if it does not.
    """

    left_out: tuple[str, ...]
    shares: Mapping[str, float]
    cosine_before: float
    cosine: float
    missed: str = ""


def units_by_tensor(model: ir.Model, sites: Sequence[Site]) -> list[Unit]:
    """Groups sites that read the same tensor, which has one range or none, in graph order.

    Args:
        model: the fp32 graph.
        sites: of it.
    """
    groups: dict[str, list[Site]] = {}
    for site in sites:
        groups.setdefault(site.tensor, []).append(site)
    weights = {name: value.const_value for name, value in model.graph.initializers.items()}
    sizes = {name: tensor.size for name, tensor in weights.items() if tensor is not None}
    return [
        Unit(first.block, first.kind, (first, *more), sum(sizes[site.weight] for site in (first, *more) if site.weight))
        for first, *more in groups.values()
    ]


def multiplications(
    onnx_path: str | os.PathLike[str], units: Sequence[Unit], images: np.ndarray, normalize: Normalize
) -> dict[str, float]:
    """The multiplications of each unit for one image, by its name: what a product's time goes by.

    Args:
        onnx_path: the fp32 graph.
        units: of products.
        images: at least one, uint8 [images, height, width, 3].
        normalize: as `calibrate` takes it.
    """
    weights = {name: value.const_value for name, value in ir.load(onnx_path).graph.initializers.items()}
    run = ActivationRun(pathlib.Path(onnx_path), images, normalize, 1, "cpu", Progress(quiet=True))
    sizes = run.scan([unit.sites[0].tensor for unit in units], "Sizes", num_images=1).elements

    def channels(unit: Unit) -> int:
        found = [tensor for site in unit.sites if site.weight and (tensor := weights[site.weight]) is not None]
        return channels_of(found) or 1

    return {unit.name: sizes[unit.sites[0].tensor] * unit.num_weights / channels(unit) for unit in units}


def choose(sensitivity: Sensitivity, times: Mapping[str, float], budget: Budget) -> Choice:
    """Leaves out the products with the largest share in the output's error for their time, until the budget holds.

    Args:
        sensitivity: measures sets of units.
        times: of each unit that may be left out, in any unit, such as its multiplications; the others stay in INT8.
        budget: what the output may lose.

    Returns:
        The Choice. If even all that may be left out are not enough, all are, and `missed` says why.
    """
    everything = [unit.name for unit in sensitivity.units]
    fp32, whole = sensitivity.judge([]), sensitivity.judge(everything)
    missed, before = budget.missed(whole, fp32), whole.cosine
    if not missed:
        return Choice((), {}, before, before)
    shares = _shares(sensitivity, [unit for unit in sensitivity.units if unit.name in times], 1 - budget.cosine)
    dearest = sorted(shares, key=lambda name: (-shares[name] / times[name], name))
    count = 0
    while missed and count < len(dearest):
        if whole.cosine < budget.cosine:
            count = _fewest(sensitivity, everything, dearest, count, budget.cosine)
        else:  # top-1, which a few images cannot show
            count = min(len(dearest), count + max(1, len(dearest) // 12))
        whole = sensitivity.judge(_without(everything, dearest[:count]))
        missed = budget.missed(whole, fp32)
    return Choice(tuple(dearest[:count]), shares, before, whole.cosine, missed)


def _shares(sensitivity: Sensitivity, units: Sequence[Unit], allowed: float) -> dict[str, float]:
    """What each unit costs the output, on the images that lost most so far.

    Units of one kind are measured together first, and one by one only if they cost more together than a small part of
    what is allowed; else each counts as an equal part.
    """
    kinds: dict[str, list[str]] = {}
    for unit in units:
        kinds.setdefault(unit.kind, []).append(unit.name)
    shares: dict[str, float] = {}
    for names in kinds.values():
        together = sensitivity.glimpse(names).error
        if len(names) == 1 or together <= _SMALL * allowed:
            shares |= dict.fromkeys(names, together / len(names))
        else:
            shares |= {name: sensitivity.glimpse([name]).error for name in names}
    return shares


def _fewest(
    sensitivity: Sensitivity, everything: Sequence[str], dearest: Sequence[str], too_few: int, cosine: float
) -> int:
    """How many of the dearest have to go for the images that lost most so far, by bisection; at least one more than
    `too_few`."""
    enough = len(dearest)
    while enough - too_few > 1:
        count = (too_few + enough) // 2
        if sensitivity.glimpse(_without(everything, dearest[:count])).cosine < cosine:
            too_few = count
        else:
            enough = count
    return enough


def _without(everything: Sequence[str], names: Sequence[str]) -> list[str]:
    gone = {*names}
    return [name for name in everything if name not in gone]
