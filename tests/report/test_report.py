"""What report.json says of what the stages returned: nothing lost, nothing made up, failures and half a conversion
too."""

import json

import pytest

import vit_convert
from vit_convert.core.benchmark_results import BenchmarkRow, Recommendation
from vit_convert.core.bundle import Bundle
from vit_convert.core.config import default_config
from vit_convert.core.engine_results import EngineSummary, RecommendedEngine, Verification
from vit_convert.core.manifest import StageRecord
from vit_convert.core.pipeline import Context
from vit_convert.core.progress import Progress
from vit_convert.core.results import Results
from vit_convert.report.record import Report
from vit_convert.report.write import write_report


def check(precision, top1=None, passed=True, **more):
    top1 = {} if top1 is None else {"top1": top1}
    return {"precision": precision, "passed": passed, **top1, **more}


def engine(precision):
    graph = "model.onnx" if precision == "fp32" else f"model.{precision}.onnx"
    return {"precision": precision, "path": f"engines/x/{precision}.plan", "graph": graph, "backend": "rtx"}


RESULTS = {
    "checkpoint": {"path": "a.npz", "variant": "B/32", "num_params": 7, "summary": "not for the report"},
    "export": {"opset": 20, "num_nodes": 5, "lowering": "not for the report"},
    "reference": {"source": "images", "num_images": 4, "top1": 81.5, "summary": "no"},
    "check": check("fp32", 81.0, tolerance="in words"),
    "calibrate": {"method": "entropy", "num_images": 64, "summary": "no"},
    "quantize": {
        "checks": {"fp16": check("fp16", 80.5), "int8": check("int8", 0.0)},
        "verdicts": {"int8": {"text": "int8 loses 1 point", "accurate": True}},
        "max_abs_activation": {"block_00": {"tensor": "t", "max_abs": 139.0}},
    },
    "build": {"engines": [engine("int8"), engine("fp16")]},
}


def holds(found, expected):
    """Whether what a stage returned stands in the report; keys that it did not return are there, too, and empty."""
    return expected.items() <= found.items()


@pytest.fixture
def report(tmp_path):
    """Writes a report from results and statuses; returns it as it lies on the disk."""

    def report(results, statuses=("done",), command=("vit_convert",), **more):
        bundle = Bundle(tmp_path / "b")
        bundle.require_writable()
        config = default_config()
        config.name = "b"
        context = Context(config, bundle, Progress(quiet=True))
        for name, result in results.items():
            context.results.put(name, getattr(Results, name).kind.from_dict(result))
        rows = [
            StageRecord.from_dict({"name": f"s{i}", "status": status, "seconds": 1.5, "key": "k", **more})
            for i, status in enumerate(statuses)
        ]
        returned = write_report(context, rows, command)
        found = json.loads(bundle.report.read_text())
        assert found == json.loads(json.dumps(returned.to_dict())) and Report.problems(found) == []
        return found

    return report


def test_what_each_stage_found(report):
    found = report(RESULTS)
    assert (found["name"], found["vit_convert"]) == ("b", vit_convert.__version__)
    assert holds(found["checkpoint"], {"path": "a.npz", "variant": "B/32", "num_params": 7})
    assert holds(found["onnx"], {"opset": 20, "num_nodes": 5, "rules": []})
    assert found["reference"] == {"source": "images", "num_images": 4}
    assert holds(found["calibration"], {"method": "entropy", "num_images": 64})
    assert "not for the report" not in str(found) and not {"summary", "lowering"} & {*found["onnx"]}
    assert found["max_abs_activation"] == {"block_00": {"tensor": "t", "max_abs": 139.0}}
    assert holds(found["verdicts"]["int8"], RESULTS["quantize"]["verdicts"]["int8"])
    assert all(map(holds, found["engines"], RESULTS["build"]["engines"])) and len(found["engines"]) == 2
    assert found["benchmark"] == [] and "verify" not in found and "recommended" not in found


def test_every_check_stands_in_it_and_that_of_fp32_first(report):
    found = report(RESULTS)
    assert holds(found["check"], RESULTS["check"]) and list(found["checks"]) == ["fp32", "fp16", "int8"]
    expected = {"fp32": RESULTS["check"], **RESULTS["quantize"]["checks"]}
    assert all(holds(found["checks"][precision], check) for precision, check in expected.items())
    without = report({key: value for key, value in RESULTS.items() if key != "check"})
    assert without["check"]["precision"] == "fp16" and set(without["checks"]) == {"fp16", "int8"}
    assert report({})["check"] == {} and report({})["checks"] == {}


