"""The judge of a pair's similarities, for both graphs and engines: JAX's embeddings, labels and tolerances."""

import dataclasses
from collections.abc import Collection, Mapping

import ml_collections
import numpy as np

from vit_convert.core.config import PRECISIONS
from vit_convert.core.pair import PairFacts
from vit_convert.core.pair_results import SimilarityCheck
from vit_convert.core.similarity import compare_rankings, zero_shot_top1
from vit_convert.core.tolerance import similarity_misses, top1_miss

Embeddings = tuple[np.ndarray, np.ndarray]
_HIGHER = ("fp16", "bf16", "fp32")  # nearest higher precision first


@dataclasses.dataclass(frozen=True)
class PairJudge:
    """What the similarities of a pair are compared with.

    Attributes:
        config: of the pair; `check` holds the tolerances.
        pair: how embeddings are compared.
        right: JAX's embeddings of images [images, width] and of texts [texts, width].
        labels: class of each image; None without classes.
        judges_ranks: whether images and texts are the user's, so that their ranking is meaningful.
        engine: whether engines are judged, see `tolerance_for`.
    """

    config: ml_collections.ConfigDict
    pair: PairFacts
    right: Embeddings
    labels: np.ndarray | None
    judges_ranks: bool
    engine: bool = False

    def zero_shot(self, found: Embeddings) -> float | None:
        """Zero-shot accuracy of some embeddings, in percent; None without labels."""
        return None if self.labels is None else zero_shot_top1(*found, self.labels, self.pair)

    def check(self, precision: str, used: Mapping[str, str], found: Embeddings) -> SimilarityCheck:
        """Compares the embeddings of one precision with JAX's.

        Args:
            precision: of the pair.
            used: precision of each tower.
            found: embeddings of the same images and texts.
        """
        ranking = compare_rankings(self.right, found, self.pair)
        judged_as = "fp16" if self.engine and precision == "fp32" and self.config.engine.tf32 else precision
        misses = similarity_misses(self.config, judged_as, ranking, judges_ranks=self.judges_ranks, engine=self.engine)
        top1, of_jax = self.zero_shot(found), self.zero_shot(self.right)
        if top1 is not None and of_jax is not None and (miss := top1_miss(self.config, top1, of_jax)):
            misses.append(f"zero-shot {miss}")
        return SimilarityCheck(
            precision=precision,
            image=used["image"],
            text=used["text"],
            **dataclasses.asdict(ranking),
            zero_shot=top1,
            zero_shot_jax=of_jax,
            passed=not misses,
            misses=tuple(misses),
        )


def stand_in(precision: str, has: Collection[str]) -> str:
    """The precision in which a tower stands in for one that it lacks: its next higher one; "" if it has none.

    Args:
        precision: of the pair.
        has: precisions of the tower.

    Example:
        >>> stand_in("int8", ["fp32", "fp16"]), stand_in("fp16", ["fp32", "int8"]), stand_in("fp16", ["int8"])
        ('fp16', 'fp32', '')
    """
    lower = PRECISIONS.index(precision)
    higher = (name for name in _HIGHER if PRECISIONS.index(name) < lower)
    return next((name for name in (precision, *higher) if name in has), "")
