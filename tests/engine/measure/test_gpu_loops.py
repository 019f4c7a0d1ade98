"""How benchmarks/gpu times the peers and lays results out, and what their scripts find in their caches; without a
GPU."""

import importlib
import json
import os
import pathlib
import subprocess
import sys
import time

import pytest

from vit_convert.engine.measure.benchmark import END_TO_END, RESIDENT

FOLDER = pathlib.Path(__file__).parents[3] / "benchmarks" / "gpu"
# What is timed runs as JAX does by default, not as strictly as the tests.
ENVIRONMENT = {**os.environ, "JAX_NUMPY_DTYPE_PROMOTION": "standard", "JAX_DEFAULT_MATMUL_PRECISION": "default"}


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))


class Clock:
    """A clock that stands still but for what is done by it."""

    def __init__(self):
        self.now = 100.0

    def perf_counter(self):
        return self.now

    def passes(self, seconds):
        self.now += seconds


def test_loops_time_what_runs(monkeypatch):
    loops, clock = importlib.import_module("loops"), Clock()
    monkeypatch.setattr(loops, "time", clock)
    call, wait = 3 / 2048, 1 / 2048  # binary fractions of a second, so that sums are exact
    found = loops.measure(
        lambda: clock.passes(call), lambda handle: clock.passes(wait), batch=8, seconds=1 / 8, warmup_seconds=0.0
    )
    assert found["images_per_second"] == 8 * 512 and found["noise_percent"] == 0
    assert found["p50_ms"] == found["p95_ms"] == found["p99_ms"] == round(1000 / 512, 4)
    assert found["runs"] == loops.PASSES * 32  # half of the time of each pass is for single calls


def test_loops_call_often_enough_where_a_call_takes_long(monkeypatch):
    loops, clock = importlib.import_module("loops"), Clock()
    monkeypatch.setattr(loops, "time", clock)
    slow = iter([1.0, 3.0] * 1000)
    found = loops.measure(
        lambda: clock.passes(next(slow)), lambda handle: None, batch=1, seconds=0.1, warmup_seconds=0.0
    )
    assert found["runs"] == loops.PASSES * loops.MIN_RUNS
    assert (found["p50_ms"], found["p95_ms"], found["p99_ms"]) == (2000, 3000, 3000)


def test_loops_are_those_of_our_engines():
    loops = importlib.import_module("loops")
    most, flying, waited = 0, [], []

    def call():
        nonlocal most
        flying.append(len(flying))
        most = max(most, len(flying) - len(waited))
        return flying[-1]

    assert loops._queued(call, waited.append, 0.0) > 0
    # the oldest is waited for, and all of them in the end
    assert most == loops.QUEUED and waited == flying == list(range(loops.MIN_RUNS))


@pytest.mark.parametrize(
    "found", [({"sm_clock_mhz": lambda: 1980.0, "power_w": lambda: 600.0}, ""), ({}, "NVML cannot be used")]
)
def test_peers_rows_carry_clocks_and_power_where_nvml_tells_them(monkeypatch, found):
    monkeypatch.setattr("vit_convert.engine.measure.monitor._open_quantities", lambda: found)
    row = importlib.import_module("loops").measure(
        lambda: time.sleep(2e-3), lambda handle: None, 1, seconds=0.2, warmup_seconds=0.0
    )
    assert {name: row.get(name) for name in found[0]} == {name: read() for name, read in found[0].items()} and row[
        "images_per_second"
    ] > 0


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
    assert (
        found["framework"] == "x" and found["rows"][1]["failed"] == "RuntimeError: no cuDNN" and len(found["rows"]) == 2
    )
    loops.Results(path, framework="another").add({"batch": 1}, lambda: work("three"))
    (row,) = json.loads(path.read_text())["rows"]
    assert calls[-1] == "three" and row["date"].startswith("20")  # measured otherwise: not to be mixed


def test_results_of_other_loops_or_another_driver_are_dropped(tmp_path, monkeypatch):
    loops, path = importlib.import_module("loops"), tmp_path / "rows.json"
    about = {"framework": "x", "image_size": [224, 224]}

    def rows():
        results = loops.Results(path, **about)
        known = len(results.rows)
        results.add({"batch": 1}, dict)
        return known

    assert (rows(), rows()) == (0, 1)
    gpu = loops.cuda.Gpu("NVIDIA H200", "sm90", 1, "580.1", "13.0")
    monkeypatch.setattr(loops.cuda, "gpu", lambda: gpu)
    assert (rows(), rows()) == (0, 1)
    monkeypatch.setattr(loops, "QUEUED", 3)
    assert (rows(), rows()) == (0, 1)


