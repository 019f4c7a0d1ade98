"""The scripts of benchmarks/gpu, as far as they go without a GPU: loops, table, steps that fail alone and resume, caches of the peers."""

import dataclasses
import importlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from vit_convert.engine.benchmark import END_TO_END, RESIDENT

FOLDER = pathlib.Path(__file__).parents[2] / "benchmarks" / "gpu"
# What is timed runs as JAX does by default, not as strictly as the tests.
ENVIRONMENT = {**os.environ, "JAX_NUMPY_DTYPE_PROMOTION": "standard", "JAX_DEFAULT_MATMUL_PRECISION": "default"}


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))


def test_loops_time_what_runs():
    loops = importlib.import_module("loops")
    # Each call takes 2 ms; sleeping overshoots on a busy machine, never undershoots.
    found = loops.measure(lambda: time.sleep(2e-3), lambda handle: None, batch=8, seconds=0.1, warmup_seconds=0.0)
    assert 8 / 20e-3 < found["images_per_second"] <= 8 / 2e-3
    assert 2 <= found["p50_ms"] <= found["p95_ms"] <= found["p99_ms"] and found["runs"] >= 2 * loops.MIN_RUNS


def test_loops_are_those_of_our_engines():
    loops = importlib.import_module("loops")
    most, flying, waited = 0, [], []

    def call():
        nonlocal most
        flying.append(len(flying))
        most = max(most, len(flying) - len(waited))
        return flying[-1]

    assert loops._queued(call, waited.append, 0.0) > 0
    assert most == loops.QUEUED and waited == flying == list(range(loops.MIN_RUNS))  # the oldest is waited for, and all of them in the end


@pytest.mark.parametrize("found", [({"sm_clock_mhz": lambda: 1980.0, "power_w": lambda: 600.0}, ""), ({}, "NVML cannot be used")])
def test_peers_rows_carry_clocks_and_power_where_nvml_tells_them(monkeypatch, found):
    monkeypatch.setattr("vit_convert.engine.monitor._open_quantities", lambda: found)
    row = importlib.import_module("loops").measure(lambda: time.sleep(2e-3), lambda handle: None, 1, seconds=0.2, warmup_seconds=0.0)
    assert {name: row.get(name) for name in found[0]} == {name: read() for name, read in found[0].items()} and row["images_per_second"] > 0


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
    ours.append(engine_row(256, 2, 9000.0, 1.0, transfers=END_TO_END))
    jax = [
        {"precision": "fp32", "attention": "plain", "batch": 256, "images_per_second": 4000.0, "p50_ms": 60.0},
        {"precision": "bf16", "attention": "plain", "batch": 256, "images_per_second": 4800.0, "p50_ms": 55.0},
        {"precision": "bf16", "attention": "cudnn", "batch": 256, "failed": "x"},
    ]
    torch = [{"precision": "fp16", "mode": "m", "batch": 1, "images_per_second": 1.0, "p50_ms": 0.9, "noise_percent": 1.5}]
    model = {"variant": "B/16", "image_size": 224, "engine": {"rows": ours}, "jax": {"rows": jax}, "torch": {"rows": torch}}
    one, many = side_by_side.table({"models": {"b16": model}}).splitlines()[2:]
    assert one == "| B/16 at 224 | 1 | 0.600 ms | – | – | 0.900 ms | – | – | 1.50× | – | 1.5 |"
    peers = "4 000 images/s | 4 800 images/s (bf16, plain) | –"
    assert many == f"| B/16 at 224 | 256 | 12 000 images/s | {peers} | 3.00× | 2.50× | – | 75 % | 0.4 |"
    assert len(side_by_side.table({"models": {"new": {"variant": "B/16", "image_size": 224}}}).splitlines()) == 2


