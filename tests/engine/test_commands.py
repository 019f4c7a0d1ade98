"""What verifying and measuring a bundle's engines come to, of engines that a script plays."""

import contextlib
import dataclasses
import json
import types

import pytest

from vit_convert.core.benchmark_results import BenchmarkResult, BenchmarkRow, MeasuredModel, SkippedCase
from vit_convert.core.bundle import Bundle
from vit_convert.core.check_results import GraphCheck
from vit_convert.core.defaults import default_config
from vit_convert.core.engine_results import EngineCheck, EngineSummary, Proof, Verification
from vit_convert.core.errors import BenchmarkError, CheckError
from vit_convert.core.recommend import RESIDENT
from vit_convert.core.tune_results import TunedEngine
from vit_convert.core.version import __version__
from vit_convert.engine import commands as module
from vit_convert.engine.backend import cuda
from vit_convert.engine.commands import add_to_report, benchmark_bundle, end_to_end_shares, environment, verify_bundle
from vit_convert.engine.measure.benchmark import END_TO_END
from vit_convert.report.record import read_report

H200 = cuda.Gpu("NVIDIA H200", "sm90", 143771 << 20, "580.1", "13.0")


def row(precision="fp16", batch=8, rate=100.0, transfers=RESIDENT, **more):
    given = {"precision": precision, "batch": batch, "images_per_second": rate, "transfers": transfers}
    return BenchmarkRow.from_dict({**given, **more})


def test_what_is_left_when_images_come_from_the_host():
    """Of the fastest row of the same engine and batch that keeps them on the GPU."""
    rows = [row(rate=100.0), row(rate=200.0), row(rate=150.0, transfers=END_TO_END), row(batch=1, transfers=END_TO_END),
            row("int8", rate=50.0), row("int8", rate=60.0, transfers=END_TO_END)]  # fmt: skip
    found = [(share.precision, share.batch, share.share) for share in end_to_end_shares(rows)]
    assert found == [("fp16", 8, 0.75), ("int8", 8, 1.2)]  # nothing to hold batch 1 against


def test_where_it_was_measured(monkeypatch):
    monkeypatch.setattr(module, "cpu_model", lambda: "Some CPU")
    monkeypatch.setattr(module, "num_cores", lambda: 7)
    monkeypatch.setattr(module.cuda, "gpu", lambda: None)
    backend = types.SimpleNamespace(name="tensorrt", version="8.6.1", gpu=H200)
    found = environment(backend)
    told = (found.gpu, found.arch, found.driver, found.cuda, found.gpu_memory_total_mib)
    assert told == ("NVIDIA H200", "sm90", "580.1", "13.0", 143771)
    assert (found.cpu, found.cores, found.backend, found.tensorrt) == ("Some CPU", 7, "tensorrt", "8.6.1")
    assert found.vit_convert == __version__ and found.date.endswith("+00:00") and found.python.startswith("3.")
    bare = environment(None)
    assert (bare.gpu, bare.arch, bare.driver, bare.cuda, bare.gpu_memory_total_mib) == ("", "", "", "", 0)
    assert (bare.backend, bare.tensorrt, bare.cores) == ("", "", 7)
    monkeypatch.setattr(module.cuda, "gpu", lambda: H200)
    assert environment(None).gpu == "NVIDIA H200"  # the host's, that onnxruntime runs on
    assert environment(types.SimpleNamespace(name="rtx", version="1", gpu=None)).arch == "sm90"


@pytest.fixture
def host(tmp_path, monkeypatch):
    """A host with a bundle whose engines are there, and what was done with each."""
    bundle, done = Bundle(tmp_path / "tiny"), []
    bundle.require_writable()
    for name in ("open_engine", "find_plan", "keep_proof"):
        monkeypatch.setattr(module, name, lambda *arguments, name=name: done.append((name, *arguments[1:])))
    monkeypatch.setattr(module, "find_plan", lambda backend, bundle, precision: bundle.root / f"{precision}.plan")
    monkeypatch.setattr(module, "open_engine", lambda backend, bundle, plan: types.SimpleNamespace(path=plan))
    monkeypatch.setattr(module, "Session", lambda engine: contextlib.nullcontext(engine))
    monkeypatch.setattr(module, "keep_proof", lambda plan, found, judge: done.append((plan.name, found.passed, judge)))
    said = []
    return types.SimpleNamespace(
        backend=None, bundle=bundle, config=default_config(), judge="j", command="engine", done=done, said=said,
        in_bundle=lambda plan: plan.name, progress=types.SimpleNamespace(say=said.append),
    )  # fmt: skip


