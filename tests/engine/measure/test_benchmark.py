"""The benchmark's arithmetic against numpy, and its loops on the simulated GPU."""

import json
import sys

import numpy as np
import pytest
import simulated_gpu
from engine_graphs import IMAGE
from reconverted import as_left

from vit_convert.core.benchmark_results import BenchmarkRow, MeasuredEngine, TransferShare
from vit_convert.core.bundle import Bundle, read_json, write_json
from vit_convert.core.engine_results import EngineCheck
from vit_convert.core.errors import BenchmarkError, BuildError
from vit_convert.core.progress import Progress
from vit_convert.engine.bundle_engines import keep_proof
from vit_convert.engine.commands import add_to_report, benchmark_bundle, end_to_end_shares
from vit_convert.engine.handoff import judged_by, read_config
from vit_convert.engine.host import EngineHost
from vit_convert.engine.measure.benchmark import (
    END_TO_END,
    RESIDENT,
    Case,
    Pass,
    plan_cases,
    rows_table,
    summarise_case,
)
from vit_convert.engine.measure.loops import Latency, Worker, measure_latency, measure_throughput
from vit_convert.engine.measure.plot import plot_rows
from vit_convert.engine.runtime.engine import Engine
from vit_convert.engine.runtime.session import Session

QUIET = Progress(quiet=True)
ABOUT = MeasuredEngine(
    graph="model.fp16.onnx", input="float32", plan_bytes=10, build_seconds=1.5, engine_memory_mib=100.0
)
PASSED = EngineCheck.from_dict({"passed": True})
# What report.json promises of each row.
PROMISED = {"precision", "batch", "streams", "images_per_second", "p50_ms", "p95_ms", "p99_ms", "gpu_memory_mib"}


def test_cases_cover_the_grid():
    cases = plan_cases(["fp16", "int8"], [1, 8], [1, 2], cuda_graphs=(True, False))
    resident = [case for case in cases if not case.transfers]
    assert len(resident) == len(set(resident)) == 2 * 2 * 2 * 2
    assert {(case.precision, case.batch, case.streams) for case in cases if case.transfers} == {
        (precision, batch, 2) for precision in ("fp16", "int8") for batch in (1, 8)
    }
    assert all(not case.transfers for case in plan_cases(["fp16"], [1], [1], end_to_end=False))


def test_a_row_sums_its_passes_up():
    generator = np.random.default_rng(0)
    walls, gpus = generator.gamma(2, 1, (2, 500)), generator.gamma(2, 0.9, (2, 500))
    gpu = {"sm_clock_mhz": 1980.0}
    passes = [
        Pass(rate, Latency(wall, g), mib << 20, True, "", gpu)
        for rate, wall, g, mib in zip((1000.0, 1040.0), walls, gpus, (20, 24))
    ]
    row = summarise_case(Case("fp16", 8, 2, False, True), passes, ABOUT)
    assert set(row.to_dict()) >= PROMISED
    assert row.images_per_second == 1020 and row.noise_percent == pytest.approx(100 * 40 / 1020, abs=0.01)
    for q in (50, 95, 99):
        assert getattr(row, f"p{q}_ms") == pytest.approx(np.percentile(walls, q), abs=1e-4)
        assert getattr(row, f"gpu_p{q}_ms") == pytest.approx(np.percentile(gpus, q), abs=1e-4)
    assert (row.runs, row.gpu_memory_mib, row.context_memory_mib, row.sm_clock_mhz) == (
        1000,
        124.0,
        24.0,
        1980.0,
    )
    assert summarise_case(Case("fp16", 8, 2, False, True), passes[:1], ABOUT).noise_percent is None
    json.dumps(row.to_dict())


def test_rows_say_what_the_build_found(gpu, engines):
    path = engines("int8")
    plan = path / "engines" / "tensorrt-8.6.0-sm90" / "int8.plan"
    summary = {"int8_layers": 24, "fused_attention": {"text": "in part, fp16, 1 of 12"}}
    simulated_gpu.change_sidecar(plan, summary=summary)
    rows = measure(gpu, path, precisions=["int8"]).rows
    assert {(row.int8_layers, row.fused_attention) for row in rows} == {(24, "in part, fp16, 1 of 12")}


