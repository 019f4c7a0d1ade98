"""The scripts of benchmarks/gpu, as far as they go without a GPU: their loops, their table, and that steps fail alone and resume."""

import importlib
import json
import pathlib
import subprocess
import sys
import time

import pytest

FOLDER = pathlib.Path(__file__).parents[2] / "benchmarks" / "gpu"


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))


def test_loops_time_what_runs():
    loops = importlib.import_module("loops")
    # Each call takes 2 ms; sleeping overshoots on a busy machine, never undershoots.
    found = loops.measure(lambda: time.sleep(2e-3), lambda handle: None, batch=8, seconds=0.1, warmup_seconds=0.0)
    assert 8 / 20e-3 < found["images_per_second"] <= 8 / 2e-3
    assert 2 <= found["p50_ms"] <= found["p95_ms"] <= found["p99_ms"] and found["runs"] >= 2 * loops.MIN_CALLS


def test_results_resume_and_record_failures(tmp_path):
    loops = importlib.import_module("loops")
    path, calls = tmp_path / "rows.json", []

    def work(name, fail=False):
        calls.append(name)
        if fail:
            raise RuntimeError("no cuDNN")
        return {"images_per_second": 1.0}

    for _ in range(2):
        results = loops.Results(path, framework="x")
        results.add({"batch": 1}, lambda: work("one"))
        results.add({"batch": 2}, lambda: work("two", fail=True))
    assert calls == ["one", "two", "two"]  # what is known is kept, what failed is tried again
    found = json.loads(path.read_text())
    assert found["framework"] == "x" and found["rows"][1]["failed"] == "RuntimeError: no cuDNN" and len(found["rows"]) == 2


def engine_row(batch, streams, rate, p50, transfers="none: resident"):
    row = {"precision": "fp16", "batch": batch, "streams": streams, "transfers": transfers, "images_per_second": rate, "p50_ms": p50}
    return {**row, "noise_percent": 0.4}


def test_table_takes_the_best_of_each_side():
    side_by_side = importlib.import_module("side_by_side")
    ours = [
        engine_row(1, 1, 1500.0, 0.6),
        engine_row(1, 2, 2000.0, 0.9),
        engine_row(256, 1, 10000.0, 25.0),
        engine_row(256, 2, 12000.0, 42.0),
    ]
    ours.append(engine_row(256, 2, 99999.0, 1.0, transfers="images in"))  # another kind of measurement
    jax = [
        {"precision": "fp32", "attention": "plain", "batch": 256, "images_per_second": 4000.0, "p50_ms": 60.0},
        {"precision": "bf16", "attention": "plain", "batch": 256, "images_per_second": 4800.0, "p50_ms": 55.0},
        {"precision": "bf16", "attention": "cudnn", "batch": 256, "failed": "x"},
    ]
    torch = [{"precision": "fp16", "mode": "m", "batch": 1, "images_per_second": 1.0, "p50_ms": 0.9, "noise_percent": 1.5}]
    model = {"variant": "B/16", "image_size": 224, "engine": {"rows": ours}, "jax": {"rows": jax}, "torch": {"rows": torch}}
    one, many = side_by_side.table({"models": {"b16": model}}).splitlines()[2:]
    assert one == "| B/16 at 224 | 1 | 0.600 ms | – | 0.900 ms | – | 1.50× | 1.5 |"
    assert many == "| B/16 at 224 | 256 | 12 000 images/s | 4 800 images/s (bf16, plain) | – | 2.50× | – | 0.4 |"
    assert len(side_by_side.table({"models": {"new": {"variant": "B/16", "image_size": 224}}}).splitlines()) == 2


def test_side_by_side_run_records_failures_goes_on_and_resumes(tmp_path):
    # A Python without TensorRT and a checkpoint step that works: the engines' steps fail, each alone.
    words = ["--models=mu/16@64", "--steps=checkpoint,build", "--batches=1", f"--workdir={tmp_path}", f"--output={tmp_path / 'out.json'}"]

    def go(*more):
        return subprocess.run([sys.executable, str(FOLDER / "h200.py"), *words, *more], capture_output=True, text=True, timeout=120)

    first = go()
    assert first.returncode == 0 and "all steps were tried" in first.stdout, first.stdout + first.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert {name: step["status"] for name, step in found["steps"].items()} == {"mu16-64/checkpoint": "done", "mu16-64/build": "failed"}
    second = go()
    assert "mu16-64/checkpoint" not in second.stdout and "mu16-64/build" in second.stdout
    third = go("--stop_after=-1")
    assert "1 steps are left" in third.stdout
