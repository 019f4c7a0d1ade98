"""Precision plans: the search against brute force, and the file."""

import itertools
import json

import numpy as np
import pytest

from vit_convert.core.errors import CheckError, UsageError
from vit_convert.core.sensitivity_record import Measured, SensitivityRecord
from vit_convert.quantize.placement import Site
from vit_convert.quantize.precision_plan import Budget, make_plan, read_plan, search, write_plan
from vit_convert.quantize.sensitivity import Unit

RUNS = 6


def additive(costs, top1=None):
    """Measures sets whose losses add up; counts the distinct sets that were asked for."""
    asked = set()

    def measure(names):
        asked.add(frozenset(names))
        loss = sum(costs[name] for name in names)
        return Measured(tuple(names), loss, 1 - loss, loss, 100.0, None if top1 is None else top1 - 100 * loss)

    return measure, asked


@pytest.mark.parametrize("seed", range(5))
def test_search_finds_a_largest_set(seed):
    rng = np.random.default_rng(seed)
    costs = {f"block_{i:02d}/fc1": float(cost) for i, cost in enumerate(rng.exponential(1e-3, 10))}
    ranked = sorted(costs, key=costs.__getitem__)
    budget = 0.6 * sum(costs.values())
    measure, asked = additive(costs)
    plan = search(ranked, measure, Budget(1 - budget, 0.0, RUNS))
    # losses that add up: the cheapest first make the largest number of units that any choice can
    most = max(
        len(c) for n in range(11) for c in itertools.combinations(costs, n) if sum(costs[name] for name in c) <= budget
    )
    assert len(plan.units) == most and sum(costs[name] for name in plan.units) <= budget
    assert set(plan.left_out) == set(costs) - set(plan.units)
    assert all(sum(costs[name] for name in [*plan.units, other]) > budget for other in plan.left_out)
    assert plan.measured == measure(plan.units)
    assert len(asked) <= 4 + 10 + 1  # bisection, then one for each unit that is left, then fp32


def test_one_unit_that_is_worse_in_company_does_not_keep_out_those_behind_it():
    costs = {"a": 1e-4, "trap": 2e-4, "c": 3e-4, "d": 4e-4}
    plain, _ = additive(costs)

    def measure(names):
        result = plain(names)
        loss = result.error + (0.5 if {"a", "trap"} <= set(names) else 0.0)
        return Measured(tuple(names), loss, 1 - loss, loss, 100.0, None)

    plan = search(list(costs), measure, Budget(0.99, 0.0, RUNS))
    assert plan.units == ["a", "c", "d"]
    assert set(plan.left_out) == {"trap"}


def test_few_bad_units_take_a_few_runs():
    """A ranking that is wrong at its start: without steps that grow, each of the 57 good units behind would take a run
    of its own."""
    names = [f"unit_{i}" for i in range(60)]
    bad = {names[1], names[20], names[41]}
    measure, asked = additive({name: 0.5 if name in bad else 1e-5 for name in names})
    plan = search(names, measure, Budget(0.99, 0.0, 40))
    assert set(plan.left_out) == bad and set(plan.units) == set(names) - bad
    # 6 of the bisection; then up, down and up again around each bad one, about twice 5 steps for 20 units
    assert len(asked) < 40


