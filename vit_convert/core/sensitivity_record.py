"""The content of `sensitivity.json` and `plan_search.json`: the loss of sets of layers when they are quantized."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from vit_convert.core.record import Record


@dataclasses.dataclass(frozen=True)
class Measured(Record):
    """What quantizing a set of units does to the output, over all images.

    Attributes:
        quantized: names of the units, in graph order.
        error: mean of 1 - cosine to the fp32 output.
        cosine: smallest cosine of any image.
        max_rel: largest absolute difference over the largest fp32 output.
        agreement: percent of images whose largest output is the fp32 graph's.
        top1: accuracy in percent; None without labels.
    """

    quantized: tuple[str, ...]
    error: float
    cosine: float
    max_rel: float
    agreement: float
    top1: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class DescribedUnit(Record):
    """Layers that are quantized together.

    Attributes:
        sites: names of its linears.
        num_weights: number of their weights.
    """

    sites: tuple[str, ...]
    num_weights: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class SensitivityRecord(Record):
    """What was measured of one graph on one set of images.

    Attributes:
        precision: "int8" or "fp8".
        rest: precision of what is not quantized, "fp16" or "fp32".
        source: of the images, for people.
        num_images: number of images on which sets are judged.
        scan_images: number of images on which they are measured.
        labelled: whether the images have labels.
        key: all else that the results depend on.
        units: by name.
        measured: results on some of the images, each set once.
        judged: results on all images.
    """

    precision: str
    rest: str
    source: str
    num_images: int
    scan_images: int
    labelled: bool
    key: Mapping[str, Any]
    units: Mapping[str, DescribedUnit]
    measured: tuple[Measured, ...]
    judged: tuple[Measured, ...]

    def same_case(self, other: "SensitivityRecord") -> bool:
        """Whether the results of another record hold for this one."""
        mine, theirs = (dataclasses.replace(record, measured=(), judged=()).to_dict() for record in (self, other))
        return mine == theirs
