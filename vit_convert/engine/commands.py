"""The commands that need a GPU: verify and benchmark the engines of a bundle."""

import dataclasses
import datetime
import platform
from collections.abc import Sequence

from vit_convert.core.advice import advice
from vit_convert.core.benchmark_results import BenchmarkResult, BenchmarkRow, Environment, SkippedCase, TransferShare
from vit_convert.core.bundle import write_json
from vit_convert.core.engine_results import EngineCheck, EngineSummary, Proof, Verification
from vit_convert.core.errors import BenchmarkError, CheckError
from vit_convert.core.host import cpu_model, num_cores
from vit_convert.core.manifest import Manifest
from vit_convert.core.recommend import RESIDENT, Evidence, recommend_measured
from vit_convert.core.tune_results import TunedEngine
from vit_convert.core.version import __version__
from vit_convert.engine.backend import cuda
from vit_convert.engine.backend.trt import Backend
from vit_convert.engine.bundle_engines import find_plan, keep_proof, open_engine, proof_of
from vit_convert.engine.handoff import describe_model
from vit_convert.engine.host import EngineHost
from vit_convert.engine.measure.benchmark import END_TO_END, plan_cases, run_cases
from vit_convert.engine.measure.plot import plot_rows
from vit_convert.engine.measure.roofline import roofline_of
from vit_convert.engine.runtime.session import Session
from vit_convert.engine.two_builds import compare_builds
from vit_convert.engine.verify import verify_session
from vit_convert.report.merge import with_benchmark, with_engines, with_recommendation, with_verification
from vit_convert.report.record import Report, update


def verify_bundle(host: EngineHost, *, precisions: Sequence[str]) -> Verification:
    """Verifies a bundle's engines against its reference; all are verified before a miss is raised, and each sidecar
    keeps its result.

    Args:
        host: whose bundle holds the engines and the reference.
        precisions: which engines.

    Returns:
        The result for each.

    Raises:
        CheckError: a tolerance is missed; its `result` holds the above.
        BenchmarkError: an engine does not run, or the reference is missing.
        BuildError: an engine is missing or does not belong here.
    """
    engines: dict[str, EngineCheck] = {}
    for precision in precisions:
        plan = find_plan(host.backend, host.bundle, precision)
        with Session(open_engine(host.backend, host.bundle, plan)) as session:
            found = verify_session(session, host)
            if host.config.check.consistency:
                found = compare_builds(session, host, found)
        engines[precision] = dataclasses.replace(found, plan=host.in_bundle(plan))
        keep_proof(plan, found, host.judge)
    result = Verification.of(engines)
    if not result.passed:
        misses = [f"{precision}: {miss}" for precision, found in engines.items() for miss in found.misses]
        wrong = next(precision for precision, found in engines.items() if not found.passed)
        message = f"engines miss their tolerance: {'; '.join(misses[:4])}"
        raise CheckError(message, fix=advice(host.config, wrong, engine=True), result=result)
    return result


