"""Precision plans: the search against brute force, the file, and the whole way on a model of which a part cannot bear
INT8."""

import itertools
import json
import shutil

import numpy as np
import pytest
from outliers import CHECKPOINTS, DIGITS, write_outlier_digits

from vit_convert.convert import convert
from vit_convert.core.config import check_values, default_config
from vit_convert.core.errors import CheckError, UsageError
from vit_convert.quantize.precision_plan import Budget, make_plan, read_plan, search
from vit_convert.quantize.sensitivity import Measured, Unit


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
    plan = search(ranked, measure, Budget(1 - budget, 0.0))
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

    plan = search(list(costs), measure, Budget(0.99, 0.0))
    assert plan.units == ["a", "c", "d"]
    assert set(plan.left_out) == {"trap"}


def test_few_bad_units_take_a_few_runs():
    """A ranking that is wrong at its start: without steps that grow, each of the 57 good units behind would take a run
    of its own."""
    names = [f"unit_{i}" for i in range(60)]
    bad = {names[1], names[20], names[41]}
    measure, asked = additive({name: 0.5 if name in bad else 1e-5 for name in names})
    plan = search(names, measure, Budget(0.99, 0.0), runs=40)
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
    plan = make_plan(counted, Budget(0.99, 1.0), lambda: {"block_00/a": 0.1, "block_00/b": 0.2})
    assert plan.units == ["block_00/a"] and plan.measured.cosine == 0.995  # what all images say
    assert plan.left_out == {"block_00/b": "cosine 0.5000000 is below 0.99"}
    assert {"block_00/a", "block_00/b"} not in counted.judged
    # b is taken first, and some images see nothing wrong with it alone: the others do, so that a is found after all
    misled = make_plan(Counted(), Budget(0.99, 1.0), lambda: {"block_00/a": 0.2, "block_00/b": 0.1})
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
    plan = make_plan(sized, Budget(0.9695, 1.0), lambda: {unit.name: i for i, unit in enumerate(sized.units)})
    assert plan.units == [f"block_00/u{i:02d}" for i in range(30)] and plan.measured.cosine == pytest.approx(0.97)
    assert sized.judged == [0, 61, 30] and sized.looks < 40
    assert len(plan.left_out) == 34 and all(
        "is below 0.9695" in why or "not tried" in why for why in plan.left_out.values()
    )


def test_labels_halve_what_the_cosine_bears():
    """A few images do not show a drop of top-1."""
    sized = Sized({f"u{i}": 1e-4 for i in range(8)}, top1=lambda names: 90.0 - (5.0 if len(names) > 3 else 0.0))
    plan = make_plan(sized, Budget(0.9, 1.0), lambda: {unit.name: i for i, unit in enumerate(sized.units)})
    assert len(plan.units) == 2 and plan.measured.top1 == 90.0  # 8, 4, 2
    assert plan.left_out["block_00/u3"] == "top-1 drops by 5.00 points, allowed 1"


def test_runs_are_bounded_where_nothing_fits():
    """Each run is a pass over images: a model with hundreds of layers must not try all of them one by one."""
    costs = {f"unit_{i}": 1.0 for i in range(300)}
    measure, asked = additive(costs)
    plan = search(list(costs), measure, Budget(0.99, 0.0), runs=5)
    assert plan.units == [] and set(plan.left_out) == set(costs)
    assert len(asked) <= 2 + 9 + 5  # fp32 and everything, the bisection of 300, the tries
    assert plan.left_out["unit_299"] == "not tried after 5 sets with less costly layers"


def test_everything_is_tried_first_and_nothing_may_be_left():
    costs = dict.fromkeys("abcdef", 0.0001)
    measure, asked = additive(costs)
    assert search(list(costs), measure, Budget(0.99, 0.0)).units == list(costs)
    assert len(asked) == 2  # fp32 and everything
    measure, _ = additive(costs)
    plan = search(list(costs), measure, Budget(1.0, 0.0))
    assert plan.units == [] and len(plan.left_out) == 6


def test_budget_in_points():
    measure, _ = additive({"a": 0.003, "b": 0.004}, top1=99.0)
    plan = search(["a", "b"], measure, Budget(0.9, 0.5))  # 0.3 and 0.4 points
    assert plan.units == ["a"] and plan.left_out == {"b": "top-1 drops by 0.70 points, allowed 0.5"}
    assert search(["a", "b"], measure, Budget(0.998, 5.0)).left_out["a"] == "cosine 0.9970000 is below 0.998"


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


def digits(checkpoint=DIGITS, name="digits", **changes):
    config = default_config()
    config.name, config.checkpoint, config.engine.backend = name, str(checkpoint), "none"
    config.calibration.data = str(CHECKPOINTS / "digits" / "calibration.zip")
    config.calibration.num_images, config.calibration.method = 64, "minmax"
    config.evaluation.data = str(CHECKPOINTS / "digits" / "heldout.zip")
    config.evaluation.num_images, config.plan.num_images = 150, 32
    with config.ignore_type():
        config.update_from_flattened_dict(changes)
    return config


def statuses(report):
    return {row["name"]: row["status"] for row in report["stages"]}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return tmp_path_factory.mktemp("plans")