@pytest.fixture
def verified(host, monkeypatch):
    """Verifies engines, of which each misses this."""

    def verified(consistency=True, **misses):
        def verify_session(engine, host):
            found = misses[engine.path.stem]
            return EngineCheck.from_dict({"passed": not found, "misses": found, "cosine": 0.5})

        builds = []
        monkeypatch.setattr(module, "verify_session", verify_session)
        monkeypatch.setattr(
            module, "compare_builds", lambda session, host, found: builds.append(session.path.stem) or found
        )
        host.config.check.consistency = consistency
        return verify_bundle(host, precisions=[*misses]), builds

    return verified


def test_each_engine_is_proved_by_its_judge(host, verified):
    found, builds = verified(fp32=[], fp16=[])
    assert found.passed and [*found.engines] == builds == ["fp32", "fp16"]
    assert {check.plan for check in found.engines.values()} == {"fp32.plan", "fp16.plan"}
    assert host.done == [("fp32.plan", True, "j"), ("fp16.plan", True, "j")]
    assert verified(consistency=False, fp32=[])[1] == []


def test_one_that_misses_is_told_and_the_others_are_still_proved(host, verified):
    with pytest.raises(CheckError) as caught:
        verified(fp32=[], fp16=["a", "b"], int8=["c", "d", "e"])
    assert str(caught.value).splitlines()[0] == (
        "engines miss their tolerance: fp16: a; fp16: b; int8: c; int8: d"  # no more than a few
    )
    assert {name: check.passed for name, check in caught.value.result.engines.items()} == {
        "fp32": True, "fp16": False, "int8": False,
    }  # fmt: skip
    assert [step[:2] for step in host.done] == [("fp32.plan", True), ("fp16.plan", False), ("int8.plan", False)]


@pytest.fixture
def measured(host, monkeypatch):
    """Measures engines with these rows; what is on the disk after each."""

    def measured(*rows, skipped=(), plot="", proofs=None):
        kept = []

        def run_cases(engines, cases, *, seconds, warmup_seconds, progress, save):
            save(list(rows[:1]), list(skipped))
            kept.append(json.loads(host.bundle.benchmark.read_text()))
            return list(rows), list(skipped)

        known = {} if proofs is None else proofs
        monkeypatch.setattr(module, "run_cases", run_cases)
        monkeypatch.setattr(module, "describe_model", lambda bundle: MeasuredModel(converted_by="x"))
        monkeypatch.setattr(module, "proof_of", lambda plan, judge: known.get(plan.stem))
        monkeypatch.setattr(module, "roofline_of", lambda host, precisions, *, measured: None)
        monkeypatch.setattr(module, "plot_rows", lambda rows, path, *, title: plot)
        monkeypatch.setattr(module.Manifest, "read", lambda bundle: types.SimpleNamespace(
            files=types.SimpleNamespace(graph_hashes=lambda path: {"model.onnx": "ab"})))  # fmt: skip
        return benchmark_bundle(host, precisions=["fp16", "fp32"], warmup_seconds=0.5), kept

    return measured


PASSED = Proof.from_dict({"passed": True})


