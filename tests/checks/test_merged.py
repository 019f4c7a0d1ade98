"""Runs that compare a graph with its reference and with itself at once: whatever mixes rows is seen by one of them."""

import itertools

import numpy as np
import onnx
import pytest

from vit_convert.checks.onnx_graph import batch_sizes, check_graph_and_itself
from vit_convert.core.check_results import TensorCheck
from vit_convert.core.compare import Tolerance, compare
from vit_convert.core.consistency import (
    ALONE,
    FINITE,
    IDENTICAL,
    PERMUTED,
    ROWS,
    findings,
    merged_batches,
    rows_of,
    structure_batches,
)

BY_COSINE = Tolerance(0.0, np.inf, 0.999)  # as fp16 is judged: what only scales a row goes unseen
COUNTS = [2, 3, 4, 5, 7]
WIDTH = 8


def inputs(count):
    """The probes, and rows of a reference, of which no two point the same way."""
    rows = np.random.default_rng(0).normal(size=(len(ROWS) + count, WIDTH))
    return {"x": rows[: len(ROWS)]}, {"x": rows[len(ROWS) :]}


def is_seen(fault, count):
    """Whether the runs tell a model with this fault from the one that gives each row back; fault maps rows [batch, …]
    to what the faulty model gives."""
    probes, known = inputs(count)
    batches = merged_batches(count)
    answers = [{"y": fault(rows_of(batch, probes, known)["x"])} for batch in batches]
    for batch, answer in zip(batches, answers):
        for row, value in zip(batch, answer["y"]):
            if isinstance(row, int) and not BY_COSINE.met_by(compare(known["x"][row][None], value[None])):
                return True
    return not all(row.passed for row in findings(batches, answers, ["y"], BY_COSINE))


def at(size, change):
    """A fault that batches of one size have; of 0, all."""

    def fault(rows):
        return change(rows.copy()) if size in (0, len(rows)) else rows

    return fault


def sizes(count):
    return [0, *(size for size in batch_sizes(count) if size > 1)]


def pairs(count):
    return [(size, *pair) for size in sizes(count) for pair in itertools.permutations(range(size or count), 2)]


@pytest.mark.parametrize("count", COUNTS)
def test_a_row_that_gets_a_part_of_another_at_one_place(count):
    for size, one, other in pairs(count):

        def mixed(rows, one=one, other=other):
            if max(one, other) < len(rows):
                rows[one] += 0.4 * rows[other]
            return rows

        assert is_seen(at(size, mixed), count), (size, one, other)


@pytest.mark.parametrize("count", COUNTS)
def test_rows_that_change_places(count):
    for size, one, other in pairs(count):

        def swapped(rows, one=one, other=other):
            if max(one, other) < len(rows):
                rows[[one, other]] = rows[[other, one]]
            return rows

        assert is_seen(at(size, swapped), count), (size, one, other)
    for size in sizes(count):
        assert is_seen(at(size, lambda rows: rows[::-1]), count)
        assert is_seen(at(size, lambda rows: np.roll(rows, 1, axis=0)), count)


@pytest.mark.parametrize("count", COUNTS)
def test_a_place_that_is_wrong_whatever_stands_there(count):
    for size in batch_sizes(count):
        for place in range(size):

            def wrong(rows, place=place):
                rows[place] += np.arange(WIDTH)  # larger than what stands there
                return rows

            assert is_seen(at(size, wrong), count), (size, place)


def thrown(rows, value, place):
    """Rows of which those beside this value are wrong: all, or the one at a place."""
    other = ~(rows == value).all(1)
    if other.all():
        return rows
    hit = other if place is None else other & (np.arange(len(rows)) == place)
    return np.where(hit[:, None], np.roll(rows, 1, axis=1), rows)


@pytest.mark.parametrize("count", [3, 4, 5, 7])
@pytest.mark.parametrize("extreme", [1, 2])
def test_a_row_that_is_thrown_by_a_black_or_a_white_one_beside_it(count, extreme):
    """As by a scale that is the largest value of the batch: all other rows; or, of four and more, one place of the
    four at which probes stand."""
    value = inputs(count)[0]["x"][extreme]

    places = range(4) if count >= 4 else []
    for size, place in [(0, None), (count, None), *((0 if count > 4 else count, place) for place in places)]:
        assert is_seen(at(size, lambda rows, place=place: thrown(rows, value, place)), count), (size, place)


@pytest.mark.parametrize("count", [1, *COUNTS])
def test_what_is_right_passes_and_what_is_not_finite_is_named(count):
    probes, known = inputs(count)
    batches = merged_batches(count)
    assert {row for batch in batches for row in batch} == {*ROWS, *range(count)}
    assert {*batch_sizes(count)} <= {len(batch) for batch in batches} and max(map(len, batches)) == max(count, 1)

    def found(run):
        answers = [{"y": run(rows_of(batch, probes, known)["x"])} for batch in batches]
        return findings(batches, answers, ["y"], Tolerance(0.0, 0.0, 0.999))

    right = found(lambda rows: rows)
    assert [row.check for row in right] == ([FINITE] if count == 1 else [FINITE, IDENTICAL, PERMUTED, ALONE])
    assert all(row.passed and row.max_abs == 0 for row in right)
    for name, value in zip(ROWS, probes["x"]):
        (row,) = [
            row
            for row in found(lambda rows, value=value: np.where((rows == value).all(1, keepdims=True), np.nan, rows))
            if row.check == FINITE
        ]
        assert not row.passed and row.where == name