def test_table_shows_what_is_missing_or_failed_as_a_dash():
    side_by_side = importlib.import_module("side_by_side")
    failed = {"precision": "bf16", "attention": "cudnn", "batch": 64, "failed": "x"}
    model = {"variant": "B/16", "image_size": 224, "jax": {"rows": [failed]}}
    assert side_by_side.table({"models": {"b16": model}}).splitlines()[2:] == ["| B/16 at 224 | 64 | – | – | – | – | – | – | – | – |  |"]
    model["engine"] = {"rows": [engine_row(64, 1, 9000.0, 7.0)]}
    (row,) = side_by_side.table({"models": {"b16": model}}).splitlines()[2:]
    assert row == "| B/16 at 224 | 64 | 9 000 images/s | – | – | – | – | – | – | – | 0.4 |"


def test_runs_merge_to_the_newest_of_each_model_and_batch():
    side_by_side = importlib.import_module("side_by_side")

    def run(date, variant, rates, jax=1000.0):
        rows = [engine_row(batch, 1, rate, 1.0) for batch, rate in rates.items()]
        peer = [{"precision": "fp32", "attention": "plain", "batch": batch, "images_per_second": jax, "p50_ms": 1.0} for batch in rates]
        return {"date": date, "models": {"m": {"variant": variant, "image_size": 224, "engine": {"rows": rows}, "jax": {"rows": peer}}}}

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


@pytest.fixture
def runner(tmp_path):
    """Makes runners that go on where the last one ended."""
    steps = importlib.import_module("steps")
    return lambda stop_after=60.0, limit=60.0: steps.Runner(tmp_path, stop_after=stop_after, limit=limit, changed=lambda state: None)


@pytest.fixture
def shell(tmp_path):
    """Makes a step of a shell script that runs in tmp_path."""
    steps = importlib.import_module("steps")
    return lambda key, lane, script, after=(), behind=(): steps.Step(key, ["sh", "-c", f"cd {tmp_path} && {script}"], lane, after, behind)


def wait_for(name):
    """A script that ends when a file is there, and fails if none comes."""
    return f"for i in $(seq 200); do [ -e {name} ] && exit 0; sleep 0.1; done; exit 1"


ALONE = "mkdir busy && sleep 0.2 && rmdir busy"  # fails where another step does the same at the same time


def test_lanes_run_side_by_side_and_wait_for_what_comes_first(runner, shell):
    run = runner()
    # Each lane's first step ends only when the other's has begun; each second step fails if its lane, or the step it names, is not done.
    steps = [
        shell("m/a1", "a", f"touch a1; {wait_for('b1')}"),
        shell("m/b1", "b", f"touch b1; {wait_for('a1')}"),
        shell("m/a2", "a", "sleep 0.3; touch a2"),
        shell("m/b2", "b", "test -e a2", after=["m/a2", "m/not_asked_for"]),
    ]
    run.run(steps, {"a": 1, "b": 1})
    assert {key: row["status"] for key, row in run.state.items()} == dict.fromkeys(["m/a1", "m/b1", "m/a2", "m/b2"], "done")


def test_lane_of_one_worker_runs_alone(runner, shell):
    run = runner()
    run.run([shell(f"m{i}/build", "build", ALONE) for i in range(3)], {"build": 1})
    assert run.count("done") == 3
    run.run([shell(f"m{i}/both", "both", ALONE) for i in range(2)], {"both": 2})  # the check can fail
    assert run.count("failed") == 1


def test_phases_of_one_gpu_follow_each_other_and_those_of_another_go_on(runner, shell):
    h200, run = importlib.import_module("h200"), runner()
    slow = f"touch slow; ({wait_for('other')}) && rm slow"  # ends only when the other GPU's models are measured
    scripts = {"0": {"export": slow, "build": "exit 1", "jax": "test ! -e slow"}, "1": {"export": "true", "jax": "touch other"}}
    steps = [
        dataclasses.replace(shell(f"m{gpu}/{name}", f"{name}{gpu}", script), environment={"CUDA_VISIBLE_DEVICES": gpu})
        for gpu, own in scripts.items()
        for name, script in own.items()
    ]
    phased = h200.in_phases(steps, "all")
    assert [step.key for step in phased] == ["m0/export", "m0/build", "m1/export", "m0/jax", "m1/jax"]
    assert [step.name for step in h200.in_phases(steps, "measure")] == ["jax", "jax"]
    run.run(phased, {step.lane: 1 for step in steps})
    assert {key for key, row in run.state.items() if row["status"] == "failed"} == {"m0/build"}  # it ended, and what is measured goes on


