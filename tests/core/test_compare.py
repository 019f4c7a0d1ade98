"""The one definition of how two arrays are compared."""

import numpy as np
import pytest

from vit_convert.core.compare import Tolerance, compare, top1_accuracy


def brute_force(reference, candidate):
    """The same figures, number by number in Python's own float64."""
    max_abs = max(abs(float(a) - float(b)) for a, b in zip(reference.ravel(), candidate.ravel()))
    scale = max(abs(float(a)) for a in reference.ravel())
    cosines = []
    for a, b in zip(reference, candidate):
        a, b = [float(v) for v in a.ravel()], [float(v) for v in b.ravel()]
        dot = sum(x * y for x, y in zip(a, b))
        cosines.append(dot / (sum(x * x for x in a) * sum(y * y for y in b)) ** 0.5)
    return max_abs, max_abs / scale, min(cosines)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_brute_force(dtype):
    rng = np.random.default_rng(0)
    reference = rng.standard_normal((3, 4, 5)).astype(np.float32)
    candidate = (reference + 0.01 * rng.standard_normal((3, 4, 5))).astype(dtype)
    result = compare(reference, candidate)
    # Both are float64 sums of 20 products; only their order differs, so a few 1e-16.
    assert (result.max_abs, result.max_rel, result.cosine) == pytest.approx(
        brute_force(reference, candidate), rel=1e-13
    )
    assert result.finite


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nothing_passes_that_is_not_finite(value):
    candidate = np.ones((2, 3), np.float32)
    candidate[1, 2] = value
    result = compare(np.ones((2, 3), np.float32), candidate)
    assert (result.max_abs, result.max_rel, result.cosine, result.scale) == (float("inf"), float("inf"), 0.0, 1.0)
    assert not result.finite
    assert not Tolerance(float("inf"), float("inf"), -1.0).met_by(result)


def test_nan_in_the_reference_never_passes():
    result = compare(np.full((1, 3), np.nan, np.float32), np.ones((1, 3), np.float32))
    assert not Tolerance(1e9, float("inf"), -1.0).met_by(result)


def test_worst_image_decides():
    reference = np.array([[1.0, 0.0], [0.0, 1.0]])
    assert compare(reference, np.array([[1.0, 0.0], [1.0, 0.0]])).cosine == 0.0


def test_zeros():
    zeros = np.zeros((1, 3))
    assert compare(zeros, zeros) == compare(zeros, -zeros)
    assert compare(zeros, zeros).cosine == 1.0
    assert compare(zeros, zeros + 1e-9).max_rel == np.inf
    assert compare(zeros, zeros + 1e-9).cosine == 0.0


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"\(1, 2\), candidate \(2, 1\)"):
        compare(np.zeros((1, 2)), np.zeros((2, 1)))


@pytest.mark.parametrize(
    ("tolerance", "passes"),
    [
        (Tolerance(0.5, 0.0, 0.0), True),
        (Tolerance(0.49, 0.0, 0.0), False),
        (Tolerance(0.0, 0.25, 0.0), True),  # of the scale, 2
        (Tolerance(0.0, 0.24, 0.0), False),
        (Tolerance(0.25, 0.125, 0.0), True),
        (Tolerance(0.0, float("inf"), 0.99), False),
        (Tolerance(0.0, float("inf"), 0.97), True),
    ],
)
def test_tolerance(tolerance, passes):
    # max_abs 0.5, scale 2, cosine 2 · 2 / (2 · sqrt(4.25)) = 0.9701
    assert tolerance.met_by(compare(np.array([[2.0, 0.0]]), np.array([[2.0, 0.5]]))) is passes


def test_tolerance_reads_well():
    assert str(Tolerance(1e-6, 1e-4, 0.999)) == "max_abs <= 1e-06 + 0.0001 * scale, cosine >= 0.999"
    assert str(Tolerance(0, float("inf"), 0.98)) == "cosine >= 0.98"


def test_top1():
    # 1, 0, 1, 0, 2
    logits = np.array([[0.1, 0.9, 0.0], [0.8, 0.2, 0.1], [0.3, 0.7, 0.1], [0.6, 0.4, 0.2], [0.1, 0.2, 0.7]])
    for labels, share in [
        ([1, 0, 1, 0, 2], 100),
        ([0, 0, 0, 0, 0], 40),
        ([2, 2, 2, 2, 2], 20),
        ([0, 1, 2, 2, 1], 0),
        ([2, 1, 1, 0, 1], 40),
    ]:
        assert top1_accuracy(logits, np.array(labels)) == share


@pytest.mark.parametrize("rtol", [0.0, 1e-4, float("inf")])
def test_zeros_that_are_zero_pass_whatever_judges_them(rtol):
    """A head of zeros, as checkpoints for fine-tuning have it: infinity times a scale of zero bounds nothing."""
    tolerance, zeros = Tolerance(0.0, rtol, 0.999), np.zeros((2, 3))
    assert tolerance.met_by(compare(zeros, zeros.copy()))
    assert not tolerance.met_by(compare(zeros, zeros + 1e-3))


def test_outputs_that_are_zero():
    zero, one = np.zeros((2, 3)), np.full((2, 3), 0.5)
    same = compare(zero, zero.copy())
    assert (same.max_abs, same.max_rel, same.cosine) == (0.0, 0.0, 1.0)
    other = compare(zero, one)
    assert (other.max_abs, other.max_rel, other.cosine) == (0.5, float("inf"), 0.0)


def test_no_images_differ_in_nothing():
    nothing = compare(np.ones((0, 3), np.float32), np.ones((0, 3), np.float32))
    assert (nothing.max_abs, nothing.max_rel, nothing.cosine, nothing.scale, nothing.finite) == (
        0.0,
        0.0,
        1.0,
        0.0,
        True,
    )