@pytest.fixture(scope="module")
def half_bad(workdir):
    """The digits with outlier channels in blocks 2 and 3."""
    return write_outlier_digits(workdir / "outliers.npz", 300.0, range(2, 4))


@pytest.fixture(scope="module")
def planned(workdir, half_bad):
    return convert(digits(half_bad, "auto", precision="auto"), workdir, quiet=True)


def test_auto_leaves_out_what_cannot_bear_it(planned, workdir, half_bad):
    plan = json.loads((workdir / "auto" / "precision_plan.json").read_text())
    bad = [f"block_{i:02d}/{kind}" for i in (2, 3) for kind in ("qkv", "fc1")]
    # the four that read an outlier LayerNorm are the most sensitive, and together with the rest they are far over the
    # budget
    assert {row["unit"] for row in plan["ranked"][-4:]} == set(bad)
    assert set(plan["left_out"]) <= set(bad) and plan["left_out"]
    assert plan["measured"]["cosine"] >= 0.98 and plan["fp32"]["top1"] - plan["measured"]["top1"] <= 0.5
    assert planned["checks"]["int8"]["passed"] and planned["verdicts"]["int8"]["accurate"]
    assert planned["checks"]["int8"]["quantized"] == plan["sites"]
    assert planned["plan"]["num_units"] == 24 - len(plan["left_out"])
    assert 0.5 < plan["measured"]["share_of_weights"] < 1
    shutil.copytree(workdir / "auto", workdir / "plain")  # export and reference are fresh in a copy
    with pytest.raises(CheckError, match=r"model\.int8\.onnx"):
        convert(digits(half_bad, "plain", precision="int8"), workdir, quiet=True)
    report = json.loads((workdir / "plain" / "report.json").read_text())
    assert report["verdicts"]["int8"]["accurate"] is False


def test_no_layer_is_measured_alone_for_a_plan(planned, workdir):
    """On a full model a run for each layer takes longer than all else; the products' errors rank them in one pass."""
    record = json.loads((workdir / "auto" / "plan_search.json").read_text())
    sets = [*record["measured"], *record["judged"]]
    assert not (workdir / "auto" / "sensitivity.json").exists() and "sensitivity" not in statuses(planned)
    assert len(sets) < 24  # all, nothing, the bisection of 24, a few tries
    ranked = json.loads((workdir / "auto" / "precision_plan.json").read_text())["ranked"]
    assert [row["cost"] for row in ranked] == sorted(row["cost"] for row in ranked) and len(ranked) == 24


def test_a_second_run_is_fresh_and_another_budget_searches_what_is_known(planned, workdir, half_bad):
    again = convert(digits(half_bad, "auto", precision="auto"), workdir, quiet=True)
    assert set(statuses(again).values()) == {"fresh"}
    before = len(json.loads((workdir / "auto" / "plan_search.json").read_text())["measured"])
    tighter = convert(digits(half_bad, "auto", precision="auto", **{"plan.cosine": 0.99999}), workdir, quiet=True)
    assert [name for name, status in statuses(tighter).items() if status == "done"] == ["plan", "quantize"]
    record = json.loads((workdir / "auto" / "plan_search.json").read_text())
    assert len(record["measured"]) > before  # further sets, added to those that are known
    assert tighter["plan"]["num_units"] < planned["plan"]["num_units"]
    assert tighter["plan"]["measured"]["cosine"] >= 0.99999


def test_a_plan_file_is_taken_as_it_is(planned, workdir, half_bad):
    edited = workdir / "edited.json"
    edited.write_text(json.dumps({"precision": "int8", "sites": ["block_00", "*/fc2"]}))
    shutil.copytree(workdir / "auto", workdir / "edited")
    config = digits(half_bad, "edited", precision="auto", **{"plan.file": str(edited), "keep_fp16": ("block_05",)})
    report = convert(config, workdir, quiet=True)
    assert "plan" not in statuses(report) and "sensitivity" not in statuses(report)
    first = [f"block_00/{kind}" for kind in ("query", "key", "value", "out", "fc1", "fc2")]
    assert report["checks"]["int8"]["quantized"] == [*first, *(f"block_{i:02d}/fc2" for i in range(1, 5))]
    edited.write_text(json.dumps({"precision": "int8", "sites": ["*/fc2"]}))
    report = convert(config, workdir, quiet=True)
    assert [name for name, status in statuses(report).items() if status == "done"] == ["quantize"]


def test_patterns_limit_what_auto_may_choose(workdir):
    changes = {"quantize_only": ("*/MlpBlock_0/*",), "keep_fp16": ("block_01",), "keep_fp32": ("block_04/fc2",)}
    report = convert(digits(precision="auto", **changes), workdir, quiet=True)
    kept = {"block_01/fc1", "block_01/fc2", "block_04/fc2"}
    expected = [name for i in range(6) for name in (f"block_{i:02d}/fc1", f"block_{i:02d}/fc2") if name not in kept]
    assert report["checks"]["int8"]["quantized"] == expected
    assert any(reason == "keep_fp32" for reason in report["checks"]["int8"]["fp32_islands"].values())