def test_failed_step_stops_what_needs_it_and_nothing_else(runner, shell):
    run = runner()
    steps = [
        shell("m/export", "a", "echo no memory; exit 3"),
        shell("m/build", "b", "touch built", after=["m/export"]),
        shell("n/export", "a", "true"),
        shell("n/build", "b", "true", after=["n/export"]),
        importlib.import_module("steps").Step("m/none", ["/no/such/program"], "b"),
    ]
    run.run(steps, {"a": 1, "b": 1})
    assert {key: row["status"] for key, row in run.state.items() if key[0] == "n"} == {"n/export": "done", "n/build": "done"}
    assert run.state["m/export"]["tail"] == ["no memory"] and run.state["m/build"]["tail"] == ["not run: m/export failed"]
    assert "No such file" in run.state["m/none"]["tail"][0] and run.count("failed") == 3


def test_steps_resume(runner, shell, tmp_path):
    steps = [shell("m/a", "a", "echo a >> ran"), shell("m/b", "a", "echo b >> ran; test -e fixed", after=["m/a"])]
    for _ in range(2):
        runner().run(steps, {"a": 1})
        (tmp_path / "fixed").touch()
    last = runner()
    last.run(steps, {"a": 1})
    assert (tmp_path / "ran").read_text().split() == ["a", "b", "b"] and last.count("done") == 2
    runner().run([shell("m/a", "a", "echo other >> ran")], {"a": 1})
    assert (tmp_path / "ran").read_text().split()[-1] == "other"  # another command is another step


def test_step_runs_again_after_one_that_it_needs(runner, shell, tmp_path):
    def ran(export, *left_out, **limits):
        (tmp_path / "ran").write_text("")
        steps = [shell("m/export", "a", f"echo export >> ran; {export}")]
        steps += [
            shell(f"m/{name}", "b", f"echo {name} >> ran", after=[f"m/{after}"]) for name, after in (("build", "export"), ("run", "build"))
        ]
        steps.append(shell("m/peer", "b", "echo peer >> ran"))
        run = runner(**limits)
        run.run([step for step in steps if step.name not in left_out], {"a": 1, "b": 1})
        return (tmp_path / "ran").read_text().split(), run

    assert sorted(ran("true")[0]) == ["build", "export", "peer", "run"]
    assert ran("true")[0] == []
    assert ran("echo other")[0] == ["export", "build", "run"]  # not the peer, which needs nothing of it
    assert ran("echo third", "build", "run")[0] == ["export"]
    assert ran("echo third", "run")[0] == ["build"]  # what came before it ran in another call
    assert ran("echo third", "export", "build")[0] == ["run"]
    words, run = ran("exit 1")
    assert words == ["export"] and run.count("failed") == 3 and run.count("done") == 1  # no old engine passes for that of this export
    words, run = ran("echo third", stop_after=-1.0)
    assert words == [] and run.count("left") == 3


def test_engines_that_an_export_has_overtaken_are_not_reported(side_by_side_run, tmp_path):
    script = tmp_path / "python"  # a step of the engine writes what it was given
    script.write_text(f'#!/bin/sh\ntest ! -e {tmp_path}/broken || exit 1\necho \'{{"rows": [], "words": "\'$3\'"}}\' > $4/benchmark.json\n')
    script.chmod(0o755)

    def engine(*more):
        process = side_by_side_run("--steps=checkpoint,export,build,benchmark", f"--trt_python={script}", *more)
        text, _ = process.communicate(timeout=300)
        assert process.returncode == 0, text
        return json.loads((tmp_path / "out.json").read_text())["models"]["mu16-64"].get("engine")

    assert engine() == {"rows": [], "words": "benchmark"}
    (tmp_path / "broken").touch()
    assert engine("--input=uint8") is None
    assert (tmp_path / "mu16-64" / "benchmark.json").exists()
    (tmp_path / "broken").unlink()
    assert engine("--input=uint8") == {"rows": [], "words": "benchmark"}


