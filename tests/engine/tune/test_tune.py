"""`tune`: which engines it tries, what it keeps of them, and how its winners are got; building is simulated."""

import copy
import dataclasses
import shlex

import pytest
import simulated_gpu
from reconverted import as_left

from vit_convert.core.benchmark_results import SkippedCase
from vit_convert.core.bundle import Bundle, read_json
from vit_convert.core.engine_results import EngineSummary
from vit_convert.core.errors import BenchmarkError, BuildError, UsageError
from vit_convert.core.progress import Progress
from vit_convert.core.tune_results import TunedTrial, TuneResult, Winner
from vit_convert.engine import __main__ as command
from vit_convert.engine.build_bundle import request_for
from vit_convert.engine.handoff import read_config
from vit_convert.engine.host import EngineHost
from vit_convert.engine.measure.benchmark import RESIDENT
from vit_convert.engine.tune import tune
from vit_convert.engine.tune.trials import options_of, plan_trials, still_valid
from vit_convert.engine.tune.winners import config_words, tune_table, winners


def run(bundle_path, *words):
    fixed = ("--precision=fp16", "--batches=1,4", "--duration=0.02", "--warmup=0", "--quiet")
    return command.main(["engine", "tune", str(bundle_path), *fixed, *words])


def host_of(bundle, config):
    return EngineHost.open(None, bundle, config, Progress(quiet=True))


@pytest.fixture
def built(gpu, monkeypatch):
    """The graph of every engine that was built; the lowering cannot be built for batch 4 alone."""
    found = []

    def build_engine(backend, request, plan, *, progress):
        found.append(request.onnx_path.name)
        if found[-1] == "matmul.onnx" and request.profiles[0]["images"][0][0] == 4:
            raise BuildError("matmul.onnx: node x: not supported")
        ranges = [tuple(profile["images"]) for profile in request.profiles]
        simulated_gpu.write_plan(plan, request.onnx_path, ranges, precision=request.precision)
        return EngineSummary.from_dict({"build_seconds": 1.0, "fused_attention": {"text": "yes, fp16, 1 of 1"}})

    monkeypatch.setattr(command, "load_backend", lambda name, **_: gpu[0])
    # building takes a GPU; what tune does around it does not
    monkeypatch.setattr("vit_convert.engine.tune.tune.build_engine", build_engine)
    return found


def test_measures_keeps_and_chooses(capsys, bundle_path, built):
    assert run(bundle_path) == 0
    text = capsys.readouterr().out
    assert "failed: matmul.onnx: node x" in text and "fastest" in text
    assert built == [graph for graph in ("model.onnx", "matmul.onnx") for _ in ("fixed 1", "fixed 4", "range")]
    found = read_json(bundle_path / "tune.json")
    events = (bundle_path / "events.jsonl").read_text()
    assert [f"tune {number} of 6: fp16, " in events for number in range(8)] == [False, *[True] * 6, False]
    assert [row["batch"] for row in found["winners"]] == [1, 4]
    told = read_json(bundle_path / "report.json")["tuning"]
    fastest = {row["batch"]: row["lowering"] for row in told if row["words"]}
    assert fastest == {row["batch"]: row["lowering"] for row in found["winners"]}
    assert sum(row["note"].startswith("failed: matmul.onnx: node x") for row in told) == 1
    assert all(
        f"fp16 at batch {row['batch']}: {config_words(Winner.from_dict(row))}" in text for row in found["winners"]
    )
    passed = [trial for trial in found["trials"] if "failed" not in trial]
    assert all(trial["passed"] for trial in passed)
    rows = [row for trial in passed for row in trial["rows"]]
    assert {(row["streams"], row["transfers"], row["cuda_graph"]) for row in rows} == {(1, RESIDENT, True)}
    assert len({trial["plan"] for trial in passed}) == 5  # one trial's engine does not replace another's
    assert run(bundle_path) == 0 and len(built) == 6 + 1  # what was measured is kept, what failed is tried again
    assert read_json(bundle_path / "tune.json")["winners"] == found["winners"]
    assert run(bundle_path, "--force") == 0 and len(built) == 6 + 1 + 6


def test_nothing_that_ran_is_a_failure(capsys, bundle_path, built, gpu, monkeypatch):
    def build_engine(backend, request, plan, *, progress):
        raise BuildError(f"{plan}: no kernel")

    monkeypatch.setattr("vit_convert.engine.tune.tune.build_engine", build_engine)
    assert run(bundle_path) == BenchmarkError.exit_code
    said = capsys.readouterr().err
    assert "tune: none of 6 trials ran; the last: " in said
    assert "fp16-matmul-range-1-4-8-" in said.partition("the last: ")[2]  # of the trials in their order
    found = read_json(bundle_path / "tune.json")
    assert len(found["trials"]) == 6 and "failed: fp16-matmul-range" in tune_table(TuneResult.from_dict(found))
    monkeypatch.setattr(command, "load_backend", lambda name, **_: dataclasses.replace(gpu[0], gpu=None))
    assert run(bundle_path) == BenchmarkError.exit_code and "only on a GPU" in capsys.readouterr().err and not built