def engine_row(batch, streams, rate, p50, transfers=RESIDENT):
    row = {
        "precision": "fp16",
        "batch": batch,
        "streams": streams,
        "transfers": transfers,
        "images_per_second": rate,
        "p50_ms": p50,
    }
    return {**row, "noise_percent": 0.4}


def test_table_sets_one_stream_beside_the_best_of_each_peer():
    side_by_side = importlib.import_module("side_by_side")
    ours = [
        engine_row(1, 1, 1500.0, 0.6),
        engine_row(1, 2, 2000.0, 0.9),
        engine_row(256, 1, 10000.0, 25.0),
        engine_row(256, 2, 12000.0, 42.0),
    ]
    ours.append(engine_row(256, 2, 9000.0, 1.0, transfers=END_TO_END))
    jax = [
        {"precision": "fp32", "attention": "plain", "batch": 256, "images_per_second": 4000.0, "p50_ms": 60.0},
        {"precision": "bf16", "attention": "plain", "batch": 256, "images_per_second": 4800.0, "p50_ms": 55.0},
        {"precision": "bf16", "attention": "cudnn", "batch": 256, "failed": "x"},
    ]
    torch = [
        {"precision": "fp16", "mode": "m", "batch": 1, "images_per_second": 1.0, "p50_ms": 0.9, "noise_percent": 1.5}
    ]
    model = {
        "variant": "B/16",
        "image_size": 224,
        "engine": {"rows": ours},
        "jax": {"rows": jax},
        "torch": {"rows": torch},
    }
    one, many = side_by_side.table({"models": {"b16": model}}).splitlines()[2:]
    assert one == "| B/16 at 224 | 1 | 0.600 ms | – | – | 0.900 ms | – | – | 1.50× | – | 1.5 |"
    peers = "4 000 images/s | 4 800 images/s (bf16, plain) | –"
    # one stream, as the peers
    assert many == f"| B/16 at 224 | 256 | 10 000 images/s | {peers} | 2.50× | 2.08× | – | 75 % | 0.4 |"
    assert len(side_by_side.table({"models": {"new": {"variant": "B/16", "image_size": 224}}}).splitlines()) == 2


def test_table_shows_what_is_missing_or_failed_as_a_dash():
    side_by_side = importlib.import_module("side_by_side")
    failed = {"precision": "bf16", "attention": "cudnn", "batch": 64, "failed": "x"}
    model = {"variant": "B/16", "image_size": 224, "jax": {"rows": [failed]}}
    assert side_by_side.table({"models": {"b16": model}}).splitlines()[2:] == [
        "| B/16 at 224 | 64 | – | – | – | – | – | – | – | – |  |"
    ]
    model["engine"] = {"rows": [engine_row(64, 1, 9000.0, 7.0)]}
    (row,) = side_by_side.table({"models": {"b16": model}}).splitlines()[2:]
    assert row == "| B/16 at 224 | 64 | 9 000 images/s | – | – | – | – | – | – | – | 0.4 |"


def test_runs_merge_to_the_newest_of_each_model_and_batch():
    side_by_side = importlib.import_module("side_by_side")

    def run(date, variant, rates, jax=1000.0):
        rows = [engine_row(batch, 1, rate, 1.0) for batch, rate in rates.items()]
        peer = [
            {"precision": "fp32", "attention": "plain", "batch": batch, "images_per_second": jax, "p50_ms": 1.0}
            for batch in rates
        ]
        return {
            "date": date,
            "models": {"m": {"variant": variant, "image_size": 224, "engine": {"rows": rows}, "jax": {"rows": peer}}},
        }

    runs = {
        "slow": run("2026-01-02", "L/16", {64: 2000.0}),
        "new": run("2026-01-03", "B/16", {256: 9000.0}),
        "old": run("2026-01-01", "B/16", {64: 8000.0, 256: 7000.0}, jax=500.0),
        "older": run("2026-01-01", "L/16", {64: 1.0}),
        "other": {"rows": []},
    }
    merged, names = side_by_side.merge(runs)
    assert names == ["new", "old", "slow"]
    cells = [line.split(" | ") for line in side_by_side.table(merged).splitlines()[2:]]
    assert [[row[0], row[1], row[2], row[6]] for row in cells] == [
        ["| B/16 at 224", "64", "8 000 images/s", "16.00×"],  # one run's engine is compared with that run's JAX
        ["| B/16 at 224", "256", "9 000 images/s", "9.00×"],
        ["| L/16 at 224", "64", "2 000 images/s", "2.00×"],
    ]


