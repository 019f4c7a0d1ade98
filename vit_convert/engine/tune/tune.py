"""Times every lowering with every profile on this GPU: they differ by up to a third, and no rule says which one
wins."""

from collections.abc import Sequence
from typing import Any

import ml_collections

from vit_convert.core.bundle import Bundle, hash_value, read_json, write_json
from vit_convert.core.errors import BenchmarkError, ConvertError
from vit_convert.core.progress import Progress
from vit_convert.engine.backend.trt import Backend
from vit_convert.engine.build_bundle import build_one, request_for
from vit_convert.engine.commands import environment
from vit_convert.engine.handoff import Facts, describe_model, read_config, require_graph_of
from vit_convert.engine.measure.benchmark import Case, run_cases
from vit_convert.engine.runtime.engine import Engine
from vit_convert.engine.runtime.session import Session
from vit_convert.engine.tune.trials import Trial, options_of, plan_trials, still_valid
from vit_convert.engine.tune.winners import winners
from vit_convert.engine.verify import verify_session


def tune_bundle(
    backend: Backend,
    bundle: Bundle,
    config: ml_collections.ConfigDict,
    facts: Facts,
    *,
    precisions: Sequence[str],
    warmup_seconds: float,
    force: bool = False,
    command: str = "",
    progress: Progress,
) -> dict[str, Any]:
    """Builds, verifies and times every trial; `tune.json` keeps the results, so that a rerun continues and other trials
    are added.

    Args:
        backend: the TensorRT that builds and runs.
        bundle: holds the graphs; gets `tune/*.plan` and `tune.json`.
        config: the resolved config.
        facts: of the bundle.
        precisions: engines to tune.
        warmup_seconds: run before each measurement.
        force: time again what is known.
        command: the command line, for the record.
        progress: what people see.

    Returns:
        What `tune.json` holds: hardware, software, model, command, trials (lowering, profile, sizes, precision,
        batches, seconds, options, key, date, plan, build_seconds, fused_attention, cosine, passed, rows; or failed, the
        reason), and winners, see there.
        Trials that are not asked for now stay in it while they hold: the same graph, TensorRT and GPU.

    Raises:
        UsageError: the bundle does not hold one of the lowerings.
        BuildError: the conversion made no graph of a precision.
        BenchmarkError: there is no GPU, or none of the trials asked for could be built and run.
    """
    if backend.gpu is None:
        raise BenchmarkError(
            "tune: engines run only on a GPU, and this host has none", fix="Run it on a host with an NVIDIA GPU."
        )
    path = bundle.tuning
    about = {**environment(backend).to_dict(), "model": describe_model(bundle).to_dict(), "command": command}
    about |= {"onnx": facts.files.graph_hashes(bundle.onnx())}  # while it is the same, this holds
    for precision in precisions:
        require_graph_of(facts, request_for(bundle, config, facts, precision).onnx_path)
    trials = plan_trials(bundle, config, facts, precisions=precisions)
    kept = still_valid(backend, bundle, config, facts, (read_json(path) or {}).get("trials", []))
    known = set() if force else {key for key, row in kept.items() if "failed" not in row and not row.get("skipped")}
    options, usual = options_of(config), options_of(read_config(bundle))

    def save() -> dict[str, Any]:
        done = list(kept.values())
        result = {**about, "trials": done, "winners": winners(done, usual)}
        write_json(path, result)
        return result

    for number, trial in enumerate(trials, 1):
        key = trial.key(backend)
        if key in known:
            continue
        progress.say(f"tune {number} of {len(trials)}: {trial.precision}, {trial.lowering}, {trial.profile}")
        row = {
            "lowering": trial.lowering,
            "profile": trial.profile,
            "sizes": dict(trial.sizes),
            "precision": trial.precision,
            "batches": list(trial.batches),
            "seconds": trial.seconds,
            "options": options,
            "key": key,
            "date": about["date"],
        }
        try:
            row |= _try(backend, bundle, config, facts, trial, warmup_seconds, progress)
        except ConvertError as e:  # a lowering that TensorRT cannot build is a result, not an end
            row["failed"] = str(e)
            progress.warn(f"{trial.lowering}, {trial.profile}: {e}")
        kept[key] = row
        save()
    failed = [row["failed"] for trial in trials if "failed" in (row := kept[trial.key(backend)])]
    if trials and len(failed) == len(trials):
        raise BenchmarkError(f"tune: none of {len(trials)} trials ran; the last: {failed[-1]}", fix=f"See {path}.")
    return save()


def _try(
    backend: Backend,
    bundle: Bundle,
    config: ml_collections.ConfigDict,
    facts: Facts,
    trial: Trial,
    warmup_seconds: float,
    progress: Progress,
) -> dict[str, Any]:
    options = hash_value(options_of(config))[:8]  # another option's engine does not replace this one
    name = f"{trial.precision}-{trial.lowering}-{trial.profile}-{options}".replace(" ", "-")
    plan = bundle.root / "tune" / f"{backend.name}-{backend.version}-{backend.arch}" / f"{name}.plan"
    built = build_one(backend, trial.request, plan, progress=progress)
    engine = Engine(backend, plan)
    with Session(engine) as session:
        proof = verify_session(session, bundle, config, facts, progress=progress)
    cases = [Case(trial.precision, batch, 1, False, True) for batch in trial.batches]
    rows, skipped = run_cases(
        {trial.precision: engine},
        cases,
        seconds=trial.seconds,
        warmup_seconds=warmup_seconds,
        progress=progress,
        save=lambda rows, skipped: None,
    )
    return {
        "plan": str(plan.relative_to(bundle.root)),
        "build_seconds": built.build_seconds,
        "fused_attention": built.fused_attention.to_dict() if built.fused_attention else None,
        "cosine": proof.cosine,
        "passed": proof.passed,
        "misses": list(proof.misses),
        "rows": [row.to_dict() for row in rows],
        "skipped": [row.to_dict() for row in skipped],
    }