def test_what_was_skipped_is_tried_again(bundle_path, built, monkeypatch):
    real, full = tune.run_cases, []

    def run_cases(engines, cases, **options):
        rows, skipped = real(engines, cases, **options)
        return ([], [SkippedCase.from_dict({"reason": "out of memory"})]) if full else (rows, skipped)

    monkeypatch.setattr(tune, "run_cases", run_cases)
    full.append(True)
    assert (
        run(bundle_path, "--batches=1", "--config.lowerings=()") == 0
        and read_json(bundle_path / "tune.json")["winners"] == []
    )
    full.clear()
    assert run(bundle_path, "--batches=1", "--config.lowerings=()") == 0
    assert [row["batch"] for row in read_json(bundle_path / "tune.json")["winners"]] == [1]


def test_trials_that_are_not_asked_for_are_kept(capsys, bundle_path, built, monkeypatch):
    def keys():
        return {trial["key"] for trial in read_json(bundle_path / "tune.json")["trials"]}

    run(bundle_path)
    fp16 = keys()
    capsys.readouterr()
    run(bundle_path, "--precision=fp32", "--batches=1")
    text, found = capsys.readouterr().out, read_json(bundle_path / "tune.json")
    assert keys() > fp16 and len(found["trials"]) == 6 + 2
    assert [(row["precision"], row["batch"]) for row in found["winners"]] == [("fp16", 1), ("fp16", 4), ("fp32", 1)]
    assert all(
        f"{row['precision']} at batch {row['batch']}: {config_words(Winner.from_dict(row))}" in text
        for row in found["winners"]
    )
    everything = keys()

    def interrupted(backend, request, plan, *, progress):
        if request.onnx_path.name == "matmul.onnx":  # it failed, and is tried again
            raise BuildError("still not supported")
        raise KeyboardInterrupt

    monkeypatch.setattr("vit_convert.engine.tune.tune.build_engine", interrupted)
    assert run(bundle_path, "--duration=0.03") != 0 and keys() == everything
    run(bundle_path)
    assert keys() == everything
    (bundle_path / "lowerings" / "matmul.onnx").write_bytes(b"another graph")
    as_left(bundle_path, "lowerings/matmul.onnx")
    run(bundle_path, "--precision=fp32", "--batches=1")
    # those of the old graph went
    assert {trial["lowering"] for trial in read_json(bundle_path / "tune.json")["trials"]} == {"default"}


def test_lowering_that_is_not_there(capsys, bundle_path, built):
    assert run(bundle_path, "--config.lowerings=primitives") == UsageError.exit_code
    assert "primitives.onnx: no finished stage of this conversion made it" in capsys.readouterr().err
    assert built == []
    assert run(bundle_path, "--config.lowerings=()") == 0
    assert set(built) == {"model.onnx"}


@pytest.mark.parametrize(
    ("precision", "expected"),
    [
        ("fp16", {"default", "matmul"}),
        ("int8", {"default"}),  # it has a graph of its own
        ("fp32", {"default"}),  # some lowerings compute in fp16 alone
    ],
)
def test_lowerings_are_tried_in_fp16(converted, precision, expected):
    bundle = Bundle(converted)
    config = read_config(bundle)
    config.engine.lowering = "matmul"  # what engines are built from so far changes nothing
    trials = plan_trials(host_of(bundle, config), precisions=[precision])
    assert {trial.lowering for trial in trials} == expected
    assert {trial.lowering: trial.request.onnx_path for trial in trials}.get("matmul") in (
        None,
        bundle.lowering("matmul"),
    )


def test_a_calibrator_is_not_tuned(capsys, bundle_path, built):
    assert run(bundle_path, "--precision=int8", "--config.engine.calibrator=True") == UsageError.exit_code
    assert "config.engine.calibrator=True: tune does not calibrate" in capsys.readouterr().err and not built


def test_other_tolerances_are_another_trial(converted, gpu):
    bundle = Bundle(converted)
    config = read_config(bundle)
    keys = []
    for cosine in (0.999, 0.99):
        config.check.fp16_cosine = cosine
        keys.append([trial.key(gpu[0]) for trial in plan_trials(host_of(bundle, config), precisions=["fp16"])])
    assert not set(keys[0]) & set(keys[1])


def test_another_driver_is_another_trial(converted, gpu):
    bundle = Bundle(converted)
    trial = plan_trials(host_of(bundle, read_config(bundle)), precisions=["fp16"])[0]
    newer = dataclasses.replace(gpu[0].gpu, driver="another")
    assert trial.key(gpu[0]) != trial.key(dataclasses.replace(gpu[0], gpu=newer))
    assert trial.key(dataclasses.replace(gpu[0], gpu=None))


