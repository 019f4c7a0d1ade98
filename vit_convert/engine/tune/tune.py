"""Times every lowering with every profile on this GPU: they differ by up to a third, and no rule predicts the
winner."""

import dataclasses
from collections.abc import Sequence

from vit_convert.core.bundle import hash_value, write_json
from vit_convert.core.errors import BenchmarkError, ConvertError
from vit_convert.core.tune_results import TunedTrial, TuneResult
from vit_convert.engine.build_bundle import request_for
from vit_convert.engine.builder.build import build_engine
from vit_convert.engine.commands import environment
from vit_convert.engine.handoff import describe_model, read_config, require_graph_of
from vit_convert.engine.host import EngineHost
from vit_convert.engine.measure.benchmark import Case, run_cases
from vit_convert.engine.runtime.engine import Engine
from vit_convert.engine.runtime.session import Session
from vit_convert.engine.tune.trials import Trial, options_of, plan_trials, read_trials, still_valid
from vit_convert.engine.tune.winners import winners
from vit_convert.engine.verify import verify_session


def tune_bundle(
    host: EngineHost, *, precisions: Sequence[str], warmup_seconds: float, force: bool = False
) -> TuneResult:
    """Builds, verifies and times every trial; `tune.json` keeps the results, so that a rerun continues and other trials
    are added.

    Args:
        host: whose bundle holds the graphs; gets `tune/*.plan` and `tune.json`.
        precisions: engines to tune.
        warmup_seconds: run before each measurement.
        force: repeat known trials.

    Returns:
        What `tune.json` holds. Trials that are not requested now stay in it while they are valid: for the same graph,
        TensorRT and GPU.

    Raises:
        UsageError: the bundle does not hold one of the lowerings.
        BuildError: the conversion wrote no graph for a precision.
        BenchmarkError: there is no GPU, or none of the trials asked for could be built and run.
    """
    backend, bundle, facts, progress = host.backend, host.bundle, host.facts, host.progress
    if backend.gpu is None:
        raise BenchmarkError(
            "tune: engines run only on a GPU, and this host has none", fix="Run it on a host with an NVIDIA GPU."
        )
    path = bundle.tuning
    for precision in precisions:
        require_graph_of(facts, request_for(host, precision).onnx_path)
    trials = plan_trials(host, precisions=precisions)
    kept = still_valid(host, read_trials(path))
    known = set() if force else {key for key, row in kept.items() if row.failed is None and not row.skipped}
    here, usual = environment(backend), options_of(read_config(bundle))

    def save() -> TuneResult:
        done = tuple(kept.values())
        result = TuneResult(
            **{field.name: getattr(here, field.name) for field in dataclasses.fields(here)},
            model=describe_model(bundle),
            command=host.command,
            onnx=facts.files.graph_hashes(bundle.onnx()),
            trials=done,
            winners=tuple(winners(done, usual)),
        )
        write_json(path, result.to_dict())
        return result

    for number, trial in enumerate(trials, 1):
        key = trial.key(backend)
        if key in known:
            continue
        progress.say(f"tune {number} of {len(trials)}: {trial.precision}, {trial.lowering}, {trial.profile}")
        row = TunedTrial(
            lowering=trial.lowering,
            profile=trial.profile,
            sizes=trial.sizes,
            precision=trial.precision,
            batches=trial.batches,
            seconds=trial.seconds,
            options=options_of(host.config),
            key=key,
            date=here.date,
        )
        try:
            kept[key] = _try(host, trial, row, warmup_seconds)
        except ConvertError as e:  # a lowering that TensorRT cannot build is a result, not a failure
            kept[key] = dataclasses.replace(row, failed=str(e))
            progress.warn(f"{trial.lowering}, {trial.profile}: {e}")
        save()
    failed = [row.failed for trial in trials if (row := kept[trial.key(backend)]).failed is not None]
    if trials and len(failed) == len(trials):
        raise BenchmarkError(f"tune: none of {len(trials)} trials ran; the last: {failed[-1]}", fix=f"See {path}.")
    return save()


def _try(host: EngineHost, trial: Trial, row: TunedTrial, warmup_seconds: float) -> TunedTrial:
    """Builds, verifies and times a trial; returns `row` with the results."""
    backend, progress = host.backend, host.progress
    options = hash_value(options_of(host.config))[:8]  # an engine with other options must not replace this one
    name = f"{trial.precision}-{trial.lowering}-{trial.profile}-{options}".replace(" ", "-")
    plan = host.bundle.root / "tune" / f"{backend.name}-{backend.version}-{backend.arch}" / f"{name}.plan"
    built = build_engine(backend, trial.request, plan, progress=progress)
    engine = Engine(backend, plan)
    with Session(engine) as session:
        proof = verify_session(session, host)
    cases = [Case(trial.precision, batch, 1, False, True) for batch in trial.batches]
    rows, skipped = run_cases(
        {trial.precision: engine},
        cases,
        seconds=trial.seconds,
        warmup_seconds=warmup_seconds,
        progress=progress,
        save=lambda rows, skipped: None,
    )
    return dataclasses.replace(
        row,
        plan=host.in_bundle(plan),
        build_seconds=built.build_seconds,
        fused_attention=built.fused_attention,
        cosine=proof.cosine,
        passed=proof.passed,
        misses=proof.misses,
        rows=tuple(rows),
        skipped=tuple(skipped),
    )
