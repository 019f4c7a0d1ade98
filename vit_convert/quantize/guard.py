"""Widens the entropy thresholds where clipping costs more than it gains, judged by the products that read each tensor.

Entropy weighs values by how often they occur. A trained transformer has a few huge activations in a few tokens, which
carry much of the image's information; to entropy they are a tail to cut off. So the tensor's own distribution decides
nothing here: rows are quantized with each candidate, multiplied by the weights that read them, and compared with the
exact products. A huge value that is multiplied by small weights is still clipped.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from vit_convert.quantize.graph import linear_weight, read_weight
from vit_convert.quantize.rows import RowSample, priorities

LEVELS = 127
# Rows count with the fourth power of their squared error: rounding errors spread over all rows and layers and average
# out, whereas clipping hits the same few tokens in every layer. With the plain mean of squared errors, the trained
# model of checkpoints/DINOV2.md is clipped so much that it loses more than with min-max; with power 4 it loses less
# than with min-max, with power 2 nearly as much.
POWER = 4
_COLUMNS = 256  # columns of a weight that are multiplied; they are evenly spaced and represent the others
_STEPS = 3  # candidates per doubling
_MOST = 13  # maximum number of candidates

# rows after quantization in which the largest number represents the threshold
Rounding = Callable[[np.ndarray, float], np.ndarray]


def int8(rows: np.ndarray, threshold: float) -> np.ndarray:
    """Rows rounded to int8 and back."""
    scale = np.float32(threshold) / np.float32(LEVELS)
    return np.clip(np.rint(rows / scale), -LEVELS, LEVELS) * scale


@dataclasses.dataclass(frozen=True)
class Shift:
    """A constant subtracted from a tensor before it is quantized.

    Attributes:
        offset: the constant.
        threshold: the difference that 127 represents.
        error: of the products that read the tensor, see `product_errors`.
    """

    offset: float
    threshold: float
    error: float


@dataclasses.dataclass(frozen=True)
class Cost:
    """What each threshold of a tensor costs.

    Attributes:
        candidates: thresholds, from entropy's to the largest |x|.
        errors: for each, the error of the products that read the tensor, as a share of their mean square; see
            `product_errors`.
        middles: for each, the middle of the clipped range: the intersection of [lowest, highest] and [-threshold,
            threshold].
        halves: for each, half the width of that range.
        shifted: the errors when the middle is subtracted and the largest number represents the half-width; empty if no
            linear reads the tensor.
    """

    candidates: list[float]
    errors: list[float]
    middles: list[float] = dataclasses.field(default_factory=list)
    halves: list[float] = dataclasses.field(default_factory=list)
    shifted: list[float] = dataclasses.field(default_factory=list)

    @property
    def cheapest(self) -> float:
        """The smallest error without a shift."""
        return min(self.errors)

    def shift(self, pays: float) -> Shift | None:
        """The shift with the smallest error, if that is at most this share of the smallest error without a shift."""
        if not self.shifted or min(self.shifted) > pays * self.cheapest:
            return None
        index = max(i for i, error in enumerate(self.shifted) if error <= min(self.shifted))
        return Shift(self.middles[index], self.halves[index], self.shifted[index])

    @property
    def best(self) -> float:
        """The threshold with the smallest error; among equals the largest, so that nothing is clipped without
        benefit."""
        smallest = min(self.errors)
        return max(t for t, error in zip(self.candidates, self.errors) if error <= smallest)


class Guard:
    """Collects rows of some activations as they stream by, and then computes the cost of thresholds.

    Args:
        model: the fp32 graph; weights are read when `cost` asks for them.
        names: of activations.
    """

    def __init__(self, model: ir.Model, names: Sequence[str]):
        values = {v.name: v for node in model.graph for v in node.outputs} | {v.name: v for v in model.graph.inputs}
        self._weights = {name: readers(values[name]) for name in names}
        self._samples = {name: RowSample() for name in names}
        self._ends: dict[str, tuple[float, float]] = {}

    def add(self, name: str, value: np.ndarray, image_keys: Sequence[int]) -> None:
        """Offers an activation of a batch.

        Args:
            name: of the activation.
            value: float32, finite; image after image along its first axis.
            image_keys: for each image a number derived from its pixels.
        """
        low, high = self._ends.get(name, (0.0, 0.0))
        self._ends[name] = min(low, float(value.min())), max(high, float(value.max()))
        channels = channels_of(self._weights[name])
        rows = as_rows(value, channels)
        if rows.shape[1] != channels:
            self._weights[name] = []  # not a known product: the tensor is judged by itself
        self._samples[name].add(rows, priorities(image_keys, len(rows)))

    def cost(self, name: str, entropy: float, amax: float) -> Cost:
        """What the thresholds from entropy's to the largest |x| cost."""
        rows, counts = self._samples[name].rows()
        thresholds = candidates(entropy, amax)
        weights = self._weights[name]
        errors = product_errors(rows, counts, weights or [None], thresholds)
        if not weights:
            return Cost(thresholds, errors)
        low, high = self._ends[name]
        ends = [(max(low, -t), min(high, t)) for t in thresholds]
        middles, halves = [(a + b) / 2 for a, b in ends], [(b - a) / 2 for a, b in ends]
        return Cost(thresholds, errors, middles, halves, product_errors(rows, counts, weights, halves, middles=middles))

    def error(self, name: str, threshold: float, rounded: Rounding = int8) -> float:
        """What one threshold costs; 0 for a tensor that is all zero."""
        rows, counts = self._samples[name].rows()
        return (
            product_errors(rows, counts, self._weights[name] or [None], [threshold], rounded=rounded)[0]
            if threshold
            else 0.0
        )