def test_some_images_settle_a_set_that_one_of_them_is_over_the_budget_with():
    class Counted:
        """Of a set, some images show what "some" says, all of them what "whole" says."""

        def __init__(self):
            self.units = [Unit("block_00", kind, (), 1) for kind in ("a", "b")]
            self.judged = []

        def measure(self, names):
            return Measured(tuple(names), 0.1, 0.5 if len(names) == 2 else 0.999, 0.0, 100.0, 40.0)

        def judge(self, names):
            self.judged.append(set(names))
            return Measured(
                tuple(names), 0.1, 1.0 if not names else 0.995 if "block_00/a" in names else 0.9, 0.0, 100.0, 50.0
            )

        def glimpse(self, names):
            return self.judge(names)

        def alone(self):
            return {}

    counted = Counted()
    plan = make_plan(counted, Budget(0.99, 1.0, RUNS), lambda: {"block_00/a": 0.1, "block_00/b": 0.2})
    assert plan.units == ["block_00/a"] and plan.measured.cosine == 0.995  # what all images say
    assert plan.left_out == {"block_00/b": "cosine 0.5000000 is below 0.99"}
    assert {"block_00/a", "block_00/b"} not in counted.judged
    # b is taken first, and some images see nothing wrong with it alone: the others do, so that a is found after all
    misled = make_plan(Counted(), Budget(0.99, 1.0, RUNS), lambda: {"block_00/a": 0.2, "block_00/b": 0.1})
    assert misled.units == ["block_00/a"] and list(misled.left_out) == ["block_00/b"]


class Sized:
    """Sets of which some images see half of what each unit costs, the worst of all images everything; labels may say
    more."""

    def __init__(self, costs, top1=lambda names: 90.0):
        self.units = [Unit("block_00", name, (), 1) for name in costs]
        self._costs = {f"block_00/{name}": cost for name, cost in costs.items()}
        self._top1, self.judged, self.looks = top1, [], 0

    def loss(self, names):
        return sum(self._costs[name] for name in names)

    def measure(self, names):
        self.looks += 1
        return Measured(tuple(names), 0.0, 1 - self.loss(names) / 2, 0.0, 100.0, 0.0)

    def glimpse(self, names):
        self.looks += 1
        return Measured(tuple(names), 0.0, 1 - self.loss(names), 0.0, 100.0, 0.0)

    def judge(self, names):
        self.judged.append(len(names))
        return Measured(tuple(names), 0.0, 1 - self.loss(names), 0.0, 100.0, self._top1(names))

    def alone(self):
        return {}


def test_few_sets_are_judged_on_all_images():
    """Sixty-four units of which 30 fit: each judgement takes as long as sixteen looks at some images."""
    sized = Sized({f"u{i:02d}": 1e-3 for i in range(64)})
    plan = make_plan(sized, Budget(0.9695, 1.0, RUNS), lambda: {unit.name: i for i, unit in enumerate(sized.units)})
    assert plan.units == [f"block_00/u{i:02d}" for i in range(30)] and plan.measured.cosine == pytest.approx(0.97)
    assert sized.judged == [0, 61, 30] and sized.looks < 40
    assert len(plan.left_out) == 34 and all(
        "is below 0.9695" in why or "not tried" in why for why in plan.left_out.values()
    )


def test_labels_halve_what_the_cosine_bears():
    """A few images do not show a drop of top-1."""
    sized = Sized({f"u{i}": 1e-4 for i in range(8)}, top1=lambda names: 90.0 - (5.0 if len(names) > 3 else 0.0))
    plan = make_plan(sized, Budget(0.9, 1.0, RUNS), lambda: {unit.name: i for i, unit in enumerate(sized.units)})
    assert len(plan.units) == 2 and plan.measured.top1 == 90.0  # 8, 4, 2
    assert plan.left_out["block_00/u3"] == "top-1 drops by 5.00 points, allowed 1"


def test_runs_are_bounded_where_nothing_fits():
    """Each run is a pass over images: a model with hundreds of layers must not try all of them one by one."""
    costs = {f"unit_{i}": 1.0 for i in range(300)}
    measure, asked = additive(costs)
    plan = search(list(costs), measure, Budget(0.99, 0.0, 5))
    assert plan.units == [] and set(plan.left_out) == set(costs)
    assert len(asked) <= 2 + 9 + 5  # fp32 and everything, the bisection of 300, the tries
    assert plan.left_out["unit_299"] == "not tried, because plan.runs=5 other sets were tried first"
    assert list(plan.left_out.values()).count(plan.left_out["unit_299"]) == 300 - 5


