"""Histograms of |x| and the thresholds read from them: entropy (KL), percentile and min-max."""

import dataclasses

import numpy as np

NUM_BINS = 2048
_CHUNK = 1 << 15  # elements worked on at a time: |x| and the bin numbers stay in the L2 cache


class Histogram:
    """Counts of |x| in equal bins over [0, amax]; its size does not depend on how much it has seen.

    The range is fixed before counting, so that counts of any order, batch size or process add up to the same histogram.

    Args:
        amax: largest |x| that will be added.
        num_bins: number of bins.

    Attributes:
        counts: [num_bins] float64; whole numbers, exact up to 2**53.
    """

    def __init__(self, amax: float, num_bins: int = NUM_BINS):
        self.amax = float(amax)
        self.counts = np.zeros(num_bins, np.float64)

    @property
    def bin_width(self) -> float:
        return self.amax / len(self.counts)

    def add(self, x: np.ndarray) -> None:
        """Counts an array.

        Args:
            x: float array of any shape; |x| beyond amax counts in the last bin.

        Raises:
            ValueError: x holds NaN.
        """
        last = len(self.counts) - 1
        per_unit = np.float32(len(self.counts) / self.amax) if self.amax else np.float32(0)
        flat = np.ascontiguousarray(x).reshape(-1)
        for start in range(0, flat.size, _CHUNK):
            scaled = np.abs(flat[start : start + _CHUNK]) * per_unit
            with np.errstate(invalid="ignore"):
                # NaN casts to a negative number, which bincount refuses.
                bins = np.minimum(scaled, last).astype(np.intp)
            self.counts += np.bincount(bins, minlength=last + 1)

    def merge(self, other: "Histogram") -> None:
        """Adds another histogram's counts.

        Args:
            other: a histogram of the same tensor over the same range.

        Raises:
            ValueError: the ranges or the numbers of bins differ.
        """
        if (self.amax, len(self.counts)) != (other.amax, len(other.counts)):
            raise ValueError(
                f"histograms over {self.amax:g} in {len(self.counts)} and {other.amax:g} in {len(other.counts)} bins do not add up"
            )
        self.counts += other.counts


@dataclasses.dataclass(frozen=True)
class Divergences:
    """The entropy search, spread out.

    Attributes:
        kept_bins: [candidates] int, how many bins each candidate keeps.
        kl: [candidates] KL(P‖Q) in nats; inf for a candidate that keeps nothing.
    """

    kept_bins: np.ndarray
    kl: np.ndarray


def divergences(counts: np.ndarray, levels: int = 128) -> Divergences:
    """Computes what each clipping threshold loses, as the KL divergence of the quantized from the clipped distribution.

    Candidate i keeps the bins 0…i-1. P is those bins with the clipped mass added to bin i-1. Q is the bins without the clipped mass,
    merged into `levels` equal levels (bin j into level j·levels//i), each level's mass spread evenly over those of its bins that are
    not empty. The clipped mass may land in an empty bin i-1, as it does when outliers stand apart; Q then holds one observation there,
    or the divergence would be infinite for exactly the thresholds worth having.
    All candidates are computed at once: within a level Q is constant, so sums over bins are differences of cumulative sums.

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
    edges = -(-np.arange(levels + 1) * i[:, None] // levels)  # ceil: the first bin of each level; [candidates, levels + 1]
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

    Bin 0 takes bin 1's count first: a spike of near-zero values (padding, the flat side of GELU) would otherwise outweigh everything,
    and zero is represented exactly whatever the threshold. Of equal divergences the largest threshold wins, so nothing is clipped
    for free.

    Args:
        histogram: of |x|.
        levels: number of positive quantization levels; 128 for int8.

    Returns:
        (i + 0.5) · bin_width for the best candidate i, the value that stands for amax; 0 for a tensor that is all zero.

    Source: S. Migacz, "8-bit inference with TensorRT", GTC 2017, S7310; the zero-bin rule is pytorch-quantization's.
    """
    counts = histogram.counts.copy()
    counts[0] = counts[1]
    if not counts.any():
        return histogram.amax
    found = divergences(counts, levels)
    ties = np.flatnonzero(found.kl <= found.kl.min() + 1e-10)  # equal but for the rounding of the cumulative sums
    return float((found.kept_bins[ties[-1]] + 0.5) * histogram.bin_width)


def percentile_threshold(histogram: Histogram, percentile: float = 99.99) -> float:
    """Finds the smallest bin edge below which so many percent of |x| lie.

    Args:
        histogram: of |x|.
        percentile: 0 to 100.

    Returns:
        The bin's upper edge, in the units of x.
    """
    below = np.cumsum(histogram.counts)
    index = int(np.searchsorted(below, below[-1] * percentile / 100.0))
    return float((min(index, len(below) - 1) + 1) * histogram.bin_width)


def minmax_threshold(histogram: Histogram) -> float:
    """Returns the largest |x|: nothing is clipped."""
    return histogram.amax
