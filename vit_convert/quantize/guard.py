"""Widens the thresholds of entropy where clipping costs more than it gains, judged by the products that read each tensor.

Entropy weighs values by their number. A trained transformer has a few huge activations in a few tokens, which carry the image: to entropy
they are a tail to be cut off. So the tensor's own distribution decides nothing here: the rows are quantized with each candidate, multiplied
by the weights that read them, and compared with the exact products. A huge value that meets small weights is still clipped.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from vit_convert.quantize.graph import linear_weight, read_weight
from vit_convert.quantize.rows import RowSample, priorities

LEVELS = 127
# Rows count by the fourth power of their squared error: rounding spreads over all rows and layers and averages out, clipping takes the
# same from the same few tokens in every layer. The mean of squared errors clips so much that the trained model of checkpoints/DINOV2.md
# loses more than by min-max; powers of 4 keep more of it than min-max does, of 2 nearly as much.
POWER = 4
_COLUMNS = 256  # of a weight that are multiplied: evenly spaced, they stand for the others
_STEPS = 3  # candidates for each doubling
_MOST = 13  # candidates at most

Rounding = Callable[[np.ndarray, float], np.ndarray]  # what becomes of rows when the largest number stands for a threshold


def int8(rows: np.ndarray, threshold: float) -> np.ndarray:
    """Rows in int8 and back."""
    scale = np.float32(threshold) / np.float32(LEVELS)
    return np.clip(np.rint(rows / scale), -LEVELS, LEVELS) * scale


@dataclasses.dataclass(frozen=True)
class Cost:
    """What each threshold of a tensor costs.

    Attributes:
        candidates: thresholds, from entropy's to the largest |x|.
        errors: for each, the error of the products that read the tensor, as a share of their mean square; see `product_errors`.
    """

    candidates: list[float]
    errors: list[float]

    @property
    def best(self) -> float:
        """The threshold of the smallest error; of equal ones the largest, so that nothing is clipped for free."""
        smallest = min(self.errors)
        return max(t for t, error in zip(self.candidates, self.errors) if error <= smallest)


class Guard:
    """Collects the rows of some activations while they stream by, and then says what thresholds cost.

    Args:
        model: the fp32 graph; weights are read when `cost` asks for them.
        names: of activations.
    """

    def __init__(self, model: ir.Model, names: Sequence[str]):
        values = {v.name: v for node in model.graph for v in node.outputs} | {v.name: v for v in model.graph.inputs}
        self._weights = {name: readers(values[name]) for name in names}
        self._samples = {name: RowSample() for name in names}

    def add(self, name: str, value: np.ndarray, image_keys: Sequence[int]) -> None:
        """Offers an activation of a batch.

        Args:
            name: of the activation.
            value: float32, finite; image after image along its first axis.
            image_keys: a number for each image that goes with its pixels.
        """
        channels = channels_of(self._weights[name])
        rows = as_rows(value, channels)
        if rows.shape[1] != channels:
            self._weights[name] = []  # no product that we know: the tensor is judged by itself
        self._samples[name].add(rows, priorities(image_keys, len(rows)))

    def cost(self, name: str, entropy: float, amax: float) -> Cost:
        """What the thresholds from entropy's to the largest |x| cost."""
        rows, counts = self._samples[name].rows()
        thresholds = candidates(entropy, amax)
        return Cost(thresholds, product_errors(rows, counts, self._weights[name] or [None], thresholds))

    def error(self, name: str, threshold: float, rounded: Rounding = int8) -> float:
        """What one threshold costs; 0 for a tensor that is all zero."""
        rows, counts = self._samples[name].rows()
        return product_errors(rows, counts, self._weights[name] or [None], [threshold], rounded)[0] if threshold else 0.0


