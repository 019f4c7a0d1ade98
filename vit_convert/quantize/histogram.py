"""Histograms of |x| and the thresholds read from them: entropy (KL), percentile, mean squared error and min-max."""

import dataclasses
import math

import numpy as np

NUM_BINS = 2048
_CHUNK = 1 << 15  # elements processed at a time, so that |x| and the bin numbers stay in the L2 cache
# of a bin's width: 1 / width is still a float32, and anything smaller is zero for all purposes
_SMALLEST_EXPONENT = -120


class Histogram:
    """Counts of |x| in equal bins from 0; its size does not depend on the amount of data.

    Bins are 2**k wide, for the smallest k at which twice `num_bins` hold the largest |x|. When a larger value arrives,
    pairs of bins merge. That loses nothing, so one pass is enough, and any order or batch size gives the same
    histogram.

    Args:
        num_bins: minimum number of bins below the largest |x|; a power of two.

    Attributes:
        amax: largest |x| seen.
    """

    def __init__(self, num_bins: int = NUM_BINS):
        self.amax = 0.0
        self._exponent = _SMALLEST_EXPONENT
        self._counts = np.zeros(2 * num_bins, np.int64)

    @property
    def bin_width(self) -> float:
        return math.ldexp(1.0, self._exponent)

    @property
    def counts(self) -> np.ndarray:
        """int64 [bins]: the bins up to the one that contains amax."""
        return self._counts[: int(self.amax / self.bin_width) + 1]

    def add(self, x: np.ndarray) -> None:
        """Counts an array.

        Args:
            x: float32 array of any shape.

        Raises:
            ValueError: x holds NaN or infinity.
        """
        flat = np.ascontiguousarray(x).reshape(-1)
        for start in range(0, flat.size, _CHUNK):
            magnitude = np.abs(flat[start : start + _CHUNK])
            largest = float(magnitude.max())
            if not math.isfinite(largest):
                raise ValueError(f"holds {largest}")
            if largest > self.amax:
                self.amax = largest
                self._widen()
            bins = (magnitude * np.float32(1 / self.bin_width)).astype(np.intp)  # a power of two: exact
            self._counts += np.bincount(bins, minlength=len(self._counts))

    def _widen(self) -> None:
        """Merges neighbours until the bins reach amax."""
        _, above = math.frexp(self.amax)  # amax < 2**above
        steps = above - (len(self._counts) - 1).bit_length() - self._exponent
        if steps > 0:
            merged = min(len(self._counts), 1 << steps)
            sums = self._counts.reshape(-1, merged).sum(axis=1)
            self._counts = np.concatenate([sums, np.zeros(len(self._counts) - len(sums), np.int64)])
            self._exponent += steps


@dataclasses.dataclass(frozen=True)
class Divergences:
    """The result of the entropy search for every candidate.

    Attributes:
        kept_bins: [candidates] int, the number of bins that each candidate keeps.
        kl: [candidates] KL(P‖Q) in nats; inf for a candidate that keeps nothing.
    """

    kept_bins: np.ndarray
    kl: np.ndarray