def test_a_graph_that_was_refused_is_said():
    passes = [Pass(1.0, Latency(np.ones(3), np.ones(3)), 0, False, "cannot be recorded", {})]
    assert summarise_case(Case("fp16", 8, 1, False, True), passes, ABOUT).why_no_graph == "cannot be recorded"


def test_loops_count_what_ran(gpu, engines):
    engine = Engine(gpu[0], engines("fp32") / "engines" / "tensorrt-8.6.0-sm90" / "fp32.plan")
    with Session(engine) as one, Session(engine) as two:
        for transfers in (False, True):
            workers = [Worker(session, (4, *IMAGE), transfers=transfers) for session in (one, two)]
            before = gpu[1].launches
            latency = measure_latency(workers, 0.02)
            assert len(latency.wall_ms) == len(latency.gpu_ms) == gpu[1].launches - before >= 20
            assert (latency.gpu_ms > 0).all() and (latency.gpu_ms < latency.wall_ms).all()
            before = gpu[1].launches
            rate = measure_throughput(workers, 0.02)
            # Both streams ran together for at least 20 ms, and not for long beyond.
            assert 0 < rate <= 4 * (gpu[1].launches - before) / 0.02


def test_a_failing_worker_ends_the_measurement(gpu, engines):
    engine = Engine(gpu[0], engines("fp32") / "engines" / "tensorrt-8.6.0-sm90" / "fp32.plan")
    with Session(engine, cuda_graphs=False) as session:
        worker = Worker(session, (4, *IMAGE), transfers=False)
        worker.prepared.context._engine.broken = True
        with pytest.raises(BenchmarkError, match="a kernel failed"):
            measure_throughput([worker], 0.01)


def host_of(gpu, path):
    bundle = Bundle(path)
    return EngineHost.open(gpu[0], bundle, read_config(bundle), QUIET)


def measure(gpu, path, **options):
    bundle = Bundle(path)
    config = read_config(bundle)
    config.benchmark.batches = options.pop("batches", (1, 4))
    return benchmark_bundle(
        EngineHost.open(gpu[0], bundle, config, QUIET, command="x"),
        precisions=options.pop("precisions", ["fp16"]),
        warmup_seconds=0.0,
        **options,
    )


def test_benchmark_of_a_bundle(gpu, engines):
    path = engines("fp16", "int8")
    for precision in ("fp16", "int8"):
        keep_proof(
            path / "engines" / "tensorrt-8.6.0-sm90" / f"{precision}.plan",
            PASSED,
            judged_by(Bundle(path)),
        )
    result = measure(gpu, path, precisions=["fp16", "int8"])
    assert (
        read_json(path / "benchmark.json")["rows"] == [row.to_dict() for row in result.rows] and result.status == "done"
    )
    assert len(result.rows) == 2 * 2 * 3 and not result.skipped
    assert all(set(row.to_dict()) >= PROMISED and row.cuda_graph for row in result.rows)
    assert {row.transfers for row in result.rows} == {RESIDENT, END_TO_END}
    assert len(result.end_to_end) == 4 and result.noise_percent == max(row.noise_percent for row in result.rows)
    assert (result.gpu, result.tensorrt, result.command) == ("Simulated", "8.6.0", "x")
    assert "parameters" in result.model.summary and result.model.converted_by is not None
    assert {row.input for row in result.rows} == {"float32"}
    assert not any({"int8_layers", "fused_attention"} & row.to_dict().keys() for row in result.rows)
    assert result.recommended.precision in ("fp16", "int8") and result.recommended.comparisons
    add_to_report(host_of(gpu, path), benchmark=result)
    assert read_json(path / "report.json")["benchmark"] == [row.to_dict() for row in result.rows]


def test_report_names_no_engine_that_is_recommended_no_more(gpu, engines):
    path = engines("fp16")
    write_json(path / "report.json", {"engine": {"path": "old"}, "engines": []})
    add_to_report(host_of(gpu, path), benchmark=measure(gpu, path))
    assert read_json(path / "report.json")["engine"] == {}