def benchmark_bundle(
    host: EngineHost,
    *,
    precisions: Sequence[str],
    warmup_seconds: float,
    cuda_graphs: Sequence[bool] = (True,),
    end_to_end: bool = True,
    ceilings: bool = False,
) -> BenchmarkResult:
    """Measures a bundle's engines and writes `benchmark.json` and, with matplotlib, `benchmark.png`.

    Args:
        host: whose bundle holds the engines; `config.benchmark` has batches, streams and seconds.
        precisions: which engines.
        warmup_seconds: run before each measurement.
        cuda_graphs: with CUDA graphs, without, or both.
        end_to_end: also measure with images copied from the host.
        ceilings: also measure the GPU's limits; otherwise its data sheet is used.

    Returns:
        What `benchmark.json` holds.

    Raises:
        BenchmarkError: nothing could be measured.
        BuildError: an engine is missing or does not belong here.
    """
    bundle, progress = host.bundle, host.progress
    engines = {
        precision: open_engine(host.backend, bundle, find_plan(host.backend, bundle, precision))
        for precision in precisions
    }
    options, path = host.config.benchmark, bundle.benchmark
    cases = plan_cases(precisions, options.batches, options.streams, cuda_graphs=cuda_graphs, end_to_end=end_to_end)
    here = environment(host.backend)
    running = BenchmarkResult(
        **{field.name: getattr(here, field.name) for field in dataclasses.fields(here)},
        model=describe_model(bundle),
        command=host.command,
        onnx=Manifest.read(bundle).files.graph_hashes(bundle.onnx()),
        seconds=options.seconds,
        warmup_seconds=warmup_seconds,
        status="running",
        rows=(),
        skipped=(),
        summary="",
    )

    def save(rows: Sequence[BenchmarkRow], skipped: Sequence[SkippedCase]) -> None:
        write_json(path, dataclasses.replace(running, rows=tuple(rows), skipped=tuple(skipped)).to_dict())

    rows, skipped = run_cases(
        engines, cases, seconds=options.seconds, warmup_seconds=warmup_seconds, progress=progress, save=save
    )
    if not rows:
        raise BenchmarkError(
            f"nothing was measured: {skipped[0].reason}", fix="Choose batches that the engines have profiles for."
        )
    proofs = {precision: proof_of(engine.path, host.judge) for precision, engine in engines.items()}
    verified = {precision: proof for precision, proof in proofs.items() if proof is not None}
    best = max(rows, key=lambda row: row.images_per_second)
    result = dataclasses.replace(
        running,
        status="done",
        rows=tuple(rows),
        skipped=tuple(skipped),
        noise_percent=max((row.noise_percent for row in rows if row.noise_percent is not None), default=None),
        end_to_end=tuple(end_to_end_shares(rows)),
        recommended=recommend_measured(rows, verified, min_gain=options.min_gain),
        roofline=roofline_of(host, precisions, measured=ceilings),
        summary=f"{best.precision} at batch {best.batch}: {best.images_per_second:,.0f} images/s",
    )
    write_json(path, result.to_dict())
    if (reason := plot_rows(rows, path.with_suffix(".png"), title=here.gpu)) != "":
        progress.say(f"no plot: {reason}")
    return result


def end_to_end_shares(rows: Sequence[BenchmarkRow]) -> list[TransferShare]:
    """How much of the device-resident throughput remains when images are copied from the host and results back.

    Args:
        rows: of the benchmark.

    Returns:
        For each row with transfers, its share of the best device-resident row of the same engine and batch.
    """
    best: dict[tuple[str, int], float] = {}
    for row in rows:
        if row.transfers == RESIDENT:
            key = row.precision, row.batch
            best[key] = max(best.get(key, 0.0), row.images_per_second)
    return [
        TransferShare(
            precision=row.precision,
            batch=row.batch,
            share=round(row.images_per_second / best[row.precision, row.batch], 4),
        )
        for row in rows
        if row.transfers == END_TO_END and (row.precision, row.batch) in best
    ]


def environment(backend: Backend | None) -> Environment:
    """The hardware, software and date to record with a measurement, with or without TensorRT."""
    gpu = (backend.gpu if backend else None) or cuda.gpu()
    return Environment(
        gpu=gpu.name if gpu else "",
        arch=gpu.arch if gpu else "",
        driver=gpu.driver if gpu else "",
        cuda=gpu.cuda if gpu else "",
        gpu_memory_total_mib=gpu.memory_bytes // 2**20 if gpu else 0,
        cpu=cpu_model(),
        cores=num_cores(),
        backend=backend.name if backend else "",
        tensorrt=backend.version if backend else "",
        python=platform.python_version(),
        vit_convert=__version__,
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    )


def add_to_report(
    host: EngineHost,
    *,
    build: Sequence[EngineSummary] = (),
    verify: Verification | None = None,
    benchmark: BenchmarkResult | None = None,
    tuning: Sequence[TunedEngine] = (),
) -> None:
    """Merges the results from a GPU host into the bundle's report.json.

    Args:
        host: whose bundle holds the report; a new one is begun if it is missing.
        build: what `build_bundle` built.
        verify: result of `verify_bundle`.
        benchmark: result of `benchmark_bundle`.
        tuning: what `tune` tried.
    """

    def verified(engines: Sequence[EngineSummary]) -> dict[str, Proof]:
        proofs = {row.path: proof_of(host.bundle.root / row.path, host.judge) for row in engines}
        return {path: proof for path, proof in proofs.items() if proof is not None}

    def change(report: Report) -> Report:
        if build:
            report = with_engines(report, build, verified(build).keys())
        if tuning:
            report = dataclasses.replace(report, tuning=tuple(tuning))
        if verify is not None:
            report = with_verification(report, verify)
        if benchmark is not None:
            report = with_benchmark(report, benchmark)
            if benchmark.recommended is not None and benchmark.recommended.precision:
                return report
        tf32 = host.config.engine.tf32
        return with_recommendation(report, Evidence(verified(report.engines), host.facts.checks, report.verdicts, tf32))

    update(host.bundle, change, Report)
