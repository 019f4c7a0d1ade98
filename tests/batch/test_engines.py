"""Engine tasks: what they run, how they end, and what is known of them afterwards. A shell script plays TensorRT."""

import contextlib
import csv
import json
import pathlib
import subprocess
import sys
import threading
import time

import pytest

from vit_convert.batch.__main__ import main
from vit_convert.batch.devices import Device
from vit_convert.batch.engines import COMMANDS, Cancelled, EngineSettings, Tasks, kept, words_of
from vit_convert.batch.estimate import Estimate
from vit_convert.batch.folder import BatchFolder
from vit_convert.batch.job import Job
from vit_convert.batch.lanes import LocalGpus
from vit_convert.batch.ledger import Ledger
from vit_convert.batch.mirror import Mirror
from vit_convert.batch.outcome import EngineOutcome, Outcome
from vit_convert.batch.record import BatchRecord
from vit_convert.batch.run import Settings
from vit_convert.batch.screen import Screen
from vit_convert.batch.told import Told
from vit_convert.core.bundle import Bundle
from vit_convert.core.lock import hold

GPU = Device("5", "L4")
PLAN = "engines/tensorrt-8.6.0-sm89/fp16.plan"
# $2 $3 are -m vit_convert.engine; the last folder among the arguments is the bundle.
BUILDS = """
for word; do [ -d "$word" ] && bundle=$word; done
echo "$CUDA_VISIBLE_DEVICES $CUDA_DEVICE_ORDER $*" >>"$(dirname "$0")/log"
mkdir -p "$bundle/engines/tensorrt-8.6.0-sm89" && echo plan >"$bundle/engines/tensorrt-8.6.0-sm89/fp16.plan"
echo '{"backend": "tensorrt", "tensorrt": "8.6.0", "arch": "sm89", "gpu": "NVIDIA L4", "status": "done",
 "rows": [{"images_per_second": 7.0}, {"images_per_second": 9.5}], "recommended": {"precision": "fp16"}}' \\
 >"$bundle/benchmark.json"
"""


@pytest.fixture
def python(tmp_path):
    """Makes a Python that does what a script says."""

    def make(script: str) -> str:
        path = tmp_path / "python"
        path.write_text(f"#!/bin/sh\n{script}")
        path.chmod(0o755)
        return str(path)

    return make


@pytest.fixture
def bundle(tmp_path):
    made = Bundle(tmp_path / "out" / "b")
    made.root.mkdir(parents=True)
    made.manifest.write_text("{}")
    return made


def run(tmp_path, python, commands=COMMANDS, **settings):
    return Tasks().run(str(tmp_path / "out"), "b", EngineSettings(commands, python, **settings), GPU)


def log(tmp_path):
    return (tmp_path / "log").read_text().splitlines()


def test_all_commands_are_one_process_that_sees_one_gpu(tmp_path, bundle, python):
    outcome = run(tmp_path, python(BUILDS), words=("--precision=fp16",))
    assert log(tmp_path) == [f"5 PCI_BUS_ID -m vit_convert.engine {bundle.root} --precision=fp16 --quiet"]
    assert (outcome.status, outcome.exit_code, outcome.gpu, outcome.device) == ("done", 0, "L4", "5")
    assert (outcome.gpu_name, outcome.recommended, outcome.images_per_second) == ("NVIDIA L4", "fp16", 9.5)
    beside = bundle.root / PLAN.replace("fp16.plan", "benchmark.json")
    assert beside.read_bytes() == bundle.benchmark.read_bytes()  # another GPU's will take the bundle's own


def test_some_commands_come_one_after_the_other(tmp_path, bundle, python):
    outcome = run(tmp_path, python(BUILDS), ("build", "verify"), force=True)
    said = [line.removeprefix("5 PCI_BUS_ID -m vit_convert.engine ") for line in log(tmp_path)]
    assert said == [f"build {bundle.root} --quiet --force", f"verify {bundle.root} --quiet"]
    assert outcome.images_per_second == 0.0  # a benchmark that lies there is not this task's


def test_what_failed_is_said_in_its_own_words(tmp_path, bundle, python):
    outcome = run(tmp_path, python("echo building; echo 'error: fp16.plan: no\n  Build it.' >&2; exit 7"))
    assert (outcome.status, outcome.exit_code, outcome.error, outcome.fix, outcome.passing) == (
        *("failed", 7, "fp16.plan: no", "Build it.", False),
    )


def test_the_first_that_fails_is_the_last(tmp_path, bundle, python):
    run(tmp_path, python(f"{BUILDS}\nexit 5"), ("verify", "benchmark"))
    assert len(log(tmp_path)) == 1


