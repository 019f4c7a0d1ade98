"""Checks that need no reference: the outputs of a graph or an engine have to agree with themselves, and be finite."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from vit_convert.core.compare import Tolerance, compare
from vit_convert.core.record import Record

Arrays = Mapping[str, np.ndarray]
IDENTICAL, PERMUTED, ALONE, FINITE = "identical rows", "permuted batch", "batch of one", "finite"
ROWS = NOISE, BLACK, WHITE = ("noise", "black", "white")  # of the probes, in their order

Batch = tuple[int | str, ...]
"""The rows of one run: those of the probes by name, those of a reference by number."""
Place = tuple[int, int]
"""A number of a batch among several, and of a row in it."""


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


def probe_batches(largest: int) -> list[Batch]:
    """The batches that show whether a model agrees with itself, if there are only probes.

    Args:
        largest: the most rows per run.
    """
    count = min(len(ROWS) + 1, largest)
    if count < 2:
        return [(NOISE,), (BLACK,), (WHITE,)]
    order: Batch = (*ROWS[: count - 1], NOISE)
    return [order, order[::-1], (NOISE,), *((row,) for row in ROWS if row not in order)]


def merged_batches(count: int) -> list[Batch]:
    """The batches that show both whether a model agrees with its reference and whether it agrees with itself.

    Rows with known answers say more than rows that are only compared with each other, so fewer runs are needed than for
    each question separately. If a model mixes rows, by any rule that does not look at their content, or if a black or
    white row disturbs another one in any place, one of the batches shows it. There are batches of one row, of an odd
    number and of the largest number.

    Args:
        count: rows of the reference, and the most rows per run.

    Returns:
        Batches in which a number stands for a row of the reference. Each row of the reference is in one of them.

    Example:
        >>> merged_batches(2)
        [(0,), (0, 1), ('noise', 'noise'), ('black', 'white')]
    """
    if count == 1:
        return [(0,), *((row,) for row in ROWS)]
    if count == 2:
        return [(0,), (0, 1), (NOISE, NOISE), (BLACK, WHITE)]
    if count == 3:
        return [(0,), (0, 1, 2), (0, BLACK, WHITE), (NOISE, BLACK, NOISE)]
    return [(0,), (WHITE, 1, 2), (0, BLACK, WHITE, *range(3, count)), (NOISE, WHITE, BLACK, NOISE)]


def structure_batches(largest: int) -> list[Batch]:
    """The batches that show whether a shortened graph agrees with itself, if the whole one runs on the rows of a
    reference at once: each of ROWS by itself, and at several places among an odd and an even number of rows. If the
    reference has two rows, each row of its batch is known, and only one beside black and white is missing.

    Args:
        largest: how many rows the reference has.

    Example:
        >>> structure_batches(2)
        [('noise',), ('black', 'noise', 'white')]
    """
    alone: list[Batch] = [(row,) for row in ROWS]
    if largest == 1:
        return alone
    if largest == 2:
        return [(NOISE,), (BLACK, NOISE, WHITE)]
    return [*alone, (BLACK, WHITE, NOISE), (WHITE, NOISE, BLACK, NOISE) if largest > 3 else (NOISE, BLACK, NOISE)]


def check_consistency(
    run: Callable[[Arrays], Arrays], probes: Arrays, outputs: Sequence[str], tolerance: Tolerance, *, largest: int
) -> list[Finding]:
    """Runs a model on a few batches and compares its answers with each other.

    Args:
        run: maps {input: [batch, …]} to {output: [batch, …]}.
        probes: for each input a row for each of ROWS; further ones are not used.
        outputs: names of those to check.
        tolerance: between two answers that should be equal.
        largest: the most rows per run.

    Returns:
        A Finding for each check and output. A model that takes one row at a time gets only FINITE.

    Example:
        >>> probes = {"x": np.float32([[1], [0], [5]])}
        >>> mean_of_batch = lambda x: {"y": x["x"] - x["x"].mean()}  # what must not be
        >>> found = check_consistency(mean_of_batch, probes, ["y"], Tolerance(1e-6, 0.0, -1.0), largest=4)
        >>> [row.check for row in found if not row.passed]
        ['batch of one']
    """
    batches = probe_batches(largest)
    answers = [run(rows_of(batch, probes)) for batch in batches]
    return findings(batches, answers, outputs, tolerance)


def rows_of(batch: Batch, probes: Arrays, reference: Arrays | None = None) -> dict[str, np.ndarray]:
    """The inputs of a batch.

    Args:
        batch: its rows.
        probes: for each input a row for each of ROWS; further ones are not used.
        reference: for each input the rows that numbers stand for.

    Example:
        >>> rows_of((0, "white"), {"x": np.array([7, 0, 255])}, {"x": np.array([100])})
        {'x': array([100, 255])}
    """
    known = reference or {}
    return {
        name: np.stack([values[ROWS.index(row)] if isinstance(row, str) else known[name][row] for row in batch])
        for name, values in probes.items()
    }


def findings(
    batches: Sequence[Batch], answers: Sequence[Arrays], outputs: Sequence[str], tolerance: Tolerance
) -> list[Finding]:
    """Compares the answers to batches in which some rows occur more than once.

    Args:
        batches: what was run.
        answers: for each batch, {output: [batch, …]}.
        outputs: names of those to check.
        tolerance: between two answers that should be equal.

    Returns:
        A Finding for each output and each check that the batches allow.
    """
    found = [_finite(name, batches, answers) for name in outputs]
    pairs = {check: list(_pairs(check, batches)) for check in (IDENTICAL, PERMUTED, ALONE)}
    for name in outputs:
        for check, places in pairs.items():
            if places:
                one, other = (
                    np.stack([np.asarray(answers[batch][name])[row] for batch, row in side]) for side in zip(*places)
                )
                found.append(_compared(check, name, one, other, tolerance))
    return found


def _pairs(check: str, batches: Sequence[Batch]) -> Iterator[tuple[Place, Place]]:
    """The places of equal rows whose answers a check compares."""
    places: dict[int | str, list[Place]] = {}
    for number, batch in enumerate(batches):
        for place, row in enumerate(batch):
            places.setdefault(row, []).append((number, place))
    for same in places.values():
        alone = [place for place in same if len(batches[place[0]]) == 1]
        among = [place for place in same if place not in alone]
        if check == ALONE:
            yield from zip(among, alone)
            continue
        for one, other in itertools.combinations(among, 2):
            if one[0] == other[0] if check == IDENTICAL else one[1] != other[1]:
                yield one, other


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


def _compared(check: str, output: str, one: np.ndarray, other: np.ndarray, tolerance: Tolerance) -> Finding:
    found = compare(one, other)
    return Finding(check, output, found.max_abs, found.max_rel, found.cosine, tolerance.met_by(found))


def _finite(output: str, batches: Sequence[Batch], answers: Sequence[Arrays]) -> Finding:
    bad = {
        row
        for batch, answer in zip(batches, answers)
        for row, value in zip(batch, np.asarray(answer[output]))
        if isinstance(row, str) and not np.isfinite(value).all()
    }
    return Finding(FINITE, output, 0.0, 0.0, 1.0, not bad, ", ".join(row for row in ROWS if row in bad))