def test_unknown_lane_is_answered_with_those_there_are(side_by_side_run):
    text, _ = side_by_side_run("--lanes=verify=2").communicate(timeout=60)
    assert "verify: steps are" in text and "lanes are checkpoint, export, build, jax_compile, torch_compile" in text


def test_steps_end_in_time_with_all_that_they_started(runner, shell, tmp_path):
    run, started = runner(limit=1.0), time.monotonic()
    background = "(sleep 2.5; touch {}) &"
    steps = [
        shell("m/quick", "a", f"{background.format('late1')} true"),
        shell("m/slow", "a", f"{background.format('late2')} sleep 60"),
        shell("m/next", "b", "true", after=["m/slow"]),
    ]
    run.run(steps, {"a": 1, "b": 1})
    assert time.monotonic() - started < 10 and run.count("left") == 2 and run.count("done") == 1
    assert run.state["m/slow"]["status"] == "left" and run.state["m/slow"]["tail"][-1].startswith("ended after")
    time.sleep(max(0.0, started + 4.5 - time.monotonic()))
    assert not (tmp_path / "late1").exists() and not (tmp_path / "late2").exists()


def test_step_that_would_not_end_in_time_does_not_start(runner, shell, tmp_path):
    (tmp_path / "steps.json").write_text(json.dumps({"m/build": {"command": "x", "status": "done", "seconds": 50.0, "tail": []}}))
    step = shell("n/build", "a", "touch built")
    run = runner(limit=40.0)
    run.run([step], {"a": 1})
    assert run.count("left") == 1 and not (tmp_path / "built").exists()
    runner(limit=60.0).run([step], {"a": 1})
    assert (tmp_path / "built").exists()


@pytest.fixture
def side_by_side_run(tmp_path):
    """Runs h200.py on the CPU, without TensorRT."""
    words = ["--models=mu/16@64", "--batches=1", "--seconds=0.05", "--warmup=0", f"--workdir={tmp_path}"]

    def start(*more):
        command = [sys.executable, str(FOLDER / "h200.py"), *words, f"--output={tmp_path / 'out.json'}", *more]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT)

    return start


def test_side_by_side_run_records_failures_goes_on_and_resumes(side_by_side_run, tmp_path):
    # A Python without TensorRT: the engines' steps fail, those of JAX go on.
    def go(*more):
        process = side_by_side_run("--steps=checkpoint,build,jax_compile,verify,jax", *more)
        text, _ = process.communicate(timeout=120)
        assert process.returncode == 0, text
        return text

    first = go("--phase=prepare")
    found = json.loads((tmp_path / "out.json").read_text())
    status = {name.partition("/")[2]: step["status"] for name, step in found["steps"].items()}
    assert status == {"checkpoint": "done", "build": "failed", "jax_compile": "done"}, first
    assert list((tmp_path / "caches" / "mu16-64" / "jax").iterdir()) and "jax" not in found["models"]["mu16-64"]
    second = go()
    assert "all steps were tried" in second and "] mu16-64/checkpoint" not in second and "] mu16-64/jax_compile" not in second
    found = json.loads((tmp_path / "out.json").read_text())
    status = {name.partition("/")[2]: step["status"] for name, step in found["steps"].items()}
    assert status == {"checkpoint": "done", "build": "failed", "jax_compile": "done", "verify": "failed", "jax": "done"}, second
    assert "not run: mu16-64/build failed" in second
    assert found["environment"]["jax"] and "--batches=1" in found["command"] and found["steps"]["mu16-64/jax"]["started"] == found["date"]
    rows = {(row["precision"], row["attention"]): row for row in found["models"]["mu16-64"]["jax"]["rows"]}
    assert rows["fp32", "plain"]["images_per_second"] > 0 and rows["bf16", "plain"]["p50_ms"] > 0
    assert "failed" in rows["bf16", "cudnn"]  # no GPU
    assert "| mu/16 at 64 | 1 | – |" in second and "| – | – | – |" in second
    third = go("--stop_after=-1")
    assert "2 steps are left" in third