def readers(value: ir.Value) -> list[ir.TensorProtocol]:
    """The weights, [K, N] or [N, K, 1, 1], of the linears that read an activation or a reshaped copy of it."""
    found: list[ir.TensorProtocol] = []
    for node, index in value.uses():
        weight = linear_weight(node) if index == 0 else None
        if index == 0 and node.op_type in ("Reshape", "Transpose"):
            found += readers(node.outputs[0])
        elif weight is not None and weight.const_value is not None and is_product(node):
            found.append(weight.const_value)
    return found


def is_product(node: ir.Node) -> bool:
    """Whether a linear multiplies each row by the whole weight, unlike a convolution with a window, padding or
    groups."""
    weight = linear_weight(node)
    shape = tuple(weight.shape.numpy()) if weight is not None and weight.shape is not None else ()
    grouped = node.attributes.get_int("group", 1) != 1
    padded = "pads" in node.attributes and any(node.attributes["pads"].as_ints())
    return len(shape) == 2 or (shape[2:] == (1, 1) and not grouped and not padded)


def channels_of(weights: Sequence[ir.TensorProtocol]) -> int | None:
    """K of the weights that read one tensor; None if none does."""
    shapes = {tuple(weight.shape.numpy()) for weight in weights}
    sizes = {shape[0] if len(shape) == 2 else shape[1] for shape in shapes}
    return sizes.pop() if len(sizes) == 1 else None


def as_rows(value: np.ndarray, channels: int | None) -> np.ndarray:
    """An activation as the rows that a linear multiplies: [rows, channels].

    Args:
        value: [..., channels], [batch, channels, height, width], or attended values [batch, heads, tokens, channels /
            heads].
        channels: K of the weight; None uses the last axis.
    """
    shape = value.shape
    if channels is None or shape[-1] == channels:
        return value.reshape(-1, shape[-1])
    if len(shape) == 4 and shape[1] == channels:
        return value.transpose(0, 2, 3, 1).reshape(-1, channels)
    if len(shape) == 4 and shape[1] * shape[3] == channels:
        return value.transpose(0, 2, 1, 3).reshape(-1, channels)
    return value.reshape(-1, shape[-1])


def candidates(entropy: float, amax: float) -> list[float]:
    """Thresholds from entropy's to the largest |x|, both included, in equal ratios; only one if they are equal."""
    if not 0 < entropy < amax:
        return [max(entropy, amax)]
    steps = min(_MOST - 1, math.ceil(_STEPS * math.log2(amax / entropy)))
    return [*np.geomspace(entropy, amax, max(steps, 1) + 1)[:-1].tolist(), amax]


def product_errors(
    rows: np.ndarray,
    counts: np.ndarray,
    weights: Sequence[ir.TensorProtocol | None],
    thresholds: Sequence[float],
    *,
    middles: Sequence[float] = (),
    rounded: Rounding = int8,
) -> list[float]:
    """Measures the effect of quantizing x on the products x W, for each threshold.

    The error of a row is |(x - x̂) W|² as a share of the mean |x W|² of all rows. Rows are combined by the power mean
    with exponent POWER, and weights by the mean.

    Args:
        rows: float32 [rows, K].
        counts: how many rows of the tensor each row represents: [rows].
        weights: those that read the tensor; None stands for the tensor itself, W = 1, if no weight reads it.
        thresholds: values that the largest number represents, each above 0.
        middles: for each threshold, a constant that is subtracted from x before quantization and restored by the bias;
            in between, the product without it is fp16, whose rounding also counts as error. Empty for none.
        rounded: rounds rows in the format.

    Returns:
        An error for each threshold.
    """
    share = counts / counts.sum()
    kept = [rounded(rows - np.float32(m), t) for m, t in zip(middles or [0.0] * len(thresholds), thresholds)]
    wrong = [x + np.float32(m) - rows for x, m in zip(kept, middles or [0.0] * len(kept))]
    total = np.zeros(len(kept))
    for weight in weights:
        exact, errors = _energies(rows, wrong, kept if middles else None, weight)
        mean = float((exact * share).sum()) or 1.0
        total += [float(((error / mean) ** POWER * share).sum()) ** (1 / POWER) for error in errors]
    return (total / len(weights)).tolist()


def _energies(
    rows: np.ndarray, wrong: Sequence[np.ndarray], halved: Sequence[np.ndarray] | None, weight: ir.TensorProtocol | None
) -> tuple[np.ndarray, list[np.ndarray]]:
    """|x W|² of each row, and |(x - x̂) W|² of each row for each threshold, float64, including the rounding of these
    products to fp16."""

    def energies(matrix: np.ndarray | None) -> tuple[np.ndarray, list[np.ndarray]]:
        if matrix is not None and matrix.ndim == 4:
            matrix = matrix.reshape(matrix.shape[:2]).T
        if matrix is not None:
            matrix = np.ascontiguousarray(matrix[:, :: -(-matrix.shape[1] // _COLUMNS)])
        exact, *products = (x if matrix is None else x @ matrix for x in (rows, *wrong))
        if halved is not None and matrix is not None:
            products = [error + _lost_in_fp16(x @ matrix) for error, x in zip(products, halved)]
        exact, *errors = (np.einsum("rn,rn->r", y, y, dtype=np.float64) for y in (exact, *products))
        return exact, errors

    return energies(None) if weight is None else read_weight(weight, energies)


def _lost_in_fp16(product: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return product.astype(np.float16).astype(np.float32) - product