GRAPH = """g (float[n, 3] x) => (float[n, 3] y) <float two = {2}, float[1] floor = {FLOOR}, int64[1] rows = {0},
    int64[1] columns = {1}> {
    tap = Mul (x, two)
    size = Abs (tap)
    most = ReduceMax <keepdims = 1> (size, AXES)
    safe = Add (most, floor)
    y = Div (tap, safe) }"""


def graph(folder, axes, floor):
    text = GRAPH.replace("AXES", axes).replace("FLOOR", floor)
    onnx.save(onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 20]> {text}'), folder / "model.onnx")
    return folder / "model.onnx"


def check(path, length=3):
    """Probes and reference are of one size: the scale of a batch shows only where one of them is extreme."""
    known = np.float32([[1, -1, 0.5], [0.2, 1, -0.3], [0.5, 0.6, -1], [-1, 0.1, 0.4]])
    reference = {"x": known, "tap": 2 * known, "y": known / 1.0}
    probes = {"x": np.zeros((3, length), np.float32)}
    probes["x"][:, :3] = [[1, -0.5, 0.25], [0, 0, 0], [9, 9, 9]]
    tolerance = Tolerance(1e-5, 1e-5, 0.999)
    options = {"judged": ["tap", "y"], "outputs": ["y"], "inputs": ["x"]}
    found = check_graph_and_itself(path, reference, probes, tolerance, **options)
    assert found.answers["y"].shape == known.shape and set(found.answers) == {"y"}
    return found.rows, found.alone


def test_a_graph_that_scales_each_row_by_itself_passes(tmp_path):
    rows, alone = check(graph(tmp_path, "columns", "1e-30"))
    assert all(row.passed for row in [*rows, *alone]) and [row.tensor for row in rows] == ["tap", "y"]
    assert all(isinstance(row, TensorCheck) and row.batch in (1, 3, 4) for row in rows)
    assert [row.check for row in alone] == [FINITE, IDENTICAL, PERMUTED, ALONE]


def test_a_graph_that_scales_by_the_largest_row_is_seen_beside_a_white_one(tmp_path):
    """Every row of the reference has the same largest value, so that only an extreme one beside it shows the fault."""
    rows, alone = check(graph(tmp_path, "rows", "1e-30"))
    assert {row.tensor: row.passed for row in rows} == {"tap": True, "y": False}
    assert {row.check for row in alone if not row.passed} >= {ALONE}


def test_a_graph_that_divides_by_what_is_zero_on_black_is_seen(tmp_path):
    rows, alone = check(graph(tmp_path, "columns", "0"))
    assert all(row.passed for row in rows)  # the rows beside the black one are right
    (row,) = [row for row in alone if row.check == FINITE]
    assert not row.passed and row.where == "black"


def test_probes_of_another_length_are_run_by_themselves(tmp_path):
    """As of texts of a range of lengths: they fit into no batch of the reference."""
    path = graph(tmp_path, "columns", "1e-30")
    onnx.save(onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 20]> {_any_width(path)}'), path)
    rows, alone = check(path, length=5)
    assert all(row.passed for row in [*rows, *alone]) and len(alone) == 4


def _any_width(path):
    return GRAPH.replace("AXES", "columns").replace("FLOOR", "1e-30").replace("[n, 3]", "[n, m]")


def is_seen_by_structure(fault, count):
    """The same of a whole graph that runs once on all rows of the reference, and a short one with the same fault."""
    probes, known = inputs(count)
    if not BY_COSINE.met_by(compare(known["x"], fault(known["x"].copy()))):
        return True
    batches = structure_batches(count)
    answers = [{"y": fault(rows_of(batch, probes)["x"])} for batch in batches]
    return not all(row.passed for row in findings(batches, answers, ["y"], BY_COSINE))


@pytest.mark.parametrize("count", COUNTS)
def test_batches_of_probes_see_rows_that_mix_or_change_places_or_are_wrong(count):
    """Whatever the size of the batches that do it: one, three, or that of the reference, which the whole graph
    takes."""
    for size, one, other in pairs(count):

        def mixed(rows, one=one, other=other):
            if max(one, other) < len(rows):
                rows[one] += 0.4 * rows[other]
            return rows

        def swapped(rows, one=one, other=other):
            if max(one, other) < len(rows):
                rows[[one, other]] = rows[[other, one]]
            return rows

        assert is_seen_by_structure(at(size, mixed), count), (size, one, other)
        assert is_seen_by_structure(at(size, swapped), count), (size, one, other)
    for size in batch_sizes(count):
        for place in range(size):

            def wrong(rows, place=place):
                rows[place] += np.arange(WIDTH)
                return rows

            assert is_seen_by_structure(at(size, wrong), count), (size, place)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("extreme", [1, 2])
def test_batches_of_probes_see_a_row_that_is_thrown_by_an_extreme_one(count, extreme):
    value = inputs(count)[0]["x"][extreme]

    for place in [None, *range(4 if count >= 4 else 0)]:
        assert is_seen_by_structure(lambda rows, place=place: thrown(rows, value, place), count), place


@pytest.mark.parametrize("count", [1, *COUNTS])
def test_batches_of_probes_are_of_one_of_an_odd_and_of_an_even_number(count):
    batches = structure_batches(count)
    assert {row for batch in batches for row in batch} == {*ROWS}
    assert {len(batch) for batch in batches} == {1: {1}, 2: {1, 3}, 3: {1, 3}}.get(count, {1, 3, 4})
    probes, _ = inputs(count)
    answers = [{"y": rows_of(batch, probes)["x"]} for batch in batches]
    assert all(row.passed and row.max_abs == 0 for row in findings(batches, answers, ["y"], BY_COSINE))