def test_what_is_measured_is_kept_from_the_first_row_on(host, measured):
    rows = [row(rate=1234.5, noise_percent=0.5), row("fp32", rate=500.0, noise_percent=2.0), row("fp32", rate=10.0)]
    rows.append(row(rate=617.25, transfers=END_TO_END))
    found, (running,) = measured(*rows, proofs={"fp16": PASSED, "fp32": PASSED})
    assert (running["status"], len(running["rows"]), running["seconds"], running["warmup_seconds"]) == (
        "running",
        1,
        3.0,
        0.5,
    )
    assert (found.status, found.summary, found.noise_percent) == ("done", "fp16 at batch 8: 1,234 images/s", 2.0)
    assert found.recommended.precision == "fp16" and found.end_to_end[0].share == 0.5
    assert json.loads(host.bundle.benchmark.read_text()) == json.loads(json.dumps(found.to_dict())) and host.said == []
    assert found.onnx == {"model.onnx": "ab"} and found.command == "engine"


def test_nothing_that_is_not_proved_is_recommended(measured):
    assert measured(row())[0].recommended.precision == ""
    assert measured(row(), row("fp32", rate=1.0), proofs={"fp32": PASSED})[0].recommended.precision == "fp32"


def test_why_there_is_no_picture(host, measured):
    assert measured(row(), plot="matplotlib is not installed")[0].noise_percent is None
    assert host.said == ["no plot: matplotlib is not installed"]


def test_nothing_was_measured(measured):
    skipped = SkippedCase.from_dict({"precision": "fp16", "batch": 64, "reason": "out of memory"})
    with pytest.raises(BenchmarkError, match="nothing was measured: out of memory"):
        measured(skipped=[skipped, dataclasses.replace(skipped, reason="another")])


ENGINES = [EngineSummary.from_dict({"path": f"{name}.plan", "precision": name}) for name in ("fp32", "fp16")]
CHECKED = Verification.of({"fp16": EngineCheck.from_dict({"passed": True, "top1": 80.0, "plan": "fp16.plan"})})


@pytest.fixture
def merged(host, monkeypatch):
    """What stands in the report after each thing that was found; of the engines, fp16 is proved."""
    host.facts = types.SimpleNamespace(checks={"fp32": GraphCheck.from_dict({"passed": True})})
    monkeypatch.setattr(module, "proof_of", lambda path, judge: PASSED if path.name == "fp16.plan" else None)

    def merged(**found):
        add_to_report(host, **found)
        return read_report(host.bundle)

    return merged


def test_a_build_replaces_engines_and_what_was_found_of_them(merged):
    report = merged(build=ENGINES)
    assert [row.path for row in report.engines] == ["fp32.plan", "fp16.plan"]
    assert report.engine.path == "fp16.plan" and "verified" in report.engine.recommended_because
    assert merged(verify=CHECKED).verify == CHECKED
    kept = merged(build=ENGINES)  # fp16 is proved: what was found of it holds
    assert [*kept.verify.engines] == ["fp16"]
    other = merged(verify=Verification.of({"fp32": EngineCheck.from_dict({"passed": True, "plan": "fp32.plan"})}))
    assert {*other.verify.engines} == {"fp32", "fp16"}
    assert [*merged(build=ENGINES).verify.engines] == ["fp16"]  # fp32 was built anew, and is not proved


def test_what_was_verified_and_tuned(merged):
    assert merged().verify is None
    assert merged(verify=CHECKED).accuracy == {"engine": 80.0}
    tuned = TunedEngine.from_dict({"precision": "fp16", "batch": 8})
    report = merged(tuning=[tuned])
    assert report.tuning == (tuned,) and report.verify == CHECKED
    assert merged().tuning == (tuned,)  # what is not given stays


@pytest.mark.parametrize(("precision", "engine"), [("fp32", "fp32.plan"), ("", "fp16.plan")])
def test_a_benchmark_recommends_or_leaves_it_to_what_is_proved(merged, precision, engine):
    merged(build=ENGINES)
    found = BenchmarkResult.from_dict(
        {"recommended": {"precision": precision, "reason": "measured"}, "rows": [row().to_dict()]}
    )
    report = merged(benchmark=found)
    assert report.engine.path == engine and [line.batch for line in report.benchmark] == [8]
    without = merged(benchmark=BenchmarkResult.from_dict({"rows": []}))
    assert without.engine.path == "fp16.plan" and without.benchmark == ()