def test_everything_is_tried_first_and_nothing_may_be_left():
    costs = dict.fromkeys("abcdef", 0.0001)
    measure, asked = additive(costs)
    assert search(list(costs), measure, Budget(0.99, 0.0, RUNS)).units == list(costs)
    assert len(asked) == 2  # fp32 and everything
    measure, _ = additive(costs)
    plan = search(list(costs), measure, Budget(1.0, 0.0, RUNS))
    assert plan.units == [] and len(plan.left_out) == 6


def test_budget_in_points():
    measure, _ = additive({"a": 0.003, "b": 0.004}, top1=99.0)
    plan = search(["a", "b"], measure, Budget(0.9, 0.5, RUNS))  # 0.3 and 0.4 points
    assert plan.units == ["a"] and plan.left_out == {"b": "top-1 drops by 0.70 points, allowed 0.5"}
    assert search(["a", "b"], measure, Budget(0.998, 5.0, RUNS)).left_out["a"] == "cosine 0.9970000 is below 0.998"


def test_plan_files(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({"sites": ["block_00", "*/fc1"]}))  # what a person may write
    assert read_plan(path, "int8") == ["block_00", "*/fc1"]
    for text, match in [
        (None, "missing, or no JSON object"),
        ("[]", "missing, or no JSON object"),
        ('{"sites": []}', "`sites` is empty"),
        ('{"precision": "fp8", "sites": ["a"]}', "made for fp8, int8 is asked for"),
    ]:
        path.unlink(missing_ok=True)
        if text:
            path.write_text(text)
        with pytest.raises(UsageError, match=match):
            read_plan(path, "int8")


class Alone(Sized):
    """What some units lose alone is known already."""

    def __init__(self, costs, alone, precision="int8", labelled=True):
        super().__init__(costs)
        self.units = [
            Unit("block_00", name, tuple(Site("block_00", f"{name}{i}", "x", "y") for i in range(2)), 100 * (n + 1))
            for n, name in enumerate(costs)
        ]
        self._alone = alone
        self.record = SensitivityRecord.from_dict(
            {"precision": precision, "labelled": labelled, "source": "these images", "num_images": 40}
        )

    def alone(self):
        return {f"block_00/{name}": Measured((name,), error, 0.5, 0.25, 99.0, 88.0) for name, error in self._alone}


COSTS = {"a": 0.03, "b": 0.01, "c": 0.02}
BUDGET = Budget(0.975, 1.0, RUNS)


def rank(a: float, b: float, c: float):
    return lambda: {"block_00/a": a, "block_00/b": b, "block_00/c": c}


def never():
    raise AssertionError("costs are not asked for")


def test_units_are_ranked_by_what_each_loses_alone_where_all_of_it_is_known():
    plan = make_plan(Alone(COSTS, [("a", 3.0), ("b", 2.0), ("c", 1.0)]), BUDGET, never)
    assert plan.units == ["block_00/c"] and plan.costs == {"block_00/a": 3.0, "block_00/b": 2.0, "block_00/c": 1.0}
    # not where one is missing: the costs rank them
    plan = make_plan(Alone(COSTS, [("a", 3.0), ("b", 2.0)]), BUDGET, rank(3.0, 1.0, 2.0))
    assert plan.units == ["block_00/b"] and plan.costs == rank(3.0, 1.0, 2.0)()
    assert list(plan.left_out) == ["block_00/c", "block_00/a"]  # as they are ranked


def test_nothing_is_ranked_where_everything_fits():
    sized = Alone(dict.fromkeys(COSTS, 0.005), [("a", 1.0)])
    plan = make_plan(sized, BUDGET, never)
    assert plan.units == [f"block_00/{name}" for name in "abc"] and (plan.left_out, plan.costs) == ({}, {})
    assert plan.measured == sized.judge(plan.units)
    known = Alone(dict.fromkeys(COSTS, 0.005), [("a", 3.0), ("b", 2.0), ("c", 1.0)])
    assert make_plan(known, BUDGET, never).costs == {"block_00/a": 3.0, "block_00/b": 2.0, "block_00/c": 1.0}


