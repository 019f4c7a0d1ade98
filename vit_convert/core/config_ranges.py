"""The numbers that each config key accepts, in one table, so that a value out of range is refused at the start."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import ml_collections

from vit_convert.core.errors import UsageError

_MOST_IMAGES = 100_000_000  # of a data set; more is surely a typing mistake
_LARGEST_BATCH = 65_536
_LONGEST_SECONDS = 3600.0


@dataclasses.dataclass(frozen=True)
class Range:
    """The numbers from `low` to `high`, both included unless stated otherwise.

    Attributes:
        low: the smallest.
        high: the largest; always finite, so that no range includes infinity or NaN.
        above: whether `low` itself is excluded.
        below: whether `high` itself is excluded.
        many: whether the key holds a tuple of numbers.
    """

    low: float
    high: float
    above: bool = False
    below: bool = False
    many: bool = False

    @property
    def whole(self) -> bool:
        """Whether the range is of integers: both ends are ints."""
        return isinstance(self.low, int)

    def holds(self, number: Any) -> bool:
        """Whether `number` is in the range; a bool never is, although it is an int in Python."""
        if isinstance(number, bool) or not isinstance(number, int if self.whole else int | float):
            return False
        if not math.isfinite(number):
            return False
        return (self.low < number if self.above else self.low <= number) and (
            number < self.high if self.below else number <= self.high
        )

    def __str__(self) -> str:
        kind = ("whole " if self.whole else "") + "number"
        kind = f"{kind}s" if self.many else f"a {kind}"
        low, high = (f"{end:,}" if self.whole else f"{end:g}" for end in (self.low, self.high))
        if self.above:
            return f"{kind} above {low}, at most {high}"
        return f"{kind} from {low}, below {high}" if self.below else f"{kind} from {low} to {high}"


_SHARE = Range(0.0, 1.0)
_COSINES = Range(0.0, 2.0)  # the difference of two cosines
_POINTS = Range(0.0, 100.0)  # of top-1
_BATCH = Range(1, _LARGEST_BATCH)

RANGES = {
    "num_classes": Range(0, 10_000_000),
    "posemb_grid": Range(1, 4096, many=True),
    "batch.min": _BATCH,
    "batch.opt": _BATCH,
    "batch.max": _BATCH,
    "batch.profiles": Range(1, _LARGEST_BATCH, many=True),
    "calibration.max_error": Range(0.0, 1.0, above=True),  # at 1 the product is all error
    "calibration.min_cosine": _SHARE,
    "calibration.num_images": Range(1, _MOST_IMAGES),
    "calibration.batch_size": Range(1, 4096),
    "calibration.smooth": Range(0.0, 1.0, below=True),
    "plan.accuracy_budget": _POINTS,
    "plan.cosine": _SHARE,
    "plan.runs": Range(0, 10_000),
    "plan.num_images": Range(1, _MOST_IMAGES),
    "evaluation.num_images": Range(0, _MOST_IMAGES),
    "check.num_images": Range(1, 1024),  # all their activations are held at once
    "check.atol": Range(0.0, 1e6),
    "check.rtol": Range(0.0, 1e6),
    "check.engine_rtol": Range(0.0, 1e6),
    "check.cosine": _SHARE,
    "check.fp16_cosine": _SHARE,
    "check.int8_cosine": _SHARE,
    "check.max_top1_drop": _POINTS,
    "check.min_agreement": _POINTS,
    "check.fp16_similarity": _COSINES,
    "check.int8_similarity": _COSINES,
    "check.int8_agreement": _POINTS,
    "check.min_recall": _POINTS,
    "engine.workspace_gib": Range(0.0, 4096.0, above=True),
    "engine.opt_level": Range(0, 5),
    "benchmark.batches": Range(1, _LARGEST_BATCH, many=True),
    "benchmark.streams": Range(1, 64, many=True),
    "benchmark.min_gain": Range(0.0, 1000.0),
    "benchmark.seconds": Range(0.0, _LONGEST_SECONDS, above=True),
}


def check_ranges(config: ml_collections.ConfigDict) -> None:
    """Refuses numbers out of range.

    Raises:
        UsageError: names the first such key, its value, and what it accepts.
    """
    for key, allowed in RANGES.items():
        value: Any = config
        for part in key.split("."):
            value = value[part]
        numbers: Sequence[Any] = () if value is None else value if allowed.many else (value,)
        if not all(allowed.holds(number) for number in numbers):
            example = f'For example --config.{key}="(1,8)".' if allowed.many else ""
            shown = f"{value:g}" if isinstance(value, float) else repr(tuple(value)) if allowed.many else repr(value)
            raise UsageError(f"config.{key}={shown}: must be {allowed}", fix=example)