def test_proof_of_an_engine_goes_with_the_engine(gpu, engines):
    path = engines("fp16")
    assert measure(gpu, path).recommended.reason == "none of fp16 was verified: verify, then benchmark again"
    plan = path / "engines" / "tensorrt-8.6.0-sm90" / "fp16.plan"
    keep_proof(plan, EngineCheck.from_dict({"passed": True, "top1": 98.0}), judged_by(Bundle(path)))
    assert measure(gpu, path).recommended.precision == "fp16"
    labels = path / "evaluation_labels.npy"
    np.save(labels, np.load(labels)[::-1])
    as_left(path, labels.name)  # other labelled images: the engine has not been judged by them
    assert measure(gpu, path).recommended.precision == ""
    engines("fp16")
    keep_proof(plan, EngineCheck.from_dict({"passed": True, "top1": 98.0}), judged_by(Bundle(path)))
    assert measure(gpu, path).recommended.precision == "fp16"
    engines("fp16", error=10.0)  # another engine in its place
    assert measure(gpu, path).recommended.precision == ""


def test_engine_of_another_host_is_found_if_it_runs_here(gpu, engines):
    path = engines("fp16")
    here = path / "engines" / "tensorrt-8.6.0-sm90"
    there = here.rename(here.with_name("tensorrt-8.6.0-sm80"))
    rewrite(there / "fp16.plan.json", targets=["sm80"], hardware_compatible=False)
    with pytest.raises(BuildError, match="there is no such engine"):
        measure(gpu, path)
    rewrite(there / "fp16.plan.json", targets=["sm80"], hardware_compatible=True)
    assert measure(gpu, path).rows


def rewrite(sidecar, *, targets, hardware_compatible):
    record = read_json(sidecar)
    record["options"]["hardware_compatible"] = hardware_compatible
    write_json(sidecar, {**record, "targets": targets})


def test_batches_without_a_profile_are_skipped_with_a_reason(gpu, engines):
    result = measure(gpu, engines("fp16"), batches=(4, 16), end_to_end=False)
    assert {row.batch for row in result.rows} == {4}
    assert [skipped.batch for skipped in result.skipped] == [16, 16] and "the engine takes" in result.skipped[0].reason
    with pytest.raises(BenchmarkError, match="nothing was measured"):
        measure(gpu, engines("fp16"), batches=(16,))


def test_interrupted_benchmark_keeps_its_rows(gpu, engines, monkeypatch):
    path, calls = engines("fp16"), []

    def interrupt(workers, seconds):
        calls.append(seconds)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measure_latency(workers, seconds)

    monkeypatch.setattr("vit_convert.engine.measure.benchmark.measure_latency", interrupt)
    with pytest.raises(KeyboardInterrupt):
        measure(gpu, path)
    found = read_json(path / "benchmark.json")
    assert found["status"] == "running" and len(found["rows"]) == 2


def test_end_to_end_share_is_of_the_best_resident_row():
    def row(precision, batch, transfers, rate):
        return BenchmarkRow.from_dict(
            {"precision": precision, "batch": batch, "transfers": transfers, "images_per_second": rate}
        )

    rows = [
        row("fp16", 8, RESIDENT, 90.0),
        row("fp16", 8, RESIDENT, 100.0),
        row("fp16", 8, END_TO_END, 95.0),
        row("fp16", 64, END_TO_END, 1.0),
    ]
    assert end_to_end_shares(rows) == [TransferShare(precision="fp16", batch=8, share=0.95)]


def test_tables():
    row = summarise_case(
        Case("fp16", 8, 2, True, True), [Pass(12345.6, Latency(np.ones(3), np.ones(3)), 0, True, "", {})], ABOUT
    )
    header, line = rows_table([row]).splitlines()
    assert header.split()[:4] == ["precision", "batch", "streams", "transfers"]
    assert line.split()[:7] == ["fp16", "8", "2", "in+out", "on", "12", "346"]


@pytest.mark.parametrize("name", ["plot.png", "plot.svg"])
def test_plot(tmp_path, name):
    row = {"precision": "fp16", "streams": 1, "transfers": RESIDENT, "cuda_graph": True}
    rows = [
        BenchmarkRow.from_dict({**row, "batch": batch, "images_per_second": 100.0 * batch, "p50_ms": float(batch)})
        for batch in (1, 8)
    ]
    reason = plot_rows(rows, tmp_path / name, title="GPU")
    if "matplotlib" in sys.modules:
        assert reason == "" and (tmp_path / name).stat().st_size > 1000
    else:
        assert reason == "matplotlib is not installed" and not (tmp_path / name).exists()
