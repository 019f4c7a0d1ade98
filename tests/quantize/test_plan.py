"""The whole way of a precision plan on a model of which a part cannot bear INT8."""

import json
import shutil

import pytest
from outliers import CHECKPOINTS, DIGITS, write_outlier_digits

from vit_convert.convert import convert
from vit_convert.core.config import check_values, default_config
from vit_convert.core.errors import CheckError, UsageError


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


@pytest.mark.slow
def test_patterns_limit_what_auto_may_choose(workdir):
    changes = {"quantize_only": ("*/MlpBlock_0/*",), "keep_fp16": ("block_01",), "keep_fp32": ("block_04/fc2",)}
    report = convert(digits(precision="auto", **changes), workdir, quiet=True)
    kept = {"block_01/fc1", "block_01/fc2", "block_04/fc2"}
    expected = [name for i in range(6) for name in (f"block_{i:02d}/fc1", f"block_{i:02d}/fc2") if name not in kept]
    assert report["checks"]["int8"]["quantized"] == expected
    assert any(reason == "keep_fp32" for reason in report["checks"]["int8"]["fp32_islands"].values())


@pytest.mark.slow
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


@pytest.mark.slow
def test_nothing_is_ranked_where_all_fits(workdir):
    """A look at some images, and two runs over all of them, decide it."""
    report = convert(digits(name="fits", precision="auto"), workdir, quiet=True)
    record = json.loads((workdir / "fits" / "plan_search.json").read_text())
    assert [len(row["quantized"]) for row in record["measured"]] == [24]
    assert sorted(len(row["quantized"]) for row in record["judged"]) == [0, 24]
    assert "sensitivity" not in statuses(report) and report["plan"]["num_units"] == 24
    plan = json.loads((workdir / "fits" / "precision_plan.json").read_text())
    assert plan["ranked"] == [] and len(plan["sites"]) == 36


@pytest.mark.slow
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
    from vit_convert.engine.backend.graph_file import graph_hashes

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