def readers(value: ir.Value) -> list[ir.TensorProtocol]:
    """The weights, [K, N] or [N, K, 1, 1], of the linears that multiply an activation, or another shape of it, by them."""
    found: list[ir.TensorProtocol] = []
    for node, index in value.uses():
        weight = linear_weight(node) if index == 0 else None
        if index == 0 and node.op_type in ("Reshape", "Transpose"):
            found += readers(node.outputs[0])
        elif weight is not None and weight.const_value is not None and _is_product(node, tuple(weight.const_value.shape.numpy())):
            found.append(weight.const_value)
    return found


def _is_product(node: ir.Node, shape: tuple[int, ...]) -> bool:
    """Whether each row is multiplied by the whole weight: no convolution with neighbours or groups."""
    grouped = "group" in node.attributes and node.attributes["group"].as_int() != 1
    return len(shape) == 2 or (shape[2:] == (1, 1) and not grouped)


def channels_of(weights: Sequence[ir.TensorProtocol]) -> int | None:
    """K of the weights that read one tensor; None where none does."""
    shapes = {tuple(weight.shape.numpy()) for weight in weights}
    sizes = {shape[0] if len(shape) == 2 else shape[1] for shape in shapes}
    return sizes.pop() if len(sizes) == 1 else None


def as_rows(value: np.ndarray, channels: int | None) -> np.ndarray:
    """An activation as the rows that a linear multiplies: [rows, channels].

    Args:
        value: [..., channels], [batch, channels, height, width], or attended values [batch, heads, tokens, channels / heads].
        channels: K of the weight; None takes the last axis.
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
    """Thresholds from entropy's to the largest |x|, both included, in equal ratios; one where they are the same."""
    if not 0 < entropy < amax:
        return [max(entropy, amax)]
    steps = min(_MOST - 1, math.ceil(_STEPS * math.log2(amax / entropy)))
    return [*np.geomspace(entropy, amax, max(steps, 1) + 1)[:-1].tolist(), amax]


def product_errors(
    rows: np.ndarray,
    counts: np.ndarray,
    weights: Sequence[ir.TensorProtocol | None],
    thresholds: Sequence[float],
    rounded: Rounding = int8,
) -> list[float]:
    """Measures what quantizing x makes of the products x W, for each threshold.

    For every row the squared error |(x - x̂) W|², as a share of the mean |x W|² of all rows; over the rows its power mean with exponent
    POWER; over the weights their mean.

    Args:
        rows: float32 [rows, K].
        counts: how many rows of the tensor each stands for: [rows].
        weights: what reads the tensor; None stands for the tensor itself, W = 1, where no weight does.
        thresholds: what the largest number stands for, each above 0.
        rounded: of what format.

    Returns:
        An error for each threshold.
    """
    share = counts / counts.sum()
    wrong = [rows - rounded(rows, threshold) for threshold in thresholds]
    total = np.zeros(len(wrong))
    for weight in weights:
        exact, errors = _energies(rows, wrong, weight)
        mean = float((exact * share).sum()) or 1.0
        total += [float(((error / mean) ** POWER * share).sum()) ** (1 / POWER) for error in errors]
    return (total / len(weights)).tolist()


def _energies(rows: np.ndarray, wrong: Sequence[np.ndarray], weight: ir.TensorProtocol | None) -> tuple[np.ndarray, list[np.ndarray]]:
    """|x W|² of each row, and |(x - x̂) W|² of each row for each threshold, float64."""

    def energies(matrix: np.ndarray | None) -> tuple[np.ndarray, list[np.ndarray]]:
        if matrix is not None and matrix.ndim == 4:
            matrix = matrix.reshape(matrix.shape[:2]).T
        if matrix is not None:
            matrix = np.ascontiguousarray(matrix[:, :: -(-matrix.shape[1] // _COLUMNS)])
        products = (x if matrix is None else x @ matrix for x in (rows, *wrong))
        exact, *errors = (np.einsum("rn,rn->r", y, y, dtype=np.float64) for y in products)
        return exact, errors

    return energies(None) if weight is None else read_weight(weight, energies)
