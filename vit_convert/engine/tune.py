"""Times spellings of one graph × profiles on the GPU at hand: they differ by up to a third, and no rule says which wins."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections

from vit_convert.bundle import Bundle, hash_value, read_json, write_json
from vit_convert.engine.benchmark import Case, run_cases
from vit_convert.engine.build import BuildRequest, request_record
from vit_convert.engine.facts import Facts
from vit_convert.engine.requests import batch_profiles, build_one, request_for
from vit_convert.engine.runtime import Engine
from vit_convert.engine.session import Session
from vit_convert.engine.stages import environment
from vit_convert.engine.table import text_table
from vit_convert.engine.trt import Backend
from vit_convert.engine.verify import verify_session
from vit_convert.errors import ConvertError
from vit_convert.progress import Progress

DEFAULT = "default"  # the spelling of the bundle's own graph


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


def spellings(bundle: Bundle) -> dict[str, pathlib.Path]:
    """The graphs to choose from: those in the bundle's `spellings/`, each named by its file; the bundle's own goes without saying."""
    return {path.stem: path for path in sorted((bundle.root / "spellings").glob("*.onnx"))}


def plan_trials(bundle: Bundle, config: ml_collections.ConfigDict, facts: Facts, *, precisions: Sequence[str]) -> list[Trial]:
    """Lists the engines to try: each spelling with a fixed profile for each batch, and with the config's range.

    Args:
        bundle: holds the graphs.
        config: the resolved config; `benchmark.batches` are the fixed sizes, `batch` is the range.
        facts: of the bundle.
        precisions: engines; a spelling stands for those that are lowered from fp32 by the builder.

    Returns:
        The trials.
    """
    trials = []
    batches = tuple(config.benchmark.batches)
    span = config.batch
    kinds = [(f"fixed {size}", {"min": size, "opt": size, "max": size, "profiles": ()}, (size,)) for size in batches]
    inside = tuple(size for size in batches if span.min <= size <= span.max)
    if span.min < span.max and inside:
        kinds.append(
            (f"range {span.min}-{span.opt}-{span.max}", {"min": span.min, "opt": span.opt, "max": span.max, "profiles": ()}, inside)
        )
    for precision in precisions:
        base = request_for(bundle, config, precision, target=facts.target, image_size=facts.image_size, preprocess=facts.preprocess)
        graphs = {DEFAULT: pathlib.Path(base.onnx_path)}
        if base.onnx_path == bundle.onnx():
            graphs |= spellings(bundle)
        for spelling, path in graphs.items():
            for profile_name, sizes, timed in kinds:
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
        progress.say(f"tune {number} of {len(trials)}: {trial.precision}, {trial.spelling}, {trial.profile}")
        row = {"spelling": trial.spelling, "profile": trial.profile, "precision": trial.precision, "key": key}
        try:
            row |= _try(backend, bundle, config, facts, trial, warmup_seconds, progress)
        except ConvertError as e:  # a spelling that TensorRT cannot build is a result, not an end
            row["failed"] = str(e)
            progress.warn(f"{trial.spelling}, {trial.profile}: {e}")
        done.append(row)
        write_json(path, {**about, "trials": done, "winners": winners(done)})
    result = {**about, "trials": done, "winners": winners(done)}
    write_json(path, result)
    return result


def trial_key(backend: Backend, trial: Trial, seconds: float) -> str:
    """What a trial's result depends on, as a hash: the graph, the request, the TensorRT and the GPU."""
    where = [backend.name, backend.version, backend.gpu.name if backend.gpu else ""]
    return hash_value([where, request_record(trial.request), list(trial.batches), seconds])


def winners(trials: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The fastest trial that passed its check, for each precision and batch.

    Args:
        trials: finished ones.

    Returns:
        [{"precision", "batch", "spelling", "profile", "images_per_second", "noise_percent", "ratio" (to the default spelling's best)}].
    """
    found: dict[tuple[str, int], list[tuple[float, Mapping[str, Any], Mapping[str, Any]]]] = {}
    for trial in trials:
        for row in trial.get("rows", []) if trial.get("passed") else []:
            found.setdefault((trial["precision"], row["batch"]), []).append((row["images_per_second"], trial, row))
    result = []
    for (precision, batch), candidates in sorted(found.items()):
        rate, trial, row = max(candidates, key=lambda candidate: candidate[0])
        plain = max((other for other, candidate, _ in candidates if candidate["spelling"] == DEFAULT), default=None)
        result.append(
            {
                "precision": precision,
                "batch": batch,
                "spelling": trial["spelling"],
                "profile": trial["profile"],
                "images_per_second": rate,
                "noise_percent": row["noise_percent"],
                "ratio": None if plain is None else round(rate / plain, 4),
            }
        )
    return result


def tune_table(result: Mapping[str, Any]) -> str:
    """All trials and the winners as text for a terminal."""
    best = {(row["precision"], row["batch"], row["spelling"], row["profile"]) for row in result["winners"]}
    rows = []
    for trial in result["trials"]:
        names = [trial["spelling"], trial["profile"], trial["precision"]]
        if "failed" in trial:
            rows.append([*names, "", "", "", f"failed: {trial['failed'][:60]}"])
            continue
        fused = trial["fused_attention"]["text"] if trial["fused_attention"] else "unknown"
        for row in trial["rows"]:
            wins = (trial["precision"], row["batch"], trial["spelling"], trial["profile"]) in best
            note = "missed its tolerance" if not trial["passed"] else "fastest" if wins else ""
            rows.append([*names, str(row["batch"]), f"{row['images_per_second']:,.0f}", fused, note])
    return text_table(("spelling", "profile", "precision", "batch", "images/s", "fused attention", ""), rows)


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