@pytest.mark.slow
def test_jax_peer_finds_in_the_cache_what_compile_only_left(tmp_path):
    pytest.importorskip("jax")
    random = importlib.import_module("vit_convert.families.random")
    random.write_random_checkpoint(tmp_path / "ti.npz", "Ti/16", image_size=(32, 32))
    cache = tmp_path / "cache"
    thresholds = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}
    environment = {**ENVIRONMENT, "JAX_COMPILATION_CACHE_DIR": str(cache), **thresholds}
    command = [
        sys.executable,
        str(FOLDER / "jax_peer.py"),
        f"--checkpoint={tmp_path / 'ti.npz'}",
        "--batches=1",
        "--image_size=32",
    ]
    compiled, timed = peer_runs(command, environment, cache, tmp_path)
    # no cuDNN here
    assert [row["first_call_seconds"] > 0 for row in compiled[:2]] == [True, True] and "failed" in compiled[2]
    assert [row["images_per_second"] > 0 for row in timed[:2]] == [True, True] and "failed" in timed[2]


def test_jax_peer_has_the_module_of_every_family_that_is_timed():
    pytest.importorskip("jax")
    flax_modules = importlib.import_module("flax_modules")
    registry = importlib.import_module("vit_convert.families.registry")
    assert set(flax_modules.MODULES) == {family.name for family in registry.FAMILIES} - {"lit", "vlm", "tips"}


def test_torch_peer_knows_the_name_of_every_published_classifier(torchvision_operators):
    pytest.importorskip("torch", reason="PyTorch is not installed")
    timm = pytest.importorskip("timm", reason="timm is not installed")
    timm_models = importlib.import_module("timm_models")
    registry = importlib.import_module("vit_convert.families.registry")
    known = set(timm.list_models())
    variants = [
        name for family in registry.FAMILIES if family.name in ("hybrid", "mixer", "swin") for name in family.variants
    ]
    variants += ["Ti/16", "S/16", "S/32", "B/32", "B/16", "L/16", "H/14"]
    # timm has no Mixer of patches of 8
    assert [name for name in variants if timm_models.timm_name(name) not in known] == ["Mixer-S/8"]


@pytest.mark.slow
def test_torch_peer_finds_in_the_cache_what_compile_only_left(tmp_path):
    pytest.importorskip("torch", reason="PyTorch is not installed")
    cache, start = tmp_path / "cache", tmp_path / "start.py"
    start.write_text(WITHOUT_TORCHVISION)
    environment = {**ENVIRONMENT, "TORCHINDUCTOR_CACHE_DIR": str(cache)}
    if subprocess.run([sys.executable, str(start), "-"], capture_output=True).returncode:
        pytest.skip("timm is not installed")
    command = [
        sys.executable,
        str(start),
        str(FOLDER / "torch_peer.py"),
        "--variant=Ti/16",
        "--batches=1",
        "--image_size=32",
    ]
    compiled, timed = peer_runs(command, environment, cache, tmp_path)
    assert compiled[0]["first_calls_seconds"] > 0 and timed[0]["images_per_second"] > 0


def peer_runs(command, environment, cache, folder):
    """Rows of a run with --compile_only and of a timed one, which must add nothing to the cache."""
    rows, files = [], []
    for name, more in {"compile": ["--compile_only"], "time": ["--seconds=0.05", "--warmup=0"]}.items():
        words = [*command, f"--output={folder / name}.json", *more]
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        rows.append(json.loads((folder / f"{name}.json").read_text())["rows"])
        files.append({path for path in cache.rglob("*") if path.is_file()})
    assert files[0] and files[1] == files[0]
    return rows


# timm imports torchvision, whose operators only builds for CUDA bring; a ViT calls none of them. Arguments: a script
# and its own.
WITHOUT_TORCHVISION = """
import pathlib, runpy, sys
import torch
library = torch.library.Library("torchvision", "FRAGMENT")
for name in ("nms", "qnms", "roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool", "deform_conv2d"):
    for operator in (name, f"_{name}_backward"):
        if not hasattr(torch.ops.torchvision, operator):
            library.define(f"{operator}(Tensor x) -> Tensor")
import timm
del sys.argv[0]
if sys.argv[0] != "-":
    sys.path.insert(0, str(pathlib.Path(sys.argv[0]).parent))
    runpy.run_path(sys.argv[0], run_name="__main__")
"""
