"""Which rows of an activation are kept, and what each stands for, against sorting all of them at once."""

import numpy as np
import pytest

from vit_convert.quantize.rows import REST, TOP, RowSample, priorities


def sorted_at_once(rows, priority, top, rest):
    """The kept rows by their number: those of largest |x|, of equal ones the one of smaller priority; then the smallest
    priorities."""
    numbers = sorted(range(len(rows)), key=lambda i: (-max(abs(float(v)) for v in rows[i]), priority[i]))
    others = sorted(numbers[top:], key=lambda i: priority[i])
    return numbers[:top], others[:rest]


@pytest.mark.parametrize("batches", [1, 2, 7, 60])
@pytest.mark.parametrize(("top", "rest"), [(3, 5), (1, 1), (5, 0), (0, 4), (100, 3), (40, 30)])
def test_the_largest_and_a_sample_of_the_others(batches, top, rest):
    rng = np.random.default_rng(4)
    rows = rng.integers(-4, 5, (60, 3)).astype(np.float32)  # many equal magnitudes, of both signs
    priority = rng.random(60)
    sample = RowSample(top=top, rest=rest)
    for numbers in np.array_split(np.arange(60), batches):
        sample.add(rows[numbers], priority[numbers])
    largest, others = sorted_at_once(rows, priority, top, rest)
    found, weights = sample.rows()
    assert sample.count == 60
    assert sorted(map(tuple, found[: len(largest)])) == sorted(map(tuple, rows[largest]))
    assert sorted(map(tuple, found[len(largest) :])) == sorted(map(tuple, rows[others]))
    # The top stands for itself, and the others alike for all the rest.
    expected = [1.0] * len(largest) + [(60 - len(largest)) / len(others) for _ in others]
    assert weights.dtype == np.float64 and weights.tolist() == pytest.approx(expected, rel=1e-12)


def test_of_few_rows_each_is_kept_and_stands_for_itself():
    rows = np.arange(12, dtype=np.float32).reshape(4, 3) - 6
    sample = RowSample()
    sample.add(rows, np.array([0.3, 0.1, 0.2, 0.4]))
    found, weights = sample.rows()
    assert (
        sorted(map(tuple, found)) == sorted(map(tuple, rows))
        and weights.tolist() == [1.0] * 4
        and found.dtype == np.float32
    )
    assert (TOP, REST) == (32, 128)
    for size, kept in ((160, 160), (161, 160)):
        sample = RowSample()
        sample.add(np.zeros((size, 1), np.float32), np.arange(size) / size)
        assert len(sample.rows()[0]) == kept and sample.rows()[1].sum() == pytest.approx(size)


def test_what_was_never_offered():
    found, weights = RowSample().rows()
    assert len(found) == len(weights) == 0
    assert RowSample().count == 0


def test_a_large_negative_value_is_as_large_as_a_positive_one():
    sample = RowSample(top=1, rest=0)
    sample.add(np.array([[1, 2, 3], [0, -9, 0], [8, 0, 0]], np.float32), np.zeros(3))
    assert sample.rows()[0].tolist() == [[0, -9, 0]]


def test_priorities_go_with_the_image_and_the_row():
    found = priorities([5, 9, 5], 12)
    assert found.shape == (12,) and np.array_equal(found[:4], found[8:]) and not np.array_equal(found[:4], found[4:8])
    assert np.array_equal(found[:4], np.random.default_rng(5).random(4)) and np.array_equal(
        priorities([9], 4), found[4:8]
    )
    assert len(set(found[:8])) == 8 and (found >= 0).all() and (found < 1).all()