@pytest.mark.parametrize("script", ["kill -9 $$", "sh -c 'kill -9 $$'; exit $?", "exit 130"])
def test_what_was_killed_may_pass(tmp_path, bundle, python, script):
    outcome = run(tmp_path, python(script))
    assert (outcome.status, outcome.passing) == ("failed", True) and "signal" in outcome.error


def test_a_bundle_that_another_holds_may_pass(tmp_path, bundle, python):
    with hold(bundle, "the first"):
        outcome = run(tmp_path, python("exit 0"))
    assert outcome.passing and outcome.exit_code == 2 and "the first" in outcome.error


def test_a_python_that_is_missing(tmp_path, bundle):
    outcome = run(tmp_path, str(tmp_path / "gone"))
    assert (outcome.status, outcome.exit_code, outcome.passing) == ("failed", 2, False)
    assert "gone: No such file" in outcome.error and "--trt_python" in outcome.fix


def test_what_takes_too_long_is_ended(tmp_path, bundle, python):
    outcome = run(tmp_path, python("exec sleep 60"), timeout_s=0.3)
    assert (outcome.status, outcome.exit_code, outcome.passing) == ("timeout", 130, False)


def test_close_ends_the_process(tmp_path, bundle, python):
    tasks, ended = Tasks(), []
    settings = EngineSettings(COMMANDS, python('echo $$ >"$(dirname "$0")/pid"; exec sleep 60'))

    def work():
        try:
            tasks.run(str(tmp_path / "out"), "b", settings, GPU)
        except Cancelled:
            ended.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    deadline = time.monotonic() + 30
    while not ((tmp_path / "pid").exists() and (tmp_path / "pid").read_text().strip()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    tasks.close()
    thread.join(30)
    assert ended and not pathlib.Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}").exists()


def test_what_is_there_already_is_not_done_again(tmp_path, bundle, python):
    settings = EngineSettings(COMMANDS, python(BUILDS))
    outcome = Tasks().run(str(tmp_path / "out"), "b", settings, GPU)
    again = kept(bundle, settings, "L4")
    assert again is not None and (again.status, again.seconds) == ("fresh", outcome.seconds)
    assert kept(bundle, settings, "T4") is None
    assert kept(bundle, EngineSettings(("build",), settings.python), "L4") is None
    assert kept(bundle, EngineSettings(COMMANDS, settings.python, ("--precision=int8",)), "L4") is None
    assert kept(bundle, EngineSettings(COMMANDS, settings.python, force=True), "L4") is None


def test_a_lost_engine_and_another_conversion_make_it_stale(tmp_path, bundle, python):
    settings = EngineSettings(COMMANDS, python(BUILDS))
    Tasks().run(str(tmp_path / "out"), "b", settings, GPU)
    (bundle.root / PLAN).unlink()
    assert kept(bundle, settings, "L4") is None
    Tasks().run(str(tmp_path / "out"), "b", settings, GPU)
    record = {"path": "model.onnx", "bytes": 1, "sha256": "00", "stat": [1, 2, 3]}
    stage = {"name": "export", "status": "done", "files": [record]}
    bundle.manifest.write_text(json.dumps({"stages": [stage]}))
    assert kept(bundle, settings, "L4") is None


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("a\nerror: one\ntwo\n  Do this.\n", ("one\ntwo", "Do this.")),
        ("error: one", ("one", "")),
        ("Traceback\nKeyError: 3\n", ("KeyError: 3", "")),
        ("", ("", "")),
    ],
)
def test_words(said, words):
    assert words_of(said) == words


def test_a_job_is_what_its_engines_are():
    fine, bad = EngineOutcome("A", status="done", exit_code=0), EngineOutcome("B", error="no", fix="so", exit_code=7)
    job = Outcome("a", status="fresh", exit_code=0)
    assert job.with_engines([fine]).status == "done" and job.with_engines([]).status == "fresh"
    failed = job.with_engines([fine, bad])
    assert (failed.status, failed.exit_code, failed.error, failed.fix) == ("failed", 7, "engines for B: no", "so")
    assert Outcome.from_dict(json.loads(json.dumps(failed.to_dict()))).engines == (fine, bad)


QUICK = ("--config.precision=fp32", "--config.check.num_images=2", "--quiet", "--jobs=1", "--nopage")


def batch(*words):
    return main(["vit_convert.batch", *map(str, words)])


