"""What the stages of a pair of towers return: how they are compared, and how their similarities compare with JAX's."""

import dataclasses
from collections.abc import Mapping

from vit_convert.core.pair import PairFacts
from vit_convert.core.record import Record, StageResult, optional


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairResult(PairFacts, StageResult):
    """What the pair stage returns: what `pair.json` says."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SimilarityCheck(Record):
    """The similarities of one precision, compared with JAX's.

    Attributes:
        precision: of the pair.
        image: precision of the image tower; the next higher one where it has none of the pair's.
        text: precision of the text tower.
        images: how many were compared.
        texts: with how many texts each.
        max_cosine_error: largest difference of the cosine of an image and a text.
        max_logit_error: the same of scale · cosine + bias.
        max_probability_error: the same of what softmax or sigmoid makes of it.
        top1: images for which both put the same text first, in percent.
        recall: images whose first text by JAX is among the first five, in percent.
        zero_shot: accuracy by the prompts of classes, in percent.
        zero_shot_jax: JAX's, on the same images and prompts.
        passed: whether nothing misses.
        misses: in words.
    """

    precision: str
    image: str
    text: str
    images: int
    texts: int
    max_cosine_error: float
    max_logit_error: float
    max_probability_error: float
    top1: float
    recall: float
    zero_shot: float | None = optional()
    zero_shot_jax: float | None = optional()
    passed: bool
    misses: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ZeroShot(Record):
    """Zero-shot accuracy of JAX.

    Attributes:
        classes: that an image may have.
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
        zero_shot: with labelled images and prompts of classes.
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