def test_fp8_without_labels(workdir):
    changes = {
        "plan.type": "fp8",
        "plan.cosine": 0.999,
        "evaluation.data": "",
        "calibration.attention": True,
        "sensitivity": True,
    }
    report = convert(digits(precision="auto", **changes), workdir, quiet=True)
    plan = json.loads((workdir / "digits" / "precision_plan.json").read_text())
    assert plan["precision"] == "fp8" and plan["images"] == {"source": "calibration images", "num_images": 32}
    assert plan["budget"] == {"cosine": 0.999, "top1_drop_points": None} and plan["measured"]["top1"] is None
    assert plan["measured"]["cosine"] >= 0.999 and len(plan["sites"]) > 0
    assert report["checks"]["fp8"]["passed"] and report["verdicts"]["fp8"]["accurate"] is None
    assert {row["unit"].split("/")[1] for row in plan["ranked"]} == {"qkv", "out", "fc1", "fc2", "attention"}


def test_nothing_is_ranked_where_all_fits(workdir):
    """A look at some images, and two runs over all of them, decide it."""
    report = convert(digits(name="fits", precision="auto"), workdir, quiet=True)
    record = json.loads((workdir / "fits" / "plan_search.json").read_text())
    assert [len(row["quantized"]) for row in record["measured"]] == [24]
    assert sorted(len(row["quantized"]) for row in record["judged"]) == [0, 24]
    assert "sensitivity" not in statuses(report) and report["plan"]["num_units"] == 24
    plan = json.loads((workdir / "fits" / "precision_plan.json").read_text())
    assert plan["ranked"] == [] and len(plan["sites"]) == 36


def test_sensitivity_alone(workdir):
    config = digits(precision="fp16", sensitivity=True)
    report = convert(config, workdir, until="sensitivity", quiet=True)
    assert list(statuses(report))[-1] == "sensitivity" and report["sensitivity"]["num_units"] == 24
    assert report["sensitivity"]["worst"]["error"] == max(
        row["error"]
        for row in json.loads((workdir / "digits" / "sensitivity.json").read_text())["measured"]
        if len(row["quantized"]) == 1
    )


def test_nothing_within_the_budget(workdir):
    changes = {"plan.cosine": 1.0, "quantize_only": ("block_00",)}
    with pytest.raises(
        CheckError, match=r"no layer can be int8; the most harmless is block_00/\w+: cosine 0\.\d+ is below 1"
    ):
        convert(digits(precision="auto", **changes), workdir, quiet=True)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"precision": "auto,int9"}, r"'int9' is not one of .*Did you mean int8"),
        ({"precision": "fp8", "target": "trt8"}, "target trt8 has no fp8"),
        ({"precision": "auto", "plan.type": "fp8", "target": "trt8"}, "target trt8 has no fp8"),
        ({"precision": "auto", "engine.calibrator": True}, "TensorRT's own calibrator"),
        ({"plan.type": "fp16"}, r"config\.plan\.type='fp16': not one of int8, fp8"),
        ({"plan.file": "/nothing/here.json"}, "no such file"),
        ({"plan.accuracy_budget": -1.0}, r"config\.plan\.accuracy_budget=-1: must be"),
        ({"plan.cosine": 1.5}, r"config\.plan\.cosine=1\.5: must be a number from 0 to 1"),
        ({"plan.num_images": 0}, "must be a whole number from 1"),
        ({"calibration.smooth": 1.0}, "must be a number from 0, below 1"),
    ],
)
def test_config_errors(changes, match):
    with pytest.raises(UsageError, match=match):
        check_values(digits(**changes))


@pytest.mark.parametrize(
    ("target", "header"),
    [("trt8", "TRT-8601-MinMaxCalibration"), ("trt10", "TRT-101601-MinMaxCalibration"), ("rtx", None)],
)
def test_calibration_leaves_a_tensorrt_cache(workdir, target, header):
    from vit_convert.core.calibration_cache import CacheKey, hash_source, load_cache, parse_cache
    from vit_convert.engine.backend.sidecar import graph_hashes

    config = digits(precision="int8", target=target)
    root = workdir / "digits"
    for old in root.glob("calibration.cache*"):
        old.unlink()
    report = convert(config, workdir, until="calibrate", force=target == "rtx", quiet=True)
    path = root / "calibration.cache"
    assert path.exists() == (header is not None)
    if header:
        saved = json.loads((root / "calibration.json").read_text())
        source = hash_source(
            graph_hashes(root / "model.onnx"),
            root / "calibration_images.npy",
            num_images=report["calibration"]["num_images"],
            preprocessing=report["checkpoint"]["preprocess"],
        )
        key = CacheKey("minmax", "8.6.1" if target == "trt8" else "10.16.1", source)
        found, scales = parse_cache(load_cache(path, key))
        assert found == header and len(scales) == report["calibration"]["num_tensors"]
        assert scales["images"] == pytest.approx(1 / 127, rel=1e-6)  # pixels from -1 to 1
        assert scales == pytest.approx({name: t / 127 for name, t in saved["thresholds"].items()}, rel=1e-6)  # float32
