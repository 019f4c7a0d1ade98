"""Similarities of image and text embeddings, and how two programs differ in them and in the ranking that follows."""

import dataclasses
from collections.abc import Iterator

import numpy as np

from vit_convert.core.compare import compare
from vit_convert.core.pair import PairFacts
from vit_convert.core.record import Record

RECALL = 5  # top texts, which should include the one that JAX ranks first
_ROWS = 4096  # images at a time, since a matrix of all images and texts may not fit into memory


@dataclasses.dataclass(frozen=True)
class Ranking(Record):
    """The differences between two programs' similarities, over all images and texts.

    Attributes:
        images: how many were compared.
        texts: how many texts each was compared with; classes, if several prompts stand for one.
        max_cosine_error: largest difference of the cosine of an image and a text.
        max_logit_error: the same of scale · cosine + bias.
        max_probability_error: the same after softmax or sigmoid.
        top1: percent of the images for which both rank the same text first.
        recall: percent of the images whose first text by the reference is among the candidate's first five.
    """

    images: int
    texts: int
    max_cosine_error: float
    max_logit_error: float
    max_probability_error: float
    top1: float
    recall: float


def unit(embeddings: np.ndarray) -> np.ndarray:
    """Embeddings divided by their norms: float64 [rows, width]; all-zero ones are left unchanged."""
    values = np.asarray(embeddings, np.float64)
    norm = np.linalg.norm(values, axis=-1, keepdims=True)
    return values / np.where(norm > 0, norm, 1.0)


def of_classes(embeddings: np.ndarray, pair: PairFacts) -> np.ndarray:
    """One embedding per class: the mean of its prompts' normalised embeddings, normalised again.

    Args:
        embeddings: of all prompts, class after class: [classes · templates, width].
        pair: gives the numbers of classes and templates; without classes, each prompt stands for itself.

    Returns:
        float64 [classes or prompts, width].
    """
    units = unit(embeddings)
    return unit(units.reshape(pair.classes, -1, units.shape[-1]).mean(1)) if pair.classes else units


def logits_of(images: np.ndarray, texts: np.ndarray, pair: PairFacts) -> np.ndarray:
    """scale · cosine + bias of each image with each text.

    Args:
        images: embeddings [images, width], of any length.
        texts: embeddings [texts, width], of any length.
        pair: scale and bias.

    Returns:
        float64 [images, texts].
    """
    return pair.logit_scale * (unit(images) @ unit(texts).T) + (pair.logit_bias or 0.0)


def probabilities_of(logits: np.ndarray, pair: PairFacts) -> np.ndarray:
    """Softmax over the texts for each image, or the sigmoid of each logit, as the pair was trained.

    Example:
        >>> pair = PairFacts(1.0, None, "softmax", {})
        >>> probabilities_of(np.array([[0.0, 0.0]]), pair)
        array([[0.5, 0.5]])
    """
    if pair.similarity == "sigmoid":
        return np.exp(-np.logaddexp(0.0, -logits))
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


def compare_rankings(
    reference: tuple[np.ndarray, np.ndarray], candidate: tuple[np.ndarray, np.ndarray], pair: PairFacts
) -> Ranking:
    """Compares the similarities computed by two programs.

    Args:
        reference: embeddings of images [images, width] and of texts [texts, width], taken as correct.
        candidate: the same from the other program.
        pair: how they are compared; with classes, texts are the prompts of all of them.

    Returns:
        The Ranking; for a candidate with NaN or infinity the errors are infinite and the shares 0.

    Raises:
        ValueError: the shapes differ.
    """
    for right, other in zip(reference, candidate):
        compare(right, other)  # the shapes
    count, texts = len(reference[0]), len(of_classes(reference[1], pair))
    if not all(np.isfinite(array).all() for array in candidate):
        infinite = float("inf")
        return Ranking(count, texts, infinite, infinite, infinite, 0.0, 0.0)
    errors, same, within = [0.0, 0.0, 0.0], 0, 0
    for expected, found in zip(_by_rows(*reference, pair), _by_rows(*candidate, pair)):
        errors = [max(error, float(np.abs(a - b).max())) for error, a, b in zip(errors, expected, found)]
        first, logits = expected[1].argmax(-1), found[1]
        same += int(np.sum(logits.argmax(-1) == first))
        # How many texts rank before it; ties go to the lower index, as in argmax.
        own = np.take_along_axis(logits, first[:, None], 1)
        before = (logits > own).sum(-1) + ((logits == own) & (np.arange(texts) < first[:, None])).sum(-1)
        within += int(np.sum(before < RECALL))
    cosine, logit, probability = errors
    return Ranking(count, texts, cosine, logit, probability, 100.0 * same / count, 100.0 * within / count)


def zero_shot_top1(images: np.ndarray, texts: np.ndarray, labels: np.ndarray, pair: PairFacts) -> float:
    """Share of images whose most similar class is their label's, in percent.

    Args:
        images: embeddings [images, width].
        texts: embeddings of the prompts of all classes, class after class.
        labels: class of each image, [images].
        pair: gives the numbers of classes and templates.
    """
    right, start = 0, 0
    for _, logits, _ in _by_rows(images, texts, pair):
        right += int(np.sum(logits.argmax(-1) == labels[start : start + len(logits)]))
        start += len(logits)
    return 100.0 * right / len(images)


def _by_rows(
    images: np.ndarray, texts: np.ndarray, pair: PairFacts
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Cosines, logits and probabilities of some images at a time with all texts or classes."""
    classes = of_classes(texts, pair)
    for start in range(0, len(images), _ROWS):
        cosines = unit(images[start : start + _ROWS]) @ classes.T
        logits = pair.logit_scale * cosines + (pair.logit_bias or 0.0)
        yield cosines, logits, probabilities_of(logits, pair)