def test_accuracy_of_each_graph_and_of_the_engine(report):
    assert report(RESULTS)["accuracy"] == {"jax": 81.5, "onnx": 81.0, "fp16": 80.5, "int8": 0.0, "engine": None}
    verify = {"top1": 80.0, "engines": {}}
    assert report({**RESULTS, "verify": verify})["accuracy"]["engine"] == 80.0
    assert report({})["accuracy"] == {"jax": None, "engine": None}


def test_the_command_can_be_pasted_into_a_shell(report):
    found = report(
        {}, command=("python", "-m", "vit_convert", "--config=my model.py", "--config.name=a;b", "--config.x=('y',)")
    )
    assert (
        found["command"]
        == """python -m vit_convert '--config=my model.py' '--config.name=a;b' '--config.x=('"'"'y'"'"',)'"""
    )


@pytest.mark.parametrize(
    ("statuses", "status"),
    [(("done", "fresh"), "done"), (("fresh",), "done"), (("done", "failed"), "failed"), (("failed", "done"), "failed")],
)
def test_status(report, statuses, status):
    found = report({}, statuses, error="why")
    assert found["status"] == status
    assert found["stages"] == [
        {"name": f"s{i}", "status": s, "seconds": 1.5, "peak_rss_mib": 0.0, "error": "why"}
        for i, s in enumerate(statuses)
    ]


@pytest.mark.parametrize(
    ("passed", "recommended"),
    [
        ({"fp32": True, "fp16": True, "bf16": True}, "fp16"),
        ({"fp32": True, "fp16": False, "bf16": True}, "bf16"),
        ({"fp32": True, "fp16": False}, "fp32"),
        ({"fp32": False, "fp16": False, "bf16": False}, None),
        ({"fp32": False}, None),
    ],
)
def test_an_engine_that_failed_or_was_not_checked_is_not_recommended(report, passed, recommended):
    checks = {precision: check(precision, passed=value) for precision, value in passed.items()}
    results = {
        "check": checks.pop("fp32"),
        "quantize": {"checks": checks},
        "build": {"engines": [engine(precision) for precision in passed]},
    }
    assert report(results)["engine"].get("precision") == recommended


def test_what_the_benchmark_measured_goes_before(report):
    rows, chosen = [{"precision": "int8"}], {"precision": "int8", "reason": "twice as fast"}
    measured = {"rows": rows, "recommended": chosen, "backend": "rtx"}
    found = report({**RESULTS, "benchmark": measured, "verify": {"top1": None}})
    assert holds(found["benchmark"][0], rows[0]) and holds(found["recommended"], chosen)
    assert holds(found["engine"], {**engine("int8"), "recommended_because": "twice as fast"})
    # it ended before it could recommend
    assert report({**RESULTS, "benchmark": {"rows": rows}})["engine"]["precision"] == "fp16"
    nothing = report({**RESULTS, "benchmark": {**measured, "recommended": {"precision": "", "reason": "none passed"}}})
    assert nothing["engine"]["precision"] == "fp16" and nothing["recommended"]["reason"] == "none passed"


def test_a_fresh_rerun_keeps_what_a_gpu_host_added_and_a_change_does_not(report, tmp_path):
    report({"checkpoint": RESULTS["checkpoint"]})
    path = Bundle(tmp_path / "b").report
    record = json.loads(path.read_text())
    added = {
        "engines": [EngineSummary.from_dict(engine("fp16")).to_dict()],
        "engine": RecommendedEngine.from_dict(engine("fp16")).to_dict(),
        "verify": Verification.from_dict({"top1": 80.0}).to_dict(),
        "benchmark": [BenchmarkRow.from_dict({"precision": "fp16"}).to_dict()],
        "recommended": Recommendation.from_dict({"precision": "fp16"}).to_dict(),
    }
    path.write_text(json.dumps({**record, **added, "date": "before"}))
    found = report({"checkpoint": RESULTS["checkpoint"]}, ("fresh", "fresh"))
    assert {key: found[key] for key in added} == added and found["date"] != "before"
    found = report({"checkpoint": RESULTS["checkpoint"]}, ("fresh", "done"))
    assert found["engines"] == [] and found["engine"] == {} and found["benchmark"] == [] and "verify" not in found
    path.write_text(json.dumps({**record, **added}))
    found = report(RESULTS, ("fresh", "fresh"))
    assert [row["path"] for row in found["engines"]] == [
        row["path"] for row in RESULTS["build"]["engines"]
    ]  # built here
