"""Measures latency and throughput of engines over batches, streams and precisions, and records the conditions of each
number."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from vit_convert.core.benchmark_results import BenchmarkRow, MeasuredEngine, SkippedCase
from vit_convert.core.errors import BenchmarkError, ConvertError
from vit_convert.core.progress import Progress
from vit_convert.core.recommend import RESIDENT
from vit_convert.core.text_table import text_table
from vit_convert.engine.backend import cuda
from vit_convert.engine.measure.loops import Latency, Worker, measure_latency, measure_throughput
from vit_convert.engine.measure.monitor import Monitor, merge_summaries
from vit_convert.engine.runtime.engine import Engine
from vit_convert.engine.runtime.profiles import Shape, choose_profile, describe
from vit_convert.engine.runtime.session import Session

END_TO_END = "images in and results out, page-locked host memory"  # or RESIDENT
_MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of the benchmark.

    Attributes:
        precision: which engine.
        batch: images per run.
        streams: concurrent sessions, each with a stream of its own.
        transfers: whether every run copies images from the host and results back.
        cuda_graph: whether runs are replayed CUDA graphs.
    """

    precision: str
    batch: int
    streams: int
    transfers: bool
    cuda_graph: bool


@dataclasses.dataclass(frozen=True)
class Pass:
    """The result of one pass over a case.

    Attributes:
        images_per_second: with runs queued ahead.
        latency: with one run at a time on each stream.
        context_bytes: GPU memory of the sessions.
        cuda_graph: whether graphs were actually used.
        why_no_graph: why not; otherwise "".
        gpu: clocks, power and memory from NVML.
    """

    images_per_second: float
    latency: Latency
    context_bytes: int
    cuda_graph: bool
    why_no_graph: str
    gpu: Mapping[str, float]


def plan_cases(
    precisions: Sequence[str],
    batches: Sequence[int],
    streams: Sequence[int],
    *,
    cuda_graphs: Sequence[bool] = (True,),
    end_to_end: bool = True,
) -> list[Case]:
    """The rows to measure.

    Args:
        precisions: engines, by precision.
        batches: images per run.
        streams: numbers of streams.
        cuda_graphs: with CUDA graphs, without, or both.
        end_to_end: add a row with transfers for each batch, on the largest number of streams, as in a server.

    Returns:
        The cases, grouped by batch.
    """
    cases = []
    for batch in batches:
        for precision in precisions:
            cases += [Case(precision, batch, count, False, graph) for count in streams for graph in cuda_graphs]
            if end_to_end:
                cases.append(Case(precision, batch, max(*streams, 2), True, cuda_graphs[0]))
    return cases


def run_cases(
    engines: Mapping[str, Engine],
    cases: Sequence[Case],
    *,
    seconds: float,
    warmup_seconds: float,
    progress: Progress,
    save: Callable[[list[BenchmarkRow], list[SkippedCase]], None],
) -> tuple[list[BenchmarkRow], list[SkippedCase]]:
    """Measures every case in two passes over all cases; the difference between the passes shows how reliable a number
    is.

    Args:
        engines: by precision, loaded.
        cases: what to measure.
        seconds: of one pass over one case: half of it for latency, half for throughput.
        warmup_seconds: run before each measurement.
        progress: what people see.
        save: called with rows and skipped cases after every case, so that an interrupted benchmark keeps its results.

    Returns:
        Rows (see `summarise_case`), and the cases that were skipped, each with its reason.
    """
    passes: dict[Case, list[Pass]] = {}
    skipped: dict[Case, str] = {}
    monitor = Monitor()
    if untold := monitor.missing:
        progress.warn(f"clocks and power are not sampled: {monitor.missing}")
    with progress.bar("benchmark", total=2 * len(cases)) as advance:
        for _ in range(2):
            for case in cases:
                if case not in skipped:
                    try:
                        found = _run_case(engines[case.precision], case, seconds, warmup_seconds, monitor)
                        passes.setdefault(case, []).append(found)
                    except ConvertError as e:  # out of memory at one batch says nothing about the others
                        skipped[case] = str(e)
                        progress.warn(f"{case.precision} at batch {case.batch}, {case.streams} streams: skipped: {e}")
                save(*_results(engines, passes, skipped))
                advance(1)
    if monitor.missing and not untold:
        progress.warn(f"clocks and power were not sampled to the end: {monitor.missing}")
    return _results(engines, passes, skipped)


def _results(
    engines: Mapping[str, Engine], passes: Mapping[Case, list[Pass]], skipped: Mapping[Case, str]
) -> tuple[list[BenchmarkRow], list[SkippedCase]]:
    rows = [summarise_case(case, found, _about(engines[case.precision])) for case, found in passes.items()]
    return rows, [SkippedCase(**dataclasses.asdict(case), reason=reason) for case, reason in skipped.items()]