def divergences(counts: np.ndarray, levels: int = 128) -> Divergences:
    """Computes what each clipping threshold loses: the KL divergence of the quantized from the clipped distribution.

    Candidate i keeps the bins 0…i-1. P is those bins with the clipped mass added to bin i-1. Q is the bins without the
    clipped mass, merged into `levels` equal levels (bin j into level j·levels//i), and each level's mass is spread
    evenly over its non-empty bins. The clipped mass may land in an empty bin i-1, as happens when outliers are
    isolated; Q then holds one observation there, since the divergence would otherwise be infinite for exactly the most
    useful thresholds. All candidates are computed at once: within a level Q is constant, so sums over bins are
    differences of cumulative sums.

    Args:
        counts: [bins] of |x|.
        levels: number of quantization levels.

    Returns:
        The Divergences for i = levels … bins.

    Source: S. Migacz, "8-bit inference with TensorRT", GTC 2017, S7310.
    """
    counts = counts.astype(np.float64)
    num_bins, total = len(counts), counts.sum()
    mass = np.concatenate([[0.0], np.cumsum(counts)])
    occupied = np.concatenate([[0], np.cumsum(counts > 0)])
    entropy = np.concatenate([[0.0], np.cumsum(_xlogx(counts))])

    i = np.arange(levels, num_bins + 1)
    # ceil: the first bin of each level; [candidates, levels + 1]
    edges = -(-np.arange(levels + 1) * i[:, None] // levels)
    level_mass = np.diff(mass[edges])
    level_bins = np.diff(occupied[edges])

    kept, last = mass[i], counts[i - 1]
    clipped = total - kept
    p_levels, q_levels = level_mass.copy(), level_mass
    p_levels[:, -1] += clipped
    lone = (last == 0) & (clipped > 0)
    q_levels[:, -1] += lone
    level_bins[:, -1] += lone

    sum_p_log_p = (entropy[i - 1] + _xlogx(last + clipped)) / total - np.log(total)
    with np.errstate(divide="ignore", invalid="ignore"):
        log_q = np.where(q_levels > 0, np.log(q_levels / (level_bins * (kept + lone)[:, None])), 0.0)
    kl = np.where(kept > 0, sum_p_log_p - (p_levels * log_q).sum(axis=1) / total, np.inf)
    return Divergences(i, kl)


def _xlogx(x: np.ndarray) -> np.ndarray:
    return x * np.log(np.where(x > 0, x, 1.0))


def entropy_threshold(histogram: Histogram, levels: int = 128) -> float:
    """Finds the clipping threshold whose quantized distribution is closest to the clipped one.

    Bin 0 takes bin 1's count first: a spike of near-zero values (padding, the flat side of GELU) would otherwise
    outweigh everything, and zero is represented exactly whatever the threshold. Among equal divergences the largest
    threshold wins, so that nothing is clipped without benefit.

    Args:
        histogram: of |x|.
        levels: number of positive quantization levels; 128 for int8.

    Returns:
        (i + 0.5) · bin_width for the best candidate i, which takes the place of amax; amax for a tensor that is nearly
        zero.

    Source: S. Migacz, "8-bit inference with TensorRT", GTC 2017, S7310; the zero-bin rule is pytorch-quantization's.
    """
    counts = histogram.counts.copy()
    if len(counts) <= levels:
        return histogram.amax
    counts[0] = counts[1]
    found = divergences(counts, levels)
    ties = np.flatnonzero(found.kl <= found.kl.min() + 1e-10)  # equal up to the rounding of the cumulative sums
    return float((found.kept_bins[ties[-1]] + 0.5) * histogram.bin_width)


def percentile_threshold(histogram: Histogram, percentile: float = 99.99) -> float:
    """Finds the smallest bin edge below which the given percentage of |x| lies.

    Args:
        histogram: of |x|.
        percentile: 0 to 100.

    Returns:
        The bin's upper edge, in the units of x, at most amax.
    """
    below = np.cumsum(histogram.counts)
    index = int(np.searchsorted(below, below[-1] * percentile / 100.0))
    return min((index + 1) * histogram.bin_width, histogram.amax)


def mse_threshold(histogram: Histogram, levels: int = 127, num_candidates: int = 256) -> float:
    """Finds the threshold with the smallest mean squared error of the tensor from rounding and clipping together.

    Every value counts as its bin's centre, except those of bin 0, which count as zero.

    Args:
        histogram: of |x|.
        levels: number of positive quantization levels; 127 for int8.
        num_candidates: number of bin edges to try, equally spaced up to amax.

    Returns:
        The threshold in the units of x; amax if no other is better, and for a tensor that is nearly zero.
    """
    counts, width = histogram.counts.astype(np.float64), histogram.bin_width
    if len(counts) <= levels:
        return histogram.amax
    x = (np.arange(len(counts)) + 0.5) * width
    x[0] = 0.0
    edges = np.unique(np.linspace(levels, len(counts), num_candidates).astype(int))[:-1] * width
    thresholds = np.append(edges[edges < histogram.amax], histogram.amax)
    scales = thresholds[:, None] / levels
    quantized = np.minimum(np.rint(x / scales), levels) * scales
    errors = ((x - quantized) ** 2 * counts).sum(axis=1)
    return float(thresholds[np.flatnonzero(errors <= np.min(errors))[-1]])


def minmax_threshold(histogram: Histogram) -> float:
    """Returns the largest |x|: nothing is clipped."""
    return histogram.amax
