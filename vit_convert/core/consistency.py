"""Checks that need no reference: what a graph or an engine gives has to agree with itself, and be finite."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from vit_convert.core.compare import Tolerance, compare
from vit_convert.core.record import Record

Arrays = Mapping[str, np.ndarray]
IDENTICAL, PERMUTED, ALONE, FINITE = "identical rows", "permuted batch", "batch of one", "finite"
ROWS = ("noise", "black", "white", "noise again")  # of the probes


@dataclasses.dataclass(frozen=True)
class Finding(Record):
    """One output by one check.

    Attributes:
        check: IDENTICAL: rows of one batch that are equal give equal answers; PERMUTED: a batch in another order gives
            the answers in that order; ALONE: one row by itself gives what it gives within a batch; FINITE: neither NaN
            nor infinity on noise, black and white.
        output: its name.
        max_abs: largest difference; 0 for FINITE.
        max_rel: max_abs over the scale.
        cosine: smallest.
        passed: whether the tolerance is met.
        where: of FINITE, the rows that are not.
    """

    check: str
    output: str
    max_abs: float
    max_rel: float
    cosine: float
    passed: bool
    where: str = ""

    def __str__(self) -> str:
        if self.check == FINITE:
            return f"{self.output} is NaN or infinite on {self.where}"
        return (
            f"{self.output} does not agree with itself ({self.check}): max abs {self.max_abs:.3g} "
            f"({self.max_rel:.3g} of scale), cosine {self.cosine:.6f}"
        )


def check_consistency(
    run: Callable[[Arrays], Arrays], probes: Arrays, outputs: Sequence[str], tolerance: Tolerance, *, largest: int
) -> list[Finding]:
    """Runs a model on a few batches and compares its answers with each other.

    Args:
        run: maps {input: [batch, …]} to {output: [batch, …]}.
        probes: for each input four rows: ROWS, the last equal to the first.
        outputs: names of those to check.
        tolerance: between two answers that should be equal.
        largest: the most rows that one run takes.

    Returns:
        A Finding for each check and output. A model that takes one row at a time gets only FINITE.

    Example:
        >>> probes = {"x": np.float32([[1], [0], [5], [1]])}
        >>> mean_of_batch = lambda x: {"y": x["x"] - x["x"].mean()}  # what must not be
        >>> found = check_consistency(mean_of_batch, probes, ["y"], Tolerance(1e-6, 0.0, -1.0), largest=4)
        >>> [row.check for row in found if not row.passed]
        ['batch of one']
    """
    count = min(len(ROWS), largest)
    if count < 2:
        return _finite([dict(run(_rows(probes, [row]))) for row in range(3)], outputs, [[0], [1], [2]])
    order = [*range(count - 1), 3]
    together = run(_rows(probes, order))
    backwards = run(_rows(probes, order[::-1]))
    alone = run(_rows(probes, order[:1]))
    runs, rows = [together], [order]
    for row in (row for row in range(3) if row not in order):
        runs, rows = [*runs, run(_rows(probes, [row]))], [*rows, [row]]
    found = _finite(runs, outputs, rows)
    for name in outputs:
        values = np.asarray(together[name])
        pairs = {
            IDENTICAL: (values[:1], values[-1:]),
            PERMUTED: (values[::-1], np.asarray(backwards[name])),
            ALONE: (values[:1], np.asarray(alone[name])),
        }
        found += [_compared(check, name, *pair, tolerance) for check, pair in pairs.items()]
    return found


def agreement(name: str, one: Arrays, other: Arrays, outputs: Sequence[str], tolerance: Tolerance) -> list[Finding]:
    """Compares the answers of two models that should be the same, such as two builds of one graph.

    Args:
        name: what to call the check.
        one: {output: [batch, …]}.
        other: the same of the other.
        outputs: names of those to compare.
        tolerance: between them.
    """
    return [_compared(name, key, np.asarray(one[key]), np.asarray(other[key]), tolerance) for key in outputs]


def _rows(probes: Arrays, places: Sequence[int]) -> dict[str, np.ndarray]:
    return {name: np.ascontiguousarray(values[list(places)]) for name, values in probes.items()}


def _compared(check: str, output: str, one: np.ndarray, other: np.ndarray, tolerance: Tolerance) -> Finding:
    found = compare(one, other)
    return Finding(check, output, found.max_abs, found.max_rel, found.cosine, tolerance.met_by(found))


def _finite(runs: Sequence[Arrays], outputs: Sequence[str], rows: Sequence[Sequence[int]]) -> list[Finding]:
    found = []
    for name in outputs:
        bad = [
            ROWS[row]
            for values, places in zip(runs, rows)
            for value, row in zip(np.asarray(values[name]), places)
            if not np.isfinite(value).all()
        ]
        where = ", ".join(word for word in dict.fromkeys(bad) if word != ROWS[3])
        found.append(Finding(FINITE, name, 0.0, 0.0, 1.0, not bad, where))
    return found