def test_models_take_turns_on_gpus_and_are_alone_there(side_by_side_run, tmp_path):
    script = tmp_path / "python"
    script.write_text(
        f"""#!/bin/sh
        cd {tmp_path}; test "$3" = verify || exit 0
        mkdir lock-$CUDA_VISIBLE_DEVICES || exit 1  # another one measures on this GPU
        case $4 in *-64|*-96)  # the first of each GPU wait for each other
            for i in $(seq 100); do test -d lock-3 -a -d lock-5 && touch met; test -e met && break; sleep 0.1; done; test -e met || exit 1;;
        esac
        sleep 0.3; echo $CUDA_VISIBLE_DEVICES > $(basename $4).gpu; rmdir lock-$CUDA_VISIBLE_DEVICES
        """
    )
    script.chmod(0o755)
    models = "--models=mu/16@64,mu/16@96,mu/16@128,mu/16@160"
    process = side_by_side_run(models, "--steps=build,verify", f"--trt_python={script}", "--gpus=3,5")
    text, _ = process.communicate(timeout=60)
    assert "0 steps failed; all steps were tried" in text, text
    assert [(tmp_path / f"mu16-{size}.gpu").read_text().strip() for size in (64, 96, 128, 160)] == ["3", "5", "3", "5"]


def test_side_by_side_run_that_is_ended_ends_its_steps(side_by_side_run, tmp_path):
    script = tmp_path / "python"
    script.write_text(f"#!/bin/sh\ntouch {tmp_path}/started; sleep 3; touch {tmp_path}/late\n")
    script.chmod(0o755)
    process = side_by_side_run("--steps=build", f"--trt_python={script}")
    while not (tmp_path / "started").exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    time.sleep(4)
    assert not (tmp_path / "late").exists()


def test_jax_peer_finds_in_the_cache_what_compile_only_left(tmp_path):
    random = importlib.import_module("vit_convert.checkpoint.random")
    random.write_random_checkpoint(tmp_path / "ti.npz", "Ti/16", image_size=(32, 32))
    cache = tmp_path / "cache"
    thresholds = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}
    environment = {**ENVIRONMENT, "JAX_COMPILATION_CACHE_DIR": str(cache), **thresholds}
    command = [sys.executable, str(FOLDER / "jax_peer.py"), f"--checkpoint={tmp_path / 'ti.npz'}", "--batches=1", "--image_size=32"]
    compiled, timed = peer_runs(command, environment, cache, tmp_path)
    assert [row["first_call_seconds"] > 0 for row in compiled[:2]] == [True, True] and "failed" in compiled[2]  # no cuDNN here
    assert [row["images_per_second"] > 0 for row in timed[:2]] == [True, True] and "failed" in timed[2]


@pytest.mark.slow
def test_torch_peer_finds_in_the_cache_what_compile_only_left(tmp_path):
    pytest.importorskip("torch", reason="PyTorch is not installed")
    cache, start = tmp_path / "cache", tmp_path / "start.py"
    start.write_text(WITHOUT_TORCHVISION)
    environment = {**ENVIRONMENT, "TORCHINDUCTOR_CACHE_DIR": str(cache)}
    if subprocess.run([sys.executable, str(start), "-"], capture_output=True).returncode:
        pytest.skip("timm is not installed")
    command = [sys.executable, str(start), str(FOLDER / "torch_peer.py"), "--variant=Ti/16", "--batches=1", "--image_size=32"]
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


# timm imports torchvision, whose operators only builds for CUDA bring; a ViT calls none of them. Arguments: a script and its own.
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