def test_trials_of_other_versions_are_left_and_the_next_ones_kept(converted, gpu):
    bundle = Bundle(converted)
    host = dataclasses.replace(host_of(bundle, read_config(bundle)), backend=gpu[0])
    made, options = plan_trials(host, precisions=["fp16"])[0], options_of(read_config(bundle))
    words = {name: getattr(made, name) for name in ("lowering", "sizes", "precision", "batches", "seconds")}
    row = {**words, "options": options, "key": made.key(gpu[0])}
    earlier, later = {**row, "options": {}}, {**row, "options": {**options, "engine.unheard_of": 1}}
    rows = [TunedTrial.from_dict(found) for found in (earlier, later, row)]
    assert still_valid(host, rows) == {row["key"]: rows[-1]}


def test_a_fixed_batch_is_no_range_of_its_own(converted):
    bundle = Bundle(converted)
    config = read_config(bundle)
    config.benchmark.batches, config.lowerings = (4,), ()
    config.batch.min = config.batch.opt = config.batch.max = 4
    assert [trial.profile for trial in plan_trials(host_of(bundle, config), precisions=["fp32"])] == ["fixed 4"]
    config.batch.min, config.batch.max = 5, 8
    config.batch.opt = 6
    assert [trial.profile for trial in plan_trials(host_of(bundle, config), precisions=["fp32"])] == ["fixed 4"]


def test_trials_skip_sizes_outside_the_range(converted):
    bundle = Bundle(converted)
    config = read_config(bundle)
    config.benchmark.batches, config.lowerings = (4, 16), ()
    trials = plan_trials(host_of(bundle, config), precisions=["fp32"])
    assert [(trial.profile, trial.batches) for trial in trials] == [
        ("fixed 4", (4,)),
        ("fixed 16", (16,)),
        ("range 1-4-8", (4,)),
    ]


def trial(lowering, rate, *, profile="fixed 8", passed=True, noise=0.5, options=()):
    sizes = [int(word) for word in profile.split()[1].split("-")]
    return {
        "key": f"{lowering} {rate} {profile}",
        "lowering": lowering,
        "profile": profile,
        "sizes": dict(zip(("min", "opt", "max"), sizes if len(sizes) == 3 else 3 * sizes)),
        "precision": "fp16",
        "options": dict(options),
        "passed": passed,
        "fused_attention": None,
        "rows": [{"batch": 8, "images_per_second": rate, "noise_percent": noise}],
    }


@pytest.mark.parametrize(
    ("second", "noise", "note"),
    [
        (100.0, 0.4, "fastest"),
        (100.0, 0.6, "fastest, within the noise of default, range 1-8-64"),  # 1 % ahead, 0.5 % and 0.6 % of noise
        (100.0, None, "fastest"),  # one pass tells no noise
    ],
)
def test_one_trial_alone_is_marked_and_only_what_leads_is_the_fastest(second, noise, note):
    trials = [
        trial("default", 99.0),
        trial("default", second, profile="range 1-8-64", noise=noise),
        trial("matmul", 101.0),
    ]
    trials.append({**trial("matmul", 100.9), "seconds": 9.0})  # the same engine timed again is no rival
    tried = tuple(map(TunedTrial.from_dict, trials))
    result = dataclasses.replace(TuneResult.from_dict({}), trials=tried, winners=tuple(winners(tried, {})))
    lines = tune_table(result).splitlines()[1:-1]
    assert [line.partition("unknown")[2].strip() for line in lines] == ["", "", note, ""]


@pytest.mark.parametrize("words", [[], ["--config.engine.opt_level=4", "--config.keep_fp32=('block_00',)"]])
def test_config_words_give_the_trials_own_engine(bundle_path, words):
    bundle = Bundle(bundle_path)
    usual = read_config(bundle)
    _, _, parsed = command.parse(["engine", "tune", str(bundle_path), "--batches=1,4", *words])
    config = command.override(read_config(bundle), parsed)
    usual.batch.profiles, usual.batch.max = (1, 2), 32  # what the bundle has otherwise does not show through
    planned = plan_trials(host_of(bundle, config), precisions=["fp16"])
    assert {made.profile for made in planned} == {"fixed 1", "fixed 4", "range 1-4-8"}
    for made in planned:
        measured = {**trial(made.lowering, 1.0, profile=made.profile, options=options_of(config)), "sizes": made.sizes}
        (winner,) = winners([TunedTrial.from_dict(measured)], options_of(usual))
        _, _, found = command.parse(["engine", "build", "x", *shlex.split(config_words(winner))])
        own = command.override(copy.deepcopy(usual), found)
        assert request_for(host_of(bundle, own), "fp16") == made.request
