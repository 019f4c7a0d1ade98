"""Times spellings of one graph × profiles on the GPU at hand: they differ by up to a third, and no rule says which wins."""

import dataclasses
import itertools
import pathlib
from collections.abc import Sequence
from typing import Any

import ml_collections

from vit_convert import config as configs
from vit_convert.bundle import Bundle, hash_value, read_json, write_json
from vit_convert.engine.benchmark import Case, run_cases
from vit_convert.engine.build import BuildRequest, request_record
from vit_convert.engine.facts import Facts
from vit_convert.engine.requests import batch_profiles, build_one, request_for, takes_spellings
from vit_convert.engine.runtime import Engine
from vit_convert.engine.session import Session
from vit_convert.engine.stages import environment
from vit_convert.engine.trt import Backend
from vit_convert.engine.verify import verify_session
from vit_convert.engine.winners import DEFAULT, FIXED, winners
from vit_convert.errors import ConvertError, UsageError
from vit_convert.progress import Progress


@dataclasses.dataclass(frozen=True)
class Trial:
    """One engine to try.

    Attributes:
        spelling: name of the graph's spelling.
        profile: "fixed 64" or "range 1-8-64".
        precision: of the engine.
        batches: sizes that it is timed at.
        request: what to build.
    """

    spelling: str
    profile: str
    precision: str
    batches: tuple[int, ...]
    request: BuildRequest


def spellings(bundle: Bundle, config: ml_collections.ConfigDict, facts: Facts) -> dict[str, pathlib.Path]:
    """The graphs to choose from, that which engines are built from first: those that the config names, and the bundle's own.

    Raises:
        UsageError: the bundle does not hold one of them.
    """
    used = configs.spelling(config, facts.spelling) or DEFAULT
    names = dict.fromkeys([used, DEFAULT, *config.spellings])
    graphs = {name: bundle.onnx() if name == DEFAULT else bundle.spelling(name) for name in names}
    for name, path in graphs.items():
        if not path.is_file():
            raise UsageError(f"config.spellings: {name}: there is no {path}", fix="Convert again, with it in config.spellings.")
    return graphs


def plan_trials(bundle: Bundle, config: ml_collections.ConfigDict, facts: Facts, *, precisions: Sequence[str]) -> list[Trial]:
    """Lists the engines to try: each spelling with a fixed profile for each batch, and with the config's range.

    Args:
        bundle: holds the graphs.
        config: the resolved config; `spellings` beside the bundle's own, `benchmark.batches` are the fixed sizes, `batch` is the range.
        facts: of the bundle.
        precisions: engines; spellings are for fp16 where the builder lowers it from fp32.

    Returns:
        The trials.

    Raises:
        UsageError: the bundle does not hold one of the spellings.
    """
    trials = []
    batches = tuple(config.benchmark.batches)
    span = config.batch
    kinds = [(f"{FIXED} {size}", {"min": size, "opt": size, "max": size, "profiles": ()}, (size,)) for size in batches]
    inside = tuple(size for size in batches if span.min <= size <= span.max)
    if span.min < span.max and inside:
        kinds.append(
            (f"range {span.min}-{span.opt}-{span.max}", {"min": span.min, "opt": span.opt, "max": span.max, "profiles": ()}, inside)
        )
    for precision in precisions:
        base = request_for(bundle, config, facts, precision)
        graphs = {DEFAULT: pathlib.Path(base.onnx_path)}
        if takes_spellings(precision, facts.target):
            graphs = spellings(bundle, config, facts)
        for (spelling, path), (profile_name, sizes, timed) in itertools.product(graphs.items(), kinds):
            shapes = batch_profiles(facts.image_size, config.layout, sizes)
            trials.append(Trial(spelling, profile_name, precision, timed, dataclasses.replace(base, onnx_path=path, profiles=shapes)))
    return trials


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
    """Builds, verifies and times every trial; `tune.json` keeps what is done, so that a rerun continues.

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
        What `tune.json` holds: hardware, software, command, trials (spelling, profile, precision, key, plan, build_seconds,
        fused_attention, cosine, passed, rows; or failed, the reason), and winners: for each precision and batch the fastest trial that
        passed.

    Raises:
        UsageError: the bundle does not hold one of the spellings.
    """
    path, about = bundle.root / "tune.json", {**environment(backend), "command": command}
    known = {} if force else {row["key"]: row for row in (read_json(path) or {}).get("trials", []) if "failed" not in row}
    done: list[dict[str, Any]] = []
    trials = plan_trials(bundle, config, facts, precisions=precisions)
    for number, trial in enumerate(trials, 1):
        key = trial_key(backend, trial, config.benchmark.seconds)
        if key in known:
            done.append(known[key])
            continue
        progress.say(f"tune {number} of {len(trials)}: {trial.precision}, {_describe(trial)}")
        names = {"spelling": trial.spelling, "profile": trial.profile, "precision": trial.precision}
        row = {**names, "key": key}
        try:
            row |= _try(backend, bundle, config, facts, trial, warmup_seconds, progress)
        except ConvertError as e:  # a spelling that TensorRT cannot build is a result, not an end
            row["failed"] = str(e)
            progress.warn(f"{_describe(trial)}: {e}")
        done.append(row)
        write_json(path, {**about, "trials": done, "winners": winners(done)})
    result = {**about, "trials": done, "winners": winners(done)}
    write_json(path, result)
    return result


def trial_key(backend: Backend, trial: Trial, seconds: float) -> str:
    """What a trial's result depends on, as a hash: the graph, the request, the TensorRT and the GPU."""
    where = [backend.name, backend.version, backend.gpu.name if backend.gpu else ""]
    return hash_value([where, request_record(trial.request), list(trial.batches), seconds])


def _describe(trial: Trial) -> str:
    return f"{trial.spelling}, {trial.profile}"


def _try(
    backend: Backend,
    bundle: Bundle,
    config: ml_collections.ConfigDict,
    facts: Facts,
    trial: Trial,
    warmup_seconds: float,
    progress: Progress,
) -> dict[str, Any]:
    name = f"{trial.precision}-{trial.spelling}-{trial.profile}".replace(" ", "-")
    plan = bundle.root / "tune" / f"{backend.name}-{backend.version}-{backend.arch}" / f"{name}.plan"
    built = build_one(backend, trial.request, plan, progress=progress)
    engine = Engine(backend, plan)
    with Session(engine) as session:
        proof = verify_session(session, bundle, config, facts, progress=progress)
    cases = [Case(trial.precision, batch, 1, False, True) for batch in trial.batches]
    rows, skipped = run_cases(
        {trial.precision: engine},
        cases,
        seconds=config.benchmark.seconds,
        warmup_seconds=warmup_seconds,
        progress=progress,
        save=lambda rows, skipped: None,
    )
    found = {
        "plan": str(plan.relative_to(bundle.root)),
        "build_seconds": built["build_seconds"],
        "fused_attention": built["fused_attention"],
    }
    return {**found, "cosine": proof["cosine"], "passed": proof["passed"], "misses": proof["misses"], "rows": rows, "skipped": skipped}
