"""The results of a pair's own stages: how its towers are compared, and how their similarities compare with JAX's."""

import dataclasses
from collections.abc import Mapping

from vit_convert.core.pair import PairFacts
from vit_convert.core.record import Record, StageResult, optional
from vit_convert.core.similarity import Ranking


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairResult(PairFacts, StageResult):
    """What the pair stage returns: the content of `pair.json`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SimilarityCheck(Ranking):
    """The similarities of one precision, compared with JAX's.

    Attributes:
        precision: of the pair.
        image: precision of the image tower; the next higher one if it lacks the pair's.
        text: precision of the text tower.
        zero_shot: zero-shot accuracy, in percent.
        zero_shot_jax: JAX's, on the same images and prompts.
        passed: whether nothing misses.
        misses: in words.
    """

    precision: str
    image: str
    text: str
    zero_shot: float | None = optional()
    zero_shot_jax: float | None = optional()
    passed: bool
    misses: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ZeroShot(Record):
    """Zero-shot accuracy of JAX.

    Attributes:
        classes: number of classes.
        templates: prompts of each class.
        num_images: labelled ones.
        jax: accuracy in percent.
    """

    classes: int
    templates: int
    num_images: int
    jax: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class SimilarityResult(StageResult):
    """What the similarity stage returns.

    Attributes:
        source: of images and texts: "evaluation data" or "seeded noise".
        checks: by precision.
        zero_shot: if there are labelled images and class prompts.
    """

    source: str
    checks: Mapping[str, SimilarityCheck]
    zero_shot: ZeroShot | None = optional()


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairVerification(StageResult):
    """What `verify` found of a pair's engines.

    Attributes:
        passed: whether all did.
        engines: by precision.
    """

    passed: bool
    engines: Mapping[str, SimilarityCheck]
