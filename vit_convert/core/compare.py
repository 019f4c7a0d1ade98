"""How two arrays are compared: one definition for every check from ONNX to the engine."""

import dataclasses
import math

import numpy as np


@dataclasses.dataclass(frozen=True)
class Comparison:
    """How far a candidate is from its reference.

    Attributes:
        max_abs: largest absolute difference.
        max_rel: max_abs over the reference's scale; inf if the reference is all zero and the candidate is not.
        cosine: smallest cosine similarity over the batch, each image's array flattened (float64).
        scale: largest absolute value in the reference.
        finite: whether the candidate has neither NaN nor infinity.
    """

    max_abs: float
    max_rel: float
    cosine: float
    scale: float
    finite: bool


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """What a comparison must meet: max_abs <= atol + rtol * scale, and a minimum cosine.

    Attributes:
        atol: absolute part of the allowed difference.
        rtol: part of the allowed difference per unit of the reference's scale; inf judges by the cosine only.
        cosine: smallest allowed cosine similarity.
    """

    atol: float
    rtol: float
    cosine: float

    def met_by(self, result: Comparison) -> bool:
        """Whether a comparison passes; a candidate with NaN or infinity never does."""
        # for a reference of zeros: infinity times zero is NaN
        relative = self.rtol * result.scale if result.scale else 0.0
        return result.finite and result.max_abs <= self.atol + relative and result.cosine >= self.cosine

    def __str__(self) -> str:
        bound = "" if np.isinf(self.rtol) else f"max_abs <= {self.atol:g} + {self.rtol:g} * scale, "
        return f"{bound}cosine >= {self.cosine:g}"


def compare(reference: np.ndarray, candidate: np.ndarray) -> Comparison:
    """Compares a candidate with its reference.

    Args:
        reference: [batch, ...] float array, taken as correct.
        candidate: array of the same shape, any float dtype.

    Returns:
        The Comparison; for a candidate with NaN or infinity the errors are inf and the cosine is 0.

    Raises:
        ValueError: the shapes differ.
    """
    if reference.shape != candidate.shape:
        raise ValueError(f"reference has shape {reference.shape}, candidate {candidate.shape}")
    scale = float(np.max(np.abs(reference), initial=0.0))
    if not np.isfinite(candidate).all():
        return Comparison(float("inf"), float("inf"), 0.0, scale, finite=False)
    max_abs, cosine = 0.0, 1.0
    # image by image, because float64 copies of whole taps would be large
    for expected, got in zip(reference, candidate):
        expected, got = expected.astype(np.float64).ravel(), got.astype(np.float64).ravel()
        max_abs = max(max_abs, float(np.max(np.abs(expected - got), initial=0.0)))
        cosine = min(cosine, _cosine(expected, got))
    max_rel = max_abs / scale if scale else (float("inf") if max_abs else 0.0)
    return Comparison(max_abs, max_rel, cosine, scale, finite=True)


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    norms = math.sqrt(_dot(a, a)) * math.sqrt(_dot(b, b))
    if norms == 0.0:
        return 1.0 if np.array_equal(a, b) else 0.0
    return min(1.0, _dot(a, b) / norms)


def _dot(a: np.ndarray, b: np.ndarray) -> float:
    """Their inner product, without BLAS: its threads busy-wait, which takes ten times as long as the sum."""
    return float(np.einsum("i,i", a, b))


def top1_accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    """Share of images whose largest logit is that of the label.

    Args:
        logits: [images, classes] float.
        labels: [images] integer class ids.

    Returns:
        Top-1 accuracy in percent, 0 to 100.
    """
    return 100.0 * float(np.mean(np.argmax(logits, axis=-1) == labels))
