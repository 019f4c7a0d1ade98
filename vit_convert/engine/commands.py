"""The commands that need a GPU: verify and benchmark the engines of a bundle."""

import datetime
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import ml_collections

from vit_convert.core.bundle import Bundle, read_json, write_json
from vit_convert.core.config import QUANTIZED
from vit_convert.core.errors import BenchmarkError, CheckError
from vit_convert.core.host import cpu_model
from vit_convert.core.manifest import Manifest
from vit_convert.core.progress import Progress
from vit_convert.core.proof import recommend_unmeasured
from vit_convert.core.version import __version__
from vit_convert.engine.backend import cuda
from vit_convert.engine.backend.trt import Backend
from vit_convert.engine.bundle_engines import find_plan, keep_proof, open_engine, proof_of, recommended_engine
from vit_convert.engine.handoff import Facts, describe_model, judged_by, read_config, read_facts
from vit_convert.engine.measure.benchmark import END_TO_END, RESIDENT, plan_cases, run_cases
from vit_convert.engine.measure.plot import plot_rows
from vit_convert.engine.measure.recommend import recommend
from vit_convert.engine.runtime.session import Session
from vit_convert.engine.two_builds import compare_builds
from vit_convert.engine.verify import verify_session

# What usually helps where an engine of this precision misses its tolerance.
_MENDS = {
    "fp32": "Build without engine.tf32; if it misses still, this TensorRT computes something else than the graph says.",
    "fp16": "Keep the blocks of largest activation in fp32 (max_abs_activation in report.json, config.keep_fp32).",
    **dict.fromkeys(
        QUANTIZED, "Convert with precision=auto or a smaller calibration.max_error: layers that cost most stay fp16."
    ),
}


def verify_bundle(
    backend: Backend,
    bundle: Bundle,
    config: ml_collections.ConfigDict,
    facts: Facts,
    *,
    precisions: Sequence[str],
    progress: Progress,
) -> dict[str, Any]:
    """Verifies a bundle's engines against its reference; all are verified before a miss is raised, and each sidecar
    keeps its result.

    Args:
        backend: the TensorRT that runs them.
        bundle: holds the engines and the reference.
        config: the resolved config.
        facts: of the bundle.
        precisions: which engines.
        progress: what people see.

    Returns:
        {"passed", "engines": {precision: result of `verify_session`}, "top1": that of the first labelled engine or
        None, "summary"}.

    Raises:
        CheckError: a tolerance is missed; its `result` holds the above.
        BenchmarkError: an engine does not run, or the reference is missing.
        BuildError: an engine is missing or does not belong here.
    """
    engines: dict[str, Any] = {}
    judge = judged_by(bundle)
    for precision in precisions:
        plan = find_plan(backend, bundle, precision)
        with Session(open_engine(backend, bundle, plan)) as session:
            found = verify_session(session, bundle, config, facts, progress=progress)
            if config.check.consistency:
                found = compare_builds(backend, bundle, session, facts, config, found)
        engines[precision] = {**found, "plan": str(plan.relative_to(bundle.root))}
        keep_proof(plan, found, judge)
    result = verification(engines)
    if not result["passed"]:
        misses = [f"{precision}: {miss}" for precision, found in engines.items() for miss in found["misses"]]
        wrong = next(precision for precision, found in engines.items() if not found["passed"])
        message = f"engines miss their tolerance: {'; '.join(misses[:4])}"
        raise CheckError(message, fix=_MENDS.get(wrong, _MENDS["fp16"]), result=result)
    return result