def test_where_nothing_fits_the_most_harmless_is_named():
    with pytest.raises(CheckError) as error:
        make_plan(Alone(COSTS, [], "fp8"), Budget(0.999, 1.0, RUNS), rank(3.0, 1.0, 2.0))
    assert str(error.value) == (
        "precision plan: no layer can be fp8; the most harmless is block_00/b: cosine 0.9950000 is below 0.999"
    )
    assert error.value.fix == "Allow more (config.plan.accuracy_budget, config.plan.cosine), or stay with fp16."


@pytest.mark.parametrize("labelled", [True, False])
def test_what_is_written(tmp_path, labelled):
    sized, path = Alone(COSTS, [("b", 2.0)], labelled=labelled), tmp_path / "plan.json"
    plan = make_plan(sized, BUDGET, rank(3.0, 1.0, 2.0))
    record = write_plan(path, plan, sized, BUDGET).to_dict()
    assert json.loads(path.read_text()) == record and read_plan(path, "int8") == ["block_00/b0", "block_00/b1"]
    assert record.pop("about").startswith(
        "A precision plan: the layers in `sites` are quantized, all others stay fp16."
    )
    numbers = {"max_rel": 0.0, "agreement": 100.0, "top1": 90.0, "error": 0.0}
    assert record == {
        "precision": "int8",
        "sites": ["block_00/b0", "block_00/b1"],
        "left_out": {
            "block_00/c": "cosine 0.9700000 is below 0.975",
            "block_00/a": "cosine 0.9700000 is below 0.975",
        },
        "budget": {"cosine": 0.975, "top1_drop_points": 1.0 if labelled else None},
        "measured": {**numbers, "cosine": 0.99, "share_of_weights": 200 / 600},
        "fp32": {**numbers, "cosine": 1.0},
        "images": {"source": "these images", "num_images": 40},
        "ranked": [
            {**{"unit": "block_00/b", "cost": 1.0, "error": 2.0, "cosine": 0.5}, **{"max_rel": 0.25}}
            | {"agreement": 99.0, "top1": 88.0},
            {"unit": "block_00/c", "cost": 2.0},
            {"unit": "block_00/a", "cost": 3.0},
        ],
    }


@pytest.mark.parametrize(
    ("cosine", "top1", "drop", "words"),
    [
        (0.9, 80.0, 2.0, ""),  # as much as is allowed is allowed
        (0.89, 80.0, 2.0, "cosine 0.8900000 is below 0.9"),
        (0.9, 80.0, 1.5, "top-1 drops by 2.00 points, allowed 1.5"),
        (0.9, 90.0, 0.0, ""),
        (0.9, None, 0.0, ""),
    ],
)
def test_a_budget(cosine, top1, drop, words):
    fp32 = Measured((), 0.0, 1.0, 0.0, 100.0, 82.0)
    assert Budget(0.9, drop, RUNS).missed(Measured(("a",), 0.0, cosine, 0.0, 100.0, top1), fp32) == words
    assert Budget(0.9, 1.0, RUNS).missed(fp32, Measured((), 0.0, 1.0, 0.0, 100.0, None)) == ""


def test_what_a_bad_plan_file_is_told(tmp_path):
    path, advice = tmp_path / "plan.json", "Let config.precision=auto write one, or leave config.plan.file empty."
    for text, fix in [
        ('{"sites": {}}', advice),
        ('{"sites": []}', "Ask for fp16."),
        ('{"precision": "fp8", "sites": ["a"]}', advice),
    ]:
        path.write_text(text)
        with pytest.raises(UsageError, match=str(path)) as error:
            read_plan(path, "int8")
        assert error.value.fix == fix
