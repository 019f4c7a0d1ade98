"""What a model gives has to agree with itself: each kind of disagreement by a function that has it."""

import numpy as np
import pytest

from vit_convert.core.compare import Tolerance
from vit_convert.core.consistency import ALONE, FINITE, IDENTICAL, PERMUTED, ROWS, agreement, check_consistency

EXACT = Tolerance(0.0, 0.0, -1.0)
ROW = np.random.default_rng(0).uniform(0.5, 1.5, (1, 6)).astype(np.float32)
PROBES = {"x": np.concatenate([ROW, np.zeros_like(ROW), np.full_like(ROW, 2.0), ROW])}


def square(x):
    return {"y": x["x"] ** 2}


def first_leaks(x):
    """Every row but the first gets a part of the first."""
    values = x["x"] ** 2
    return {"y": values + np.where(np.arange(len(values))[:, None] > 0, 0.1 * values[:1], 0)}


def of_batch(x):
    """All depends on how many there are, but not on the order."""
    return {"y": x["x"] * len(x["x"])}


def of_place(x):
    return {"y": x["x"] + np.arange(len(x["x"]), dtype=np.float32)[:, None]}


def not_on_black(x):
    with np.errstate(invalid="ignore", divide="ignore"):
        return {"y": x["x"] / x["x"].max(axis=1, keepdims=True)}


def not_on_white(x):
    return {"y": np.where(x["x"] == 2.0, np.inf, x["x"])}


@pytest.mark.parametrize(
    ("run", "wrong"),
    [
        (square, set()),
        (first_leaks, {IDENTICAL, PERMUTED}),
        (of_batch, {ALONE}),
        (of_place, {IDENTICAL, PERMUTED}),
        (not_on_black, {FINITE, PERMUTED}),  # NaN agrees with nothing
        (not_on_white, {FINITE, PERMUTED}),
    ],
)
def test_each_disagreement_is_seen(run, wrong):
    found = check_consistency(run, PROBES, ["y"], EXACT, largest=4)
    assert {row.check for row in found if not row.passed} == wrong and len(found) == 4


@pytest.mark.parametrize("largest", [1, 2, 3, 4])
@pytest.mark.parametrize(("run", "where"), [(not_on_black, "black"), (not_on_white, "white")])
def test_what_is_not_finite_is_named_at_every_batch(run, where, largest):
    sizes = []

    def counted(x):
        sizes.append(len(x["x"]))
        return run(x)

    found = check_consistency(counted, PROBES, ["y"], EXACT, largest=largest)
    (row,) = [row for row in found if row.check == FINITE]
    assert str(row) == f"y is NaN or infinite on {where}" and max(sizes) == min(largest, 4)


def test_tolerance_decides():
    def nearly(x):
        return {"y": x["x"] + 1e-4 * np.arange(len(x["x"]), dtype=np.float32)[:, None]}

    for tolerance, passes in ((Tolerance(1e-3, 0.0, 0.999), True), (Tolerance(1e-5, 0.0, 0.999), False)):
        found = check_consistency(nearly, PROBES, ["y"], tolerance, largest=4)
        assert all(row.passed for row in found) is passes


def test_two_answers():
    one, other = {"y": ROW}, {"y": ROW + np.float32(0.5)}
    (found,) = agreement("the other build", one, other, ["y"], Tolerance(0.1, 0.0, -1.0))
    assert not found.passed and found.max_abs == pytest.approx(0.5) and "(the other build): max abs 0.5" in str(found)
    (found,) = agreement("the other build", one, one, ["y"], EXACT)
    assert found.passed


def test_rows_that_are_not_finite_are_named_one_by_one_too():
    """Where a batch of one is all that an engine takes."""

    def but(value):
        return lambda x: {"y": np.where((x["x"] == value).all(1, keepdims=True), np.nan, x["x"])}

    for row, value in ((0, ROW), (1, 0.0), (2, 2.0)):
        (found,) = check_consistency(but(value), PROBES, ["y"], EXACT, largest=1)
        assert (found.check, found.passed, found.where) == (FINITE, False, ROWS[row])
        assert (found.max_abs, found.max_rel, found.cosine) == (0.0, 0.0, 1.0)  # nothing was compared
