"""`tune`: which engines it tries, what it keeps of them, and how its winners are got; building is simulated."""

import shlex

import pytest
import simulated_gpu

from vit_convert.bundle import Bundle, read_json
from vit_convert.engine import __main__ as command
from vit_convert.engine.facts import read_config, read_facts
from vit_convert.engine.requests import request_for
from vit_convert.engine.tune import plan_trials
from vit_convert.engine.winners import config_words, tune_table, winners
from vit_convert.errors import BuildError, UsageError


def run(bundle_path, *words):
    fixed = ("--precision=fp16", "--batches=1,4", "--duration=0.02", "--warmup=0", "--quiet")
    return command.main(["engine", "tune", str(bundle_path), *fixed, *words])


@pytest.fixture
def built(gpu, monkeypatch):
    """The graph of every engine that was built; the spelling cannot be built for batch 4 alone."""
    found = []

    def build_one(backend, request, plan, *, progress):
        found.append(request.onnx_path.name)
        if found[-1] == "matmul.onnx" and request.profiles[0]["images"][0][0] == 4:
            raise BuildError("matmul.onnx: node x: not supported")
        ranges = [tuple(profile["images"]) for profile in request.profiles]
        simulated_gpu.write_plan(plan, request.onnx_path, ranges, precision=request.precision)
        return {"build_seconds": 1.0, "fused_attention": {"text": "yes, fp16, 1 of 1"}}

    monkeypatch.setattr(command, "load_backend", lambda name: gpu[0])
    monkeypatch.setattr("vit_convert.engine.tune.build_one", build_one)  # building takes a GPU; what tune does around it does not
    return found


def test_measures_keeps_and_chooses(capsys, bundle_path, built):
    assert run(bundle_path) == 0
    text = capsys.readouterr().out
    assert "failed: matmul.onnx: node x" in text and "fastest" in text
    assert built == [graph for graph in ("model.onnx", "matmul.onnx") for _ in ("fixed 1", "fixed 4", "range")]
    found = read_json(bundle_path / "tune.json")
    assert [row["batch"] for row in found["winners"]] == [1, 4]
    assert all(f"fp16 at batch {row['batch']}: {config_words(row)}" in text for row in found["winners"])
    passed = [trial for trial in found["trials"] if "failed" not in trial]
    assert all(trial["passed"] for trial in passed)
    assert len({trial["plan"] for trial in passed}) == 5  # one trial's engine does not replace another's
    assert run(bundle_path) == 0 and len(built) == 6 + 1  # what was measured is kept, what failed is tried again
    assert read_json(bundle_path / "tune.json")["winners"] == found["winners"]
    assert run(bundle_path, "--force") == 0 and len(built) == 6 + 1 + 6


def test_spelling_that_is_not_there(capsys, bundle_path, built):
    assert run(bundle_path, "--config.spellings=primitives") == UsageError.exit_code
    assert "config.spellings: primitives: there is no " in capsys.readouterr().err
    assert built == []
    assert run(bundle_path, "--config.spellings=()") == 0
    assert set(built) == {"model.onnx"}


@pytest.mark.parametrize(
    ("precision", "expected"),
    [
        ("fp16", {"default", "matmul"}),
        ("int8", {"default"}),  # it has a graph of its own
        ("fp32", {"default"}),  # some spellings compute in fp16 alone
    ],
)
def test_spellings_are_tried_in_fp16(converted, precision, expected):
    bundle = Bundle(converted)
    config = read_config(bundle)
    config.engine.spelling = "matmul"  # what engines are built from so far changes nothing
    trials = plan_trials(bundle, config, read_facts(bundle), precisions=[precision])
    assert {trial.spelling for trial in trials} == expected
    assert {trial.spelling: trial.request.onnx_path for trial in trials}.get("matmul") in (None, bundle.spelling("matmul"))


def test_trials_skip_sizes_outside_the_range(converted):
    bundle = Bundle(converted)
    config = read_config(bundle)
    config.benchmark.batches, config.spellings = (4, 16), ()
    trials = plan_trials(bundle, config, read_facts(bundle), precisions=["fp32"])
    assert [(trial.profile, trial.batches) for trial in trials] == [("fixed 4", (4,)), ("fixed 16", (16,)), ("range 1-4-8", (4,))]


def trial(spelling, rate, *, profile="fixed 8", passed=True):
    rows = [{"batch": 8, "images_per_second": rate, "noise_percent": 0.5}]
    names = {"spelling": spelling, "profile": profile, "precision": "fp16"}
    return {**names, "passed": passed, "fused_attention": None, "rows": rows}


def test_winners_are_verified_ones():
    trials = [trial("default", 80.0), trial("default", 100.0, profile="fixed 8"), trial("fast", 130.0)]
    (found,) = winners([*trials, trial("wrong", 200.0, passed=False), {"failed": "x"}])
    assert (found["spelling"], found["ratio"]) == ("fast", 1.3)  # to the default spelling at its best
    assert winners([trial("wrong", 1.0, passed=False)]) == []


def test_one_trial_alone_is_marked_as_the_fastest():
    trials = [trial(spelling, 100.0, profile=profile) for spelling in ("default", "matmul") for profile in ("a", "b")]
    trials[2]["rows"][0]["images_per_second"] = 101.0
    lines = tune_table({"trials": trials, "winners": winners(trials)}).splitlines()
    assert [line.split()[:2] for line in lines if line.endswith("fastest")] == [["matmul", "a"]]


@pytest.mark.parametrize(
    ("given", "spelling", "profiles"),
    [(trial("default", 1.0), "", (8,)), (trial("matmul", 1.0, profile="range 1-8-64"), "matmul", ())],
)
def test_config_words_are_taken(bundle_path, given, spelling, profiles):
    config = read_config(Bundle(bundle_path))
    config.batch.profiles = (1,)
    (winner,) = winners([given])
    _, _, words = command.parse(["engine", "build", "x", *shlex.split(config_words(winner))])
    applied = command.override(config, words)
    assert (applied.engine.spelling, tuple(applied.batch.profiles)) == (spelling, profiles)
    graph = Bundle(bundle_path).spelling(spelling) if spelling else Bundle(bundle_path).onnx()
    assert request_for(Bundle(bundle_path), applied, read_facts(Bundle(bundle_path)), "fp16").onnx_path == graph