def _about(engine: Engine) -> MeasuredEngine:
    summary = engine.record.summary
    fused = summary.fused_attention if summary else None
    return MeasuredEngine(
        graph=pathlib.Path(engine.record.onnx.path).name,
        input=engine.leading.dtype.name,
        plan_bytes=engine.record.plan.bytes,
        build_seconds=engine.record.build_seconds,
        engine_memory_mib=round(engine.memory_bytes / _MIB, 1),
        int8_layers=summary.int8_layers if summary else None,
        fused_attention=fused.text if fused else None,
    )


def _run_case(engine: Engine, case: Case, seconds: float, warmup_seconds: float, monitor: Monitor) -> Pass:
    shape = shape_to_measure(engine, case.batch)
    free = cuda.free_memory_bytes()
    sessions: list[Session] = []
    try:
        for _ in range(case.streams):
            sessions.append(Session(engine, cuda_graphs=case.cuda_graph))
        workers = [Worker(session, shape, transfers=case.transfers) for session in sessions]
        context_bytes = max(0, free - cuda.free_memory_bytes())
        measure_throughput(workers, warmup_seconds)
        with monitor:
            images_per_second = measure_throughput(workers, seconds / 2)
        latency = measure_latency(workers, seconds / 2)
        first = workers[0].prepared
        return Pass(
            images_per_second, latency, context_bytes, first.graph is not None, first.why_no_graph, monitor.summary()
        )
    finally:
        for session in sessions:
            session.close()


def shape_to_measure(engine: Engine, batch: int) -> Shape:
    """The input shape of a batch that the engine runs without padding.

    Args:
        engine: the loaded engine.
        batch: images per run.

    Raises:
        BenchmarkError: no profile takes it, or it would be padded, so that another size would be measured.
    """
    shape = (batch, *engine.ranges[0].optimal[1:])
    choice = choose_profile(engine.ranges, shape)
    if choice.shape != shape:
        raise BenchmarkError(
            f"batch {batch} would be padded to {choice.shape[0]}: the engine takes {describe(engine.ranges)}"
        )
    return shape


def summarise_case(case: Case, passes: Sequence[Pass], about: MeasuredEngine) -> BenchmarkRow:
    """Makes one row.

    Args:
        case: what was measured.
        passes: its one or two passes.
        about: what is the same for all rows of the engine.

    Returns:
        The row; gpu_memory_mib is the peak: engine and sessions, which allocate nothing while they run.
    """
    rates = [found.images_per_second for found in passes]
    mean = float(np.mean(rates))
    wall = np.concatenate([found.latency.wall_ms for found in passes])
    gpu = np.concatenate([found.latency.gpu_ms for found in passes])
    context_mib = max(found.context_bytes for found in passes) / _MIB
    p50, p95, p99 = _percentiles(wall)
    gpu_p50, gpu_p95, gpu_p99 = _percentiles(gpu)
    clocks: Mapping[str, Any] = merge_summaries([found.gpu for found in passes])
    return BenchmarkRow(
        precision=case.precision,
        batch=case.batch,
        streams=case.streams,
        transfers=END_TO_END if case.transfers else RESIDENT,
        cuda_graph=passes[0].cuda_graph,
        why_no_graph=passes[0].why_no_graph or None if case.cuda_graph else None,
        images_per_second=round(mean, 1),
        noise_percent=round(100 * (max(rates) - min(rates)) / mean, 2) if len(rates) > 1 else None,
        p50_ms=p50,
        p95_ms=p95,
        p99_ms=p99,
        gpu_p50_ms=gpu_p50,
        gpu_p95_ms=gpu_p95,
        gpu_p99_ms=gpu_p99,
        runs=len(wall),
        gpu_memory_mib=round(about.engine_memory_mib + context_mib, 1),
        context_memory_mib=round(context_mib, 1),
        **about.to_dict(),
        **clocks,
    )


def _percentiles(milliseconds: np.ndarray) -> list[float]:
    return [round(float(np.percentile(milliseconds, q)), 4) for q in (50, 95, 99)]


def rows_table(rows: Sequence[BenchmarkRow]) -> str:
    """The rows as text for a terminal."""
    header = (
        "precision",
        "batch",
        "streams",
        "transfers",
        "graph",
        "images/s",
        "±%",
        "p50 ms",
        "p95 ms",
        "p99 ms",
        "GPU p50",
        "GPU MiB",
        "MHz",
        "W",
    )
    return text_table(header, [_cells(row) for row in rows])


def _cells(row: BenchmarkRow) -> list[str]:
    def number(value: float | None, digits: int) -> str:
        return "" if value is None else f"{value:,.{digits}f}".replace(",", " ")

    copied = "in+out" if row.transfers == END_TO_END else "none"
    return [
        row.precision,
        str(row.batch),
        str(row.streams),
        copied,
        "on" if row.cuda_graph else "off",
        number(row.images_per_second, 0),
        number(row.noise_percent, 1),
        *(number(value, 3) for value in (row.p50_ms, row.p95_ms, row.p99_ms, row.gpu_p50_ms)),
        *(number(value, 0) for value in (row.gpu_memory_mib, row.sm_clock_mhz, row.power_w)),
    ]
