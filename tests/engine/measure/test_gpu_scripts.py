"""The side-by-side run of benchmarks/gpu, as far as it goes without a GPU: steps that fail alone, wait, resume and end
in time."""

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

if sys.version_info < (3, 11):
    pytest.skip("benchmarks/gpu run where JAX does, from Python 3.11 on", allow_module_level=True)

FOLDER = pathlib.Path(__file__).parents[3] / "benchmarks" / "gpu"
# What is timed runs as JAX does by default, not as strictly as the tests.
ENVIRONMENT = {**os.environ, "JAX_NUMPY_DTYPE_PROMOTION": "standard", "JAX_DEFAULT_MATMUL_PRECISION": "default"}


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))


@pytest.fixture
def runner(tmp_path):
    """Makes runners that go on where the last one ended."""
    steps = importlib.import_module("steps")
    return lambda stop_after=60.0, limit=60.0: steps.Runner(
        tmp_path, stop_after=stop_after, limit=limit, changed=lambda state: None
    )


@pytest.fixture
def shell(tmp_path):
    """Makes a step of a shell script that runs in tmp_path."""
    steps = importlib.import_module("steps")
    return lambda key, lane, script, after=(), behind=(): steps.Step(
        key, ["sh", "-c", f"cd {tmp_path} && {script}"], lane, after, behind
    )


def wait_for(name):
    """A script that ends when a file is there, and fails if none comes."""
    return f"for i in $(seq 200); do [ -e {name} ] && exit 0; sleep 0.1; done; exit 1"


ALONE = "mkdir busy && sleep 0.2 && rmdir busy"  # fails where another step does the same at the same time


def test_lanes_run_side_by_side_and_wait_for_what_comes_first(runner, shell):
    run = runner()
    # Each lane's first step ends only when the other's has begun; each second step fails if its lane, or the step it
    # names, is not done.
    steps = [
        shell("m/a1", "a", f"touch a1; {wait_for('b1')}"),
        shell("m/b1", "b", f"touch b1; {wait_for('a1')}"),
        shell("m/a2", "a", "sleep 0.3; touch a2"),
        shell("m/b2", "b", "test -e a2", after=["m/a2", "m/not_asked_for"]),
    ]
    run.run(steps, {"a": 1, "b": 1})
    assert {key: row["status"] for key, row in run.state.items()} == dict.fromkeys(
        ["m/a1", "m/b1", "m/a2", "m/b2"], "done"
    )


def test_lane_of_one_worker_runs_alone(runner, shell):
    run = runner()
    run.run([shell(f"m{i}/build", "build", ALONE) for i in range(3)], {"build": 1})
    assert run.count("done") == 3
    run.run([shell(f"m{i}/both", "both", ALONE) for i in range(2)], {"both": 2})  # the check can fail
    assert run.count("failed") == 1


def test_phases_of_one_gpu_follow_each_other_and_those_of_another_go_on(runner, shell):
    h200, run = importlib.import_module("h200"), runner()
    slow = f"touch slow; ({wait_for('other')}) && rm slow"  # ends only when the other GPU's models are measured
    scripts = {
        "0": {"export": slow, "build": "exit 1", "jax": "test ! -e slow"},
        "1": {"export": "true", "jax": "touch other"},
    }
    steps = [
        dataclasses.replace(shell(f"m{gpu}/{name}", f"{name}{gpu}", script), environment={"CUDA_VISIBLE_DEVICES": gpu})
        for gpu, own in scripts.items()
        for name, script in own.items()
    ]
    phased = h200.in_phases(steps, "all")
    assert [step.key for step in phased] == ["m0/export", "m0/build", "m1/export", "m0/jax", "m1/jax"]
    assert [step.name for step in h200.in_phases(steps, "measure")] == ["jax", "jax"]
    run.run(phased, {step.lane: 1 for step in steps})
    # it ended, and what is measured goes on
    assert {key for key, row in run.state.items() if row["status"] == "failed"} == {"m0/build"}


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
    assert {key: row["status"] for key, row in run.state.items() if key[0] == "n"} == {
        "n/export": "done",
        "n/build": "done",
    }
    assert run.state["m/export"]["tail"] == ["no memory"] and run.state["m/build"]["tail"] == [
        "not run: m/export failed"
    ]
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
            shell(f"m/{name}", "b", f"echo {name} >> ran", after=[f"m/{after}"])
            for name, after in (("build", "export"), ("run", "build"))
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
    # no old engine passes for that of this export
    assert words == ["export"] and run.count("failed") == 3 and run.count("done") == 1
    words, run = ran("echo third", stop_after=-1.0)
    assert words == [] and run.count("left") == 3


@pytest.mark.slow
def test_engines_that_an_export_has_overtaken_are_not_reported(side_by_side_run, tmp_path):
    script = tmp_path / "python"  # a step of the engine writes what it was given
    script.write_text(
        f'#!/bin/sh\ntest ! -e {tmp_path}/broken || exit 1\necho \'{{"rows": [], "words": "\'$3\'"}}\' > '
        "$4/benchmark.json\n"
    )
    script.chmod(0o755)

    def engine(*more):
        process = side_by_side_run("--steps=checkpoint,export,build,benchmark", f"--trt_python={script}", *more)
        text, _ = process.communicate(timeout=300)
        assert process.returncode == 0, text
        return json.loads((tmp_path / "out.json").read_text())["models"]["mu16-64"].get("engine")

    assert engine() == {"rows": [], "words": "benchmark"}
    (tmp_path / "broken").touch()
    assert engine("--input=uint8") is None
    # the export took away what was measured of other graphs
    assert not (tmp_path / "mu16-64" / "benchmark.json").exists()
    (tmp_path / "broken").unlink()
    assert engine("--input=uint8") == {"rows": [], "words": "benchmark"}