@pytest.mark.slow
def test_a_batch_with_engines_on_two_types(tmp_path, checkpoints, python):
    """Conversions build nothing themselves; engines that failed are named, tried again by --only_failed, then fresh."""
    fails = 'case "$CUDA_VISIBLE_DEVICES$*" in 1*mu1*) echo "error: no" >&2; exit 8;; esac'
    words = [f"--checkpoints={path}" for path in checkpoints[:2]]
    words += [*QUICK, f"--workdir={tmp_path / 'out'}", "--engines=build,verify,benchmark", "--gpus=0:A,1:B"]
    words.append(f"--trt_python={python(fails + BUILDS)}")
    assert batch(*words) == 9

    def jobs():
        assert BatchRecord.problems(json.loads((tmp_path / "out" / "batch.json").read_text())) == []
        found = BatchRecord.read(tmp_path / "out" / "batch.json")
        return {job.name: job for job in found.jobs}

    found = jobs()
    assert (found["mu0"].status, found["mu1"].status, found["mu1"].exit_code) == ("done", "failed", 8)
    assert found["mu1"].error == "engines for B: no" and {row.gpu for row in found["mu0"].engines} == {"A", "B"}
    rows = list(csv.DictReader((tmp_path / "out" / "batch.csv").open()))
    assert (rows[0]["A_recommended"], rows[0]["B_images_per_second"]) == ("fp16", "9.5")
    assert (rows[1]["A_status"], rows[1]["B_status"]) == ("done", "failed")
    assert json.loads((tmp_path / "out" / "mu0" / "config.json").read_text())["engine"]["backend"] == "none"
    assert len(log(tmp_path)) == 3
    python(BUILDS)
    assert batch(*words, "--only_failed") == 0 and len(log(tmp_path)) == 4
    assert batch(*words) == 0 and len(log(tmp_path)) == 4
    assert {job.status for job in jobs().values()} == {"fresh"}
    kinds = [json.loads(line)["event"] for line in (tmp_path / "out" / "batch.events.jsonl").read_text().splitlines()]
    assert kinds.count("engines_start") == kinds.count("engines_end") == 5


def test_engines_that_fail_stop_the_batch_where_that_is_asked(tmp_path, monkeypatch):
    """A runner that converts nothing stands for the conversions: it is told, and no further engines begin."""

    class Runner:
        stopped = False

        def gpus(self):
            return LocalGpus(str(tmp_path), EngineSettings(("build",), "/bin/false"), [Device("0", "A")])

        def stop(self):
            self.stopped = True

    runner, jobs = Runner(), [Job("a"), Job("b")]
    folder = BatchFolder(str(tmp_path))
    ledger = Ledger(folder, jobs, "x", {}, Mirror(folder, None))
    estimates = {job.name: Estimate((1, "fp16"), 1, 1.0, 1.0, True) for job in jobs}
    with Screen(estimates, quiet=True) as screen:
        told = Told(ledger, screen, {}, fail_fast=True)
        settings = Settings(str(tmp_path), engines=EngineSettings(("build",), "/bin/false"))
        with contextlib.closing(told.begin_engines(runner, settings, 0)):
            for job in jobs:
                (tmp_path / job.name).mkdir()
                told.ended(None, Outcome(job.name, status="done", exit_code=0))
            told.wait()
    assert runner.stopped and [job.status for job in ledger.outcomes] == ["failed", "pending"]
    assert ledger.outcomes[0].exit_code == 1 and ledger.outcomes[0].error.startswith("engines for A: ")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--engines=bild", "--gpus=0"], "Did you mean build"),
        (["--gpus=0"], "belong to --engines"),
        (["--engines=build", "--gpus=0", "--until=export"], "engines follow on whole conversions"),
        (["--engines=build", "--gpus=x"], "names no GPU"),
        (["--engines=build", "--gpus=0", "--engine_flags='"], "No closing quotation"),
        (["--engines=build", "--gpus=0", "--trt_python=/gone/python"], "/gone/python: no such program"),
    ],
)
def test_mistakes_are_exit_2_before_any_work(tmp_path, checkpoints, capsys, words, said):
    assert batch(f"--checkpoints={checkpoints[0]}", f"--workdir={tmp_path / 'out'}", *words) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


PARENT = """
import sys
from vit_convert.batch.engines import COMMANDS, Device, EngineSettings, Tasks
Tasks().run(sys.argv[1], "b", EngineSettings(COMMANDS, sys.argv[2]), Device("0"))
"""


def test_a_task_ends_with_our_process_however_that_ends(tmp_path, bundle, python):
    script = python('echo $$ >"$(dirname "$0")/pid"; exec sleep 60')
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path / "out"), script])
    deadline = time.monotonic() + 60
    while not ((tmp_path / "pid").exists() and (tmp_path / "pid").read_text().strip()):
        assert time.monotonic() < deadline and parent.poll() is None
        time.sleep(0.01)
    parent.kill()
    parent.wait()
    stat = pathlib.Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}/stat")
    with contextlib.suppress(OSError):  # it is gone
        while stat.read_text().split()[2] != "Z":
            assert time.monotonic() < deadline
            time.sleep(0.01)