def verification(engines: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Puts the results of `verify_session` together.

    Args:
        engines: by precision.

    Returns:
        What `verify_bundle` does.
    """
    top1 = next((found["top1"] for found in engines.values() if "top1" in found), None)
    parts = (
        f"{p}: cosine {e['cosine']:.6f}" + (f", top-1 {e['top1']:.2f} %" if "top1" in e else "")
        for p, e in engines.items()
    )
    passed = all(found["passed"] for found in engines.values())
    return {"passed": passed, "engines": dict(engines), "top1": top1, "summary": "; ".join(parts)}


def benchmark_bundle(
    backend: Backend,
    bundle: Bundle,
    config: ml_collections.ConfigDict,
    *,
    precisions: Sequence[str],
    warmup_seconds: float,
    cuda_graphs: Sequence[bool] = (True,),
    end_to_end: bool = True,
    command: str = "",
    progress: Progress,
) -> dict[str, Any]:
    """Measures a bundle's engines and writes `benchmark.json` and, with matplotlib, `benchmark.png`.

    Args:
        backend: the TensorRT that runs them.
        bundle: holds the engines.
        config: the resolved config; `benchmark` holds batches, streams and seconds.
        precisions: which engines.
        warmup_seconds: run before each measurement.
        cuda_graphs: with CUDA graphs, without, or both.
        end_to_end: also measure with images that come from the host.
        command: the command line, for the record.
        progress: what people see.

    Returns:
        What `benchmark.json` holds: hardware, software, model, command, date, rows, skipped, noise_percent (the largest
        of the rows), end_to_end (share of the best device-resident throughput, by precision and batch), recommended;
        and "summary".

    Raises:
        BenchmarkError: nothing could be measured.
        BuildError: an engine is missing or does not belong here.
    """
    engines = {
        precision: open_engine(backend, bundle, find_plan(backend, bundle, precision)) for precision in precisions
    }
    options, path = config.benchmark, bundle.benchmark
    cases = plan_cases(precisions, options.batches, options.streams, cuda_graphs=cuda_graphs, end_to_end=end_to_end)
    about = {**environment(backend), "model": describe_model(bundle), "command": command}
    about |= {"onnx": Manifest.read(bundle).files.graph_hashes(bundle.onnx())}  # while it is the same, this holds
    about |= {"seconds": options.seconds, "warmup_seconds": warmup_seconds}

    def save(rows: list[dict[str, Any]], skipped: list[dict[str, Any]]) -> None:
        write_json(path, {**about, "status": "running", "rows": rows, "skipped": skipped})

    rows, skipped = run_cases(
        engines, cases, seconds=options.seconds, warmup_seconds=warmup_seconds, progress=progress, save=save
    )
    if not rows:
        raise BenchmarkError(
            f"nothing was measured: {skipped[0]['reason']}", fix="Choose batches that the engines have profiles for."
        )
    judge = judged_by(bundle)
    verified = {precision: proof for precision, engine in engines.items() if (proof := proof_of(engine.path, judge))}
    best = max(rows, key=lambda row: row["images_per_second"])
    result = {
        **about,
        "status": "done",
        "rows": rows,
        "skipped": skipped,
        "noise_percent": max((row["noise_percent"] for row in rows if row["noise_percent"] is not None), default=None),
        "end_to_end": end_to_end_shares(rows),
        "recommended": recommend(rows, verified),
        "summary": f"{best['precision']} at batch {best['batch']}: {best['images_per_second']:,.0f} images/s",
    }
    write_json(path, result)
    if (reason := plot_rows(rows, path.with_suffix(".png"), title=about["gpu"])) != "":
        progress.say(f"no plot: {reason}")
    return result


def end_to_end_shares(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """How much of the device-resident throughput is left when images come from the host and results go back.

    Args:
        rows: of the benchmark.

    Returns:
        [{"precision", "batch", "share"}], the share of the best device-resident row of the same engine and batch.
    """
    rows = list(rows)
    best: dict[tuple[str, int], float] = {}
    for row in rows:
        if row["transfers"] == RESIDENT:
            key = row["precision"], row["batch"]
            best[key] = max(best.get(key, 0.0), row["images_per_second"])
    return [
        {
            "precision": r["precision"],
            "batch": r["batch"],
            "share": round(r["images_per_second"] / best[r["precision"], r["batch"]], 4),
        }
        for r in rows
        if r["transfers"] == END_TO_END and (r["precision"], r["batch"]) in best
    ]


def environment(backend: Backend | None) -> dict[str, Any]:
    """The hardware, software and date to record with a measurement, with TensorRT or without."""
    gpu = (backend.gpu if backend else None) or cuda.gpu()
    return {
        "gpu": gpu.name if gpu else "",
        "arch": gpu.arch if gpu else "",
        "driver": gpu.driver if gpu else "",
        "cuda": gpu.cuda if gpu else "",
        "gpu_memory_total_mib": gpu.memory_bytes // 2**20 if gpu else 0,
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "backend": backend.name if backend else "",
        "tensorrt": backend.version if backend else "",
        "python": platform.python_version(),
        "vit_convert": __version__,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def add_to_report(bundle: Bundle, *, build: Any = None, verify: Any = None, benchmark: Any = None) -> None:
    """Merges what was found on a GPU host into the bundle's report.json.

    Args:
        bundle: holds the report; a new one is begun if it is missing.
        build: rows of `build_bundle`.
        verify: result of `verify_bundle`.
        benchmark: result of `benchmark_bundle`.
    """
    report, judge = read_json(bundle.report) or {"name": bundle.root.name}, judged_by(bundle)
    if build is not None:
        kept = [row for row in report.get("engines", []) if row["path"] not in {new["path"] for new in build}]
        report["engines"] = [*kept, *build]
        # what was verified is no longer there
        gone = {row["precision"] for row in build if not proof_of(bundle.root / row["path"], judge)}
        verified = {
            name: found for name, found in report.pop("verify", {}).get("engines", {}).items() if name not in gone
        }
        if verified:
            report["verify"] = verification(verified)
    if verify is not None:
        report["verify"] = verification({**report.get("verify", {}).get("engines", {}), **verify["engines"]})
        if verify["top1"] is not None:
            report.setdefault("accuracy", {})["engine"] = verify["top1"]
    if benchmark is not None:
        report["benchmark"] = benchmark["rows"]
        report["recommended"] = benchmark["recommended"]
        report.pop("engine", None)
        if engine := recommended_engine(report.get("engines", []), benchmark):
            report["engine"] = engine
        if engine and (top1 := benchmark["recommended"]["top1"]) is not None:
            report.setdefault("accuracy", {})["engine"] = top1
    if benchmark is None or not benchmark["recommended"]["precision"]:
        _recommend(bundle, report, judge)
    write_json(bundle.report, report)


def _recommend(bundle: Bundle, report: dict[str, Any], judge: str) -> None:
    """Sets the engine that a report recommends: the benchmark's choice as long as it is proved, else another that is
    proved."""
    engines = report.get("engines", [])
    verified = {row["path"]: proof for row in engines if (proof := proof_of(bundle.root / row["path"], judge))}
    if precision := report.get("recommended", {}).get("precision"):
        proof = verified.get(report.get("engine", {}).get("path")) or report.get("verify", {}).get("engines", {}).get(
            precision, {}
        )
        if proof.get("passed") is True:
            return
        del report["recommended"]  # its engine was built again since, or missed its tolerance
    facts, lowered = read_facts(bundle), read_config(bundle).engine.tf32
    report["engine"] = recommend_unmeasured(
        engines, verified, facts.checks, report.get("verdicts", {}), lowered=lowered
    )
    if not report["engine"]:
        del report["engine"]