def test_unknown_lane_is_answered_with_those_there_are(side_by_side_run):
    text, _ = side_by_side_run("--lanes=verify=2").communicate(timeout=300)
    assert "verify: steps are" in text and "lanes are checkpoint, export, build, jax_compile, torch_compile" in text


@pytest.mark.slow
def test_steps_end_in_time_with_all_that_they_started(runner, shell, tmp_path):
    run = runner(limit=1.0)
    background = "(sleep 2.5; touch {}) &"
    steps = [
        shell("m/quick", "a", f"{background.format('late1')} true"),
        shell("m/slow", "a", f"{background.format('late2')} sleep 60; touch {tmp_path}/waited"),
        shell("m/next", "b", "true", after=["m/slow"]),
    ]
    run.run(steps, {"a": 1, "b": 1})
    assert run.count("left") == 2 and run.count("done") == 1 and not (tmp_path / "waited").exists()
    assert run.state["m/slow"]["status"] == "left" and run.state["m/slow"]["tail"][-1].startswith("ended after")
    time.sleep(4.5)  # what still ran would have touched its file by now
    assert not (tmp_path / "late1").exists() and not (tmp_path / "late2").exists()


def test_step_that_would_not_end_in_time_does_not_start(runner, shell, tmp_path):
    (tmp_path / "steps.json").write_text(
        json.dumps({"m/build": {"command": "x", "status": "done", "seconds": 50.0, "tail": []}})
    )
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


@pytest.mark.slow
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
    assert (
        "all steps were tried" in second
        and "] mu16-64/checkpoint" not in second
        and "] mu16-64/jax_compile" not in second
    )
    found = json.loads((tmp_path / "out.json").read_text())
    status = {name.partition("/")[2]: step["status"] for name, step in found["steps"].items()}
    assert status == {
        "checkpoint": "done",
        "build": "failed",
        "jax_compile": "done",
        "verify": "failed",
        "jax": "done",
    }, second
    assert "not run: mu16-64/build failed" in second
    assert (
        found["environment"]["jax"]
        and "--batches=1" in found["command"]
        and found["steps"]["mu16-64/jax"]["started"] == found["date"]
    )
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
            for i in $(seq 100); do test -d lock-3 -a -d lock-5 && touch met
                test -e met && break; sleep 0.1; done; test -e met || exit 1;;
        esac
        sleep 0.3; echo $CUDA_VISIBLE_DEVICES > $(basename $4).gpu; rmdir lock-$CUDA_VISIBLE_DEVICES
        """
    )
    script.chmod(0o755)
    models = "--models=mu/16@64,mu/16@96,mu/16@128,mu/16@160"
    process = side_by_side_run(models, "--steps=build,verify", f"--trt_python={script}", "--gpus=3,5")
    text, _ = process.communicate(timeout=300)
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
    process.communicate(timeout=300)
    assert process.returncode == 128 + signal.SIGTERM
    time.sleep(4)
    assert not (tmp_path / "late").exists()


@pytest.mark.parametrize("variant", ["CLIP-mu/16:img", "CLIP-mu/16:txt", "SigLIP-mu/16:img", "SigLIP-mu/16:txt"])
def test_commands_of_towers(tmp_path, variant):
    """Each tower of a pair is a model of its own, from its own file; texts have no image size."""
    pytest.importorskip("absl")
    code = (
        "import sys, json, pathlib; from absl import flags; import h200;"
        "flags.FLAGS(['h200', '--output=x.json']);"
        f"model = h200.Model.parse({variant + '@32'!r}, 'float32');"
        "print(json.dumps([model.name, h200.commands(model, pathlib.Path('/w'))]))"
    )
    environment = {**ENVIRONMENT, "PYTHONPATH": os.pathsep.join([str(FOLDER), ENVIRONMENT.get("PYTHONPATH", "")])}
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    name, commands = json.loads(found.stdout)
    whole, _, part = variant.partition(":")
    suffix = ".safetensors" if "CLIP" in variant else ".npz"
    assert name == f"{whole.replace('/', '').lower()}-{part}-32"
    assert f"--variant={whole}" in commands["checkpoint"] and "--image_size=32" in commands["checkpoint"]
    assert ("--layout=clip_openai" in commands["checkpoint"]) == ("CLIP" in variant)
    assert f"--config.checkpoint=/w/{name}{suffix}:{part}" in commands["export"]
    assert ("--config.image_size=32" in commands["export"]) == (part == "img")
    assert f"--checkpoint=/w/{name}{suffix}:{part}" in commands["jax"] and f"--variant={variant}" in commands["torch"]


@pytest.mark.slow  # transformers takes seconds to import
def test_torchs_towers(torchvision_operators):
    pytest.importorskip("transformers")
    torch, models = pytest.importorskip("torch"), importlib.import_module("tower_models")
    for variant, output, shape in (
        ("CLIP-mu/16:img", "image_embeds", (2, 20)),
        ("CLIP-mu/16:txt", "text_embeds", (2, 20)),
        ("SigLIP-mu/16:img", "pooler_output", (2, 32)),
        ("SigLIP-mu/16:txt", "pooler_output", (2, 32)),
    ):
        model, inputs = models.create(variant, 32)
        with torch.no_grad():
            assert model(inputs(2))[output].shape == shape, variant
    assert not models.is_tower("B/16")
