"""Products that INT8 costs too much at every threshold: they stay in FP16 wherever anything asks what is quantized, and
are named."""

import json

import numpy as np
import onnx
import pytest
from outliers import CHECKPOINTS, write_outlier_digits

from vit_convert.convert import convert
from vit_convert.core.calibration_cache import parse_cache
from vit_convert.core.config import check_values, default_config
from vit_convert.core.errors import UsageError
from vit_convert.quantize.calibrate import Calibration
from vit_convert.quantize.guard import Cost

BAD = {f"block_{i:02d}/{kind}" for i in (2, 3) for kind in ("query", "key", "value", "fc1")}


def digits(checkpoint, name, **changes):
    config = default_config()
    config.name, config.checkpoint, config.engine.backend, config.target = name, str(checkpoint), "none", "trt8"
    config.calibration.data = str(CHECKPOINTS / "digits" / "calibration.zip")
    config.calibration.num_images, config.precision = 32, "int8"
    config.evaluation.data = str(CHECKPOINTS / "digits" / "heldout.zip")
    config.evaluation.num_images, config.plan.num_images = 60, 16
    with config.ignore_type():
        config.update_from_flattened_dict(changes)
    return config


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return tmp_path_factory.mktemp("left_out")


@pytest.fixture(scope="module")
def outliers(workdir):
    """The digits with channels 300 times as large behind the norms of blocks 2 and 3, which no one scale for a tensor
    can hold."""
    return write_outlier_digits(workdir / "outliers.npz", 300.0, range(2, 4))


@pytest.fixture(scope="module")
def left_out(workdir, outliers):
    return convert(digits(outliers, "bad"), workdir, quiet=True)


def quantized_weights(path):
    """The linears whose weight comes through DequantizeLinear, counted in the file."""
    graph = onnx.load(path, load_external_data=False).graph
    made = {node.output[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    return sum(1 for node in graph.node if node.op_type in ("MatMul", "Gemm", "Conv") and {*node.input[:2]} <= made)


def test_what_no_threshold_holds_stays_fp16_and_is_named(left_out, workdir):
    rows = left_out["calibration"]["left_out"]
    assert {site for row in rows for site in row["sites"]} == BAD
    assert [row["error"] for row in rows] == sorted((row["error"] for row in rows), reverse=True)
    assert all(row["error"] > row["max_error"] == 0.001 for row in rows)
    check = left_out["checks"]["int8"]
    assert check["passed"] and check["cosine"] > 0.99  # without it 0.9, as by min-max in test_plan.py
    assert not BAD & set(check["quantized"]) and len(check["quantized"]) == 36 - len(BAD)
    assert quantized_weights(workdir / "bad" / "model.int8.onnx") == 36 - len(BAD)
    saved = json.loads((workdir / "bad" / "calibration.json").read_text())
    assert saved["left_out"] == {row["tensor"]: row["error"] for row in rows}


def test_the_command_says_it(left_out, workdir, outliers, capsys):
    capsys.readouterr()
    convert(digits(outliers, "bad"), workdir)  # all fresh
    said = capsys.readouterr().out
    assert "at every threshold" in said and all(site in said for site in BAD)


def test_tensorrts_cache_does_not_hold_them(left_out, workdir):
    saved = Calibration.load(workdir / "bad" / "calibration.json")
    _, scales = parse_cache((workdir / "bad" / "calibration.cache").read_bytes())
    assert set(scales) == set(saved.thresholds) - set(saved.left_out) and len(saved.left_out) == 4


def test_a_plan_does_not_consider_them(left_out, workdir, outliers):
    report = convert(digits(outliers, "bad", precision="auto"), workdir, quiet=True)
    plan = json.loads((workdir / "bad" / "precision_plan.json").read_text())
    assert report["plan"]["num_candidates"] == 20 and not BAD & {*plan["sites"], *plan["left_out"]}
    assert set(report["checks"]["int8"]["quantized"]) == set(plan["sites"])


def test_asked_for_by_name_they_are_quantized(left_out, workdir, outliers):
    report = convert(
        digits(outliers, "bad", quantize_only=("block_02/fc1", "block_00"), **{"check.int8_cosine": 0.0}),
        workdir,
        quiet=True,
    )
    assert report["calibration"]["left_out"] == [] and "block_02/fc1" in report["checks"]["int8"]["quantized"]
    plan = workdir / "by_hand.json"
    plan.write_text('{"sites": ["block_02/fc1", "block_00"]}')
    report = convert(digits(outliers, "bad", **{"plan.file": str(plan), "check.int8_cosine": 0.0}), workdir, quiet=True)
    assert report["calibration"]["left_out"] == [] and "block_02/fc1" in report["checks"]["int8"]["quantized"]


def test_it_is_an_error_where_nothing_is_left(workdir, outliers):
    why = r"max_error=1e-09: every product loses more, the least block_\d\d/\w+: .* nothing would be quantized"
    with pytest.raises(UsageError, match=why):
        convert(digits(outliers, "none", **{"calibration.max_error": 1e-9}), workdir, until="calibrate", quiet=True)


@pytest.mark.parametrize("value", [0.0, -1.0, 1.5, float("nan")])
def test_the_bound_is_a_share(value):
    with pytest.raises(UsageError, match=r"config\.calibration\.max_error=.*: must be a number above 0, at most 1"):
        check_values(digits("x.npz", "range", **{"calibration.max_error": value}))


def test_the_best_threshold_decides():
    """Not entropy's own, which the guard leaves, nor the largest."""
    costs = {"a": Cost([1.0, 2.0, 4.0], [0.5, 0.001, 0.4]), "b": Cost([1.0, 2.0], [0.3, 0.2]), "c": Cost([3.0], [0.9])}
    found = Calibration({}, {}, "entropy", 1, {}, costs).leave_out(["a", "b", "unknown"], 0.1)
    assert found.left_out == {"b": 0.2}
    assert Calibration({}, {}, "entropy", 1, {}, costs).leave_out(["a", "b"], 0.2).left_out == {}


def test_the_bound_is_a_twentieth_of_what_cosine_099_allows():
    """A result whose relative squared error is e, in directions of their own, has cosine 1 / √(1 + e): 0.02 for
    0.99."""
    rng = np.random.default_rng(0)
    exact, wrong = rng.normal(size=(2, 100_000))
    got = exact + np.sqrt(20 * default_config().calibration.max_error) * wrong
    assert got @ exact / np.linalg.norm(got) / np.linalg.norm(exact) == pytest.approx(0.99, abs=1e-3)
