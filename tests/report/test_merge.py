"""What the GPU host's commands add to a report: new over old, and nothing that was said of an engine that is gone."""

import pytest

from vit_convert.core.benchmark_results import BenchmarkResult
from vit_convert.core.engine_results import EngineCheck, EngineSummary, Proof, Verification
from vit_convert.core.recommend import Evidence
from vit_convert.report.merge import with_benchmark, with_engines, with_recommendation, with_verification
from vit_convert.report.record import Report


def engine(precision, path="", **more):
    graph = "model.onnx" if precision == "fp32" else f"model.{precision}.onnx"
    fields = {"backend": "tensorrt", "version": "8.6.0", "graph": graph, **more}
    return EngineSummary.from_dict({"precision": precision, "path": path or f"{precision}.plan", **fields})


def check(passed=True, top1=None, cosine=0.5):
    return EngineCheck.from_dict({"passed": passed, "cosine": cosine, **({} if top1 is None else {"top1": top1})})


def report(**fields):
    return Report.from_dict({"name": "x", "accuracy": {"jax": 90.0}, **fields})


def with_(*engines, **verified):
    found = with_engines(report(), engines, [row.path for row in engines])
    return with_verification(found, Verification.of(verified)) if verified else found


def test_an_engine_takes_the_place_of_the_one_in_its_file():
    before = with_(engine("fp32"), engine("fp16", build_seconds=1.0))
    after = with_engines(before, [engine("fp16", build_seconds=2.0), engine("int8")], [])
    assert [(row.path, row.build_seconds) for row in after.engines] == [
        ("fp32.plan", 0.0), ("fp16.plan", 2.0), ("int8.plan", 0.0),
    ]  # fmt: skip


def test_what_was_found_of_an_engine_goes_with_it():
    before = with_(engine("fp32"), engine("fp16"), fp32=check(), fp16=check(False))
    assert not before.verify.passed
    kept = with_engines(before, [engine("fp16")], ["fp16.plan"])
    assert kept.verify == before.verify  # it was proved since
    after = with_engines(before, [engine("fp16")], ["fp32.plan"])
    assert [*after.verify.engines] == ["fp32"] and after.verify.passed
    assert with_engines(after, [engine("fp32")], []).verify is None
    assert with_engines(report(), [engine("fp32")], []).verify is None


def test_verification_adds_to_what_was_found_before():
    before = with_(engine("fp32"), engine("fp16"), fp32=check(top1=80.0), fp16=check(False))
    assert before.accuracy == {"jax": 90.0, "engine": 80.0}
    after = with_verification(before, Verification.of({"fp16": check(top1=79.0), "int8": check()}))
    assert [*after.verify.engines] == ["fp32", "fp16", "int8"] and after.verify.passed
    assert after.accuracy == {"jax": 90.0, "engine": 79.0}
    assert with_verification(before, Verification.of({"fp16": check()})).accuracy == before.accuracy


def test_what_checks_come_to():
    found = Verification.of({"fp32": check(cosine=0.25), "fp16": check(top1=79.5), "int8": check(False, top1=70.0)})
    assert (found.passed, found.top1) == (False, 79.5)
    assert found.summary == (
        "fp32: cosine 0.250000; fp16: cosine 0.500000, top-1 79.50 %; int8: cosine 0.500000, top-1 70.00 %"
    )
    assert Verification.of({"fp32": check()}).passed and Verification.of({}).top1 is None
    proof = Proof.of(EngineCheck.from_dict({"passed": True, "tolerance": "t", "max_rel": 0.1, "cosine": 0.9,
        "top1": 50.0, "agreement": 99.0}), "judge")  # fmt: skip
    assert proof.to_dict() == {"passed": True, "tolerance": "t", "max_rel": 0.1, "cosine": 0.9, "top1": 50.0,
        "agreement": 99.0, "judge": "judge"}  # fmt: skip


def measured(precision, top1=None):
    recommended = {"precision": precision, "reason": "fast", **({} if top1 is None else {"top1": top1})}
    row = {"precision": precision, "batch": 8, "images_per_second": 1.0}
    return BenchmarkResult.from_dict(
        {"backend": "tensorrt", "tensorrt": "8.6.0", "rows": [row], "recommended": recommended}
    )


def test_a_benchmark_recommends_an_engine_that_is_there():
    found = with_benchmark(with_(engine("fp32"), engine("fp16")), measured("fp16", 81.0))
    assert (found.engine.path, found.engine.recommended_because, found.recommended.precision) == (
        "fp16.plan",
        "fast",
        "fp16",
    )
    assert [row.batch for row in found.benchmark] == [8] and found.accuracy["engine"] == 81.0
    for engines in ((engine("fp32"),), (engine("fp16", backend="rtx"),), (engine("fp16", version="10.0"),)):
        none = with_benchmark(with_(*engines), measured("fp16", 81.0))
        assert none.engine is None and none.accuracy == {"jax": 90.0}


def evidence(**verified):
    checks = report(checks={name: {"passed": True} for name in ("fp32", "fp16")}).checks
    return Evidence({path.replace("_", "."): Proof.of(found) for path, found in verified.items()}, checks, {})


@pytest.mark.parametrize("passed", [True, False])
def test_a_benchmarks_choice_stays_as_long_as_it_is_proved(passed):
    before = with_benchmark(with_(engine("fp32"), engine("int8")), measured("int8"))
    stays = with_recommendation(before, evidence(int8_plan=check(passed)))
    proved = with_(engine("fp32"), engine("int8"), int8=check(passed))
    by_precision = with_recommendation(with_benchmark(proved, measured("int8")), evidence())
    for after in (stays, by_precision):
        if passed:
            assert (after.engine.path, after.recommended.precision) == ("int8.plan", "int8")
        else:
            assert (after.engine.path, after.recommended) == ("fp32.plan", None)
    never = with_recommendation(before, evidence())
    assert (never.engine.path, never.recommended) == ("fp32.plan", None)


def test_without_a_benchmark_the_smallest_that_is_proved():
    found = with_recommendation(with_(engine("fp32"), engine("fp16")), evidence())
    assert found.engine.path == "fp16.plan" and found.recommended is None
    assert with_recommendation(with_(engine("int8")), evidence()).engine is None
