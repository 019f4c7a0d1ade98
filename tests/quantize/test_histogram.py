"""The histogram and its thresholds against plain-Python brute force and known distributions."""

import math
import sys

import numpy as np
import pytest

from vit_convert.quantize.histogram import (
    Histogram,
    divergences,
    entropy_threshold,
    minmax_threshold,
    mse_threshold,
    percentile_threshold,
)


def brute_force_kl(counts: list[float], levels: int) -> list[float]:
    """KL(P‖Q) for each candidate, written as the definition reads."""
    result = []
    for i in range(levels, len(counts) + 1):
        p, kept = list(counts[:i]), list(counts[:i])
        p[-1] += sum(counts[i:])
        if kept[-1] == 0 and sum(counts[i:]) > 0:
            kept[-1] = 1
        q = [0.0] * i
        for level in range(levels):
            bins = [j for j in range(i) if j * levels // i == level]
            occupied = [j for j in bins if kept[j] > 0]
            for j in occupied:
                q[j] = sum(kept[k] for k in bins) / len(occupied)
        if sum(counts[:i]) == 0:
            result.append(math.inf)
            continue
        p = [x / sum(p) for x in p]
        q = [x / sum(q) for x in q]
        result.append(sum(a * math.log(a / b) for a, b in zip(p, q) if a > 0))
    return result


def small_histograms() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    dense = [rng.integers(1, 1000, 64) for _ in range(5)]
    gaps = [rng.integers(0, 50, 64) * (rng.random(64) < 0.4) for _ in range(10)]
    tails = [np.where(np.arange(64) < 12, rng.integers(1, 500, 64), (np.arange(64) % 17 == 9) * 1) for _ in range(5)]
    edge_only = np.zeros(64, np.int64)
    edge_only[-1] = 3
    return [*dense, *gaps, *tails, edge_only, np.arange(64)[::-1]]


@pytest.mark.parametrize("levels", [4, 8, 13])
@pytest.mark.parametrize("counts", small_histograms())
def test_divergences_match_brute_force(counts, levels):
    found = divergences(counts, levels)
    expected = brute_force_kl([float(c) for c in counts], levels)
    assert found.kept_bins.tolist() == list(range(levels, 65))
    # float64 sums of at most 64 terms in another order
    np.testing.assert_allclose(found.kl, expected, rtol=1e-9, atol=1e-12)


def test_entropy_threshold_is_the_last_minimum_of_the_brute_force():
    rng = np.random.default_rng(1)
    counts = (np.round(1e4 * np.exp(-np.arange(64) / 6)) + (rng.random(64) < 0.1)).astype(np.int64)
    counts[63] = 1
    histogram = Histogram(num_bins=32)
    histogram.add(np.repeat(np.arange(64, dtype=np.float32) + 0.5, counts))
    assert histogram.bin_width == 1.0 and np.array_equal(histogram.counts, counts)
    counts[0] = counts[1]
    kl = brute_force_kl(counts.tolist(), 8)
    best = max(i for i, value in enumerate(kl) if value <= min(kl) + 1e-10) + 8
    assert entropy_threshold(histogram, levels=8) == (best + 0.5) * 1.0


def histogram_of(x: np.ndarray) -> Histogram:
    histogram = Histogram()
    histogram.add(x)
    return histogram


@pytest.mark.parametrize(
    ("draw", "spread"),
    [
        (lambda rng, n: rng.normal(size=n), 0.0),  # outliers at one point: the clipped mass falls into empty bins
        (lambda rng, n: rng.normal(size=n), 0.5),
        (lambda rng, n: rng.laplace(size=n), 0.5),
        (lambda rng, n: rng.standard_t(3, size=n), 0.5),
    ],
    ids=["normal-point", "normal", "laplace", "t3"],
)
def test_entropy_clips_outliers(draw, spread):
    rng = np.random.default_rng(2)
    x = draw(rng, 500_000).astype(np.float32)
    bulk = float(np.quantile(np.abs(x), 0.999))
    x[:20] = 20 * bulk * rng.uniform(1 - spread, 1, 20)
    threshold = entropy_threshold(histogram_of(x))
    # keeps all but a thousandth of what is not an outlier, and gives at most a fifth of the range to the outliers
    assert bulk < threshold < 0.2 * 20 * bulk


def test_entropy_does_not_clip_a_uniform():
    x = np.random.default_rng(3).uniform(-4, 4, 1_000_000).astype(np.float32)
    histogram = histogram_of(x)
    # at most a few of the bins may go: with 500 counts a bin, the noise of the last bins is within the divergence's own
    assert entropy_threshold(histogram) > 0.98 * histogram.amax
    assert minmax_threshold(histogram) == histogram.amax


def test_entropy_ignores_a_spike_at_zero():
    x = np.random.default_rng(4).normal(size=200_000).astype(np.float32)
    spiked = np.concatenate([x, np.zeros(10_000_000, np.float32)])
    assert entropy_threshold(histogram_of(spiked)) == entropy_threshold(histogram_of(x))


def test_percentile_matches_numpy_to_a_bin():
    x = np.random.default_rng(5).standard_t(3, size=300_000).astype(np.float32)
    histogram = histogram_of(x)
    for percentile in (50.0, 99.0, 99.99, 100.0):
        exact = np.percentile(np.abs(x), percentile, method="inverted_cdf")
        assert 0 <= percentile_threshold(histogram, percentile) - exact <= histogram.bin_width * 1.001


@pytest.mark.parametrize("amax", [1.0, 4095.0, 0.7, 3.3e-5, 8.1e4])
def test_counts_match_numpy(amax):
    x = np.random.default_rng(6).uniform(-amax, amax, (3, 1, 33_333)).astype(np.float32)
    histogram = histogram_of(x)
    bins = len(histogram.counts)
    assert histogram.amax == np.abs(x).max() and 2048 <= bins <= 4096
    # edges are multiples of a power of two and so is every product: exact in float32 and in float64
    edges = histogram.bin_width * np.arange(bins + 1)
    assert edges[-2] <= histogram.amax < edges[-1]
    expected, _ = np.histogram(np.abs(x).astype(np.float64), bins=edges)
    assert np.array_equal(histogram.counts, expected)


def test_order_and_batches_do_not_matter():
    rng = np.random.default_rng(7)
    # every order widens at other places
    x = (rng.normal(size=100_000) * np.exp2(rng.integers(-40, 10, 100_000))).astype(np.float32)
    whole = histogram_of(x)
    for order in (np.sort(np.abs(x)), -np.sort(-np.abs(x)), rng.permutation(x)):
        pieces = Histogram()
        for piece in np.array_split(order, 70):
            pieces.add(piece)
        assert (pieces.amax, pieces.bin_width) == (whole.amax, whole.bin_width)
        assert np.array_equal(pieces.counts, whole.counts)
    assert whole.counts.sum() == x.size


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused(bad):
    with pytest.raises(ValueError):
        Histogram().add(np.array([0.5, bad], np.float32))


@pytest.mark.parametrize("value", [0.0, 1e-40])  # zero, and a denormal
def test_a_tensor_that_is_all_but_zero_is_not_clipped(value):
    histogram = histogram_of(np.full(10, value, np.float32))
    assert (
        entropy_threshold(histogram) == percentile_threshold(histogram) == minmax_threshold(histogram) == histogram.amax
    )
    assert histogram.amax == np.float32(value) and histogram.counts.sum() == 10


def brute_force_mse(counts: list[float], width: float, amax: float, levels: int) -> float:
    """The last of the bin edges from the levels on, and amax, with the smallest squared error, as the definition
    reads."""
    best, smallest = amax, math.inf
    for threshold in [*(i * width for i in range(levels, len(counts)) if i * width < amax), amax]:
        error = 0.0
        for i, count in enumerate(counts):
            value = 0.0 if i == 0 else (i + 0.5) * width
            error += count * (value - min(round(value / threshold * levels), levels) * threshold / levels) ** 2
        if error <= smallest:
            best, smallest = threshold, error
    return best


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("levels", [4, 8, 13])
def test_mse_threshold_matches_brute_force(seed, levels):
    rng = np.random.default_rng(seed)
    histogram = Histogram(num_bins=32)
    histogram.add(np.concatenate([rng.laplace(size=3000), [rng.uniform(5, 30)]]).astype(np.float32))
    expected = brute_force_mse(histogram.counts.tolist(), histogram.bin_width, histogram.amax, levels)
    assert mse_threshold(histogram, levels, num_candidates=len(histogram.counts)) == pytest.approx(expected, rel=1e-12)


def test_mse_threshold_of_few_bins_clips_nothing():
    """What fits the levels exactly loses nothing."""
    histogram = Histogram(num_bins=4)
    histogram.add(np.array([0.1, 0.2, 0.3, 5.0], np.float32))
    num_bins = len(histogram.counts)
    assert mse_threshold(histogram, levels=num_bins) == mse_threshold(histogram, levels=num_bins + 1) == histogram.amax
    zero = Histogram()
    zero.add(np.zeros(10, np.float32))
    assert mse_threshold(zero) == 0


def test_the_work_of_entropy_is_in_arrays():
    """As many calls for 16 times the candidates: a loop over them in Python would take minutes for the tensors of a
    model."""
    x = np.random.default_rng(8).normal(size=100_000).astype(np.float32)
    calls = {}
    for num_bins in (256, 4096):
        histogram = Histogram(num_bins=num_bins)
        histogram.add(x)
        counted = []
        sys.setprofile(lambda frame, event, argument: counted.append(event))  # noqa: B023
        try:
            entropy_threshold(histogram)
        finally:
            sys.setprofile(None)
        calls[num_bins] = len(counted)
    assert 0 < calls[4096] < 1.5 * calls[256]
