"""The results of a benchmark, and its recommendation."""

import dataclasses
from collections.abc import Mapping

from vit_convert.core.record import Record, StageResult, optional
from vit_convert.core.roofline import Roofline


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeasuredEngine(Record):
    """What all rows of one engine have in common; `BenchmarkRow` has the same fields.

    Attributes:
        graph: the graph that it was built from.
        input: its type.
        plan_bytes: its size.
        build_seconds: wall time of its build.
        engine_memory_mib: without its sessions.
        int8_layers: number of products that run in int8; None if unknown.
        fused_attention: in words ("yes, fp16, 12 of 12"); None if unknown.
    """

    graph: str
    input: str
    plan_bytes: int
    build_seconds: float
    engine_memory_mib: float
    int8_layers: int | None = optional()
    fused_attention: str | None = optional()


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchmarkRow(Record):
    """One measurement of one engine; percentiles are of all runs.

    Attributes:
        precision: of the engine.
        batch: images of a run.
        streams: runs at once.
        transfers: whether each run copies its images from the host and its results back, in words.
        cuda_graph: whether runs are replayed CUDA graphs.
        why_no_graph: if they are not, why.
        images_per_second: mean of the passes.
        noise_percent: difference between the passes over their mean; None for a single pass.
        p50_ms: wall time of a run, median.
        p95_ms: wall time, 95th percentile.
        p99_ms: wall time, 99th percentile.
        gpu_p50_ms: GPU time of a run, median.
        gpu_p95_ms: GPU time, 95th percentile.
        gpu_p99_ms: GPU time, 99th percentile.
        runs: number of runs that latency was measured on.
        gpu_memory_mib: of engine and sessions.
        engine_memory_mib: of the engine.
        context_memory_mib: of the sessions.
        graph: that the engine was built from.
        input: its type.
        plan_bytes: size of the engine.
        build_seconds: wall time of its build.
        int8_layers: products that run in int8.
        fused_attention: in words.
        sm_clock_mhz: mean.
        sm_clock_min_mhz: smallest.
        memory_clock_mhz: mean.
        power_w: mean.
        power_max_w: largest.
        utilization_percent: mean.
        temperature_c: mean.
        device_memory_mib: of all processes, mean.
        device_memory_max_mib: largest.
    """

    precision: str
    batch: int
    streams: int
    transfers: str
    cuda_graph: bool
    why_no_graph: str | None = optional()
    images_per_second: float
    noise_percent: float | None = None
    p50_ms: float
    p95_ms: float
    p99_ms: float
    gpu_p50_ms: float
    gpu_p95_ms: float
    gpu_p99_ms: float
    runs: int
    gpu_memory_mib: float
    engine_memory_mib: float
    context_memory_mib: float
    graph: str
    input: str
    plan_bytes: int
    build_seconds: float
    int8_layers: int | None = optional()
    fused_attention: str | None = optional()
    sm_clock_mhz: float | None = optional()
    sm_clock_min_mhz: float | None = optional()
    memory_clock_mhz: float | None = optional()
    power_w: float | None = optional()
    power_max_w: float | None = optional()
    utilization_percent: float | None = optional()
    temperature_c: float | None = optional()
    device_memory_mib: float | None = optional()
    device_memory_max_mib: float | None = optional()


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpeedComparison(Record):
    """A quantized engine beside the best unquantized one at one batch.

    Attributes:
        precision: of the quantized one.
        against: the other.
        batch: images of a run.
        ratio: its images per second over those of the other.
        noise_percent: of the two measurements together; None if there was only one pass.
        pays: whether the gain exceeds both the noise and `benchmark.min_gain`.
    """

    precision: str
    against: str
    batch: int
    ratio: float
    noise_percent: float | None = None
    pays: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recommendation(Record):
    """Which precision a benchmark recommends.

    Attributes:
        precision: "" for none.
        reason: for people.
        top1: of that engine in percent.
        comparisons: of quantized engines.
    """

    precision: str
    reason: str
    top1: float | None = None
    comparisons: tuple[SpeedComparison, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SkippedCase(Record):
    """A measurement that failed.

    Attributes:
        precision: of the engine.
        batch: images of a run.
        streams: runs at once.
        transfers: whether runs were to copy images and results.
        cuda_graph: whether runs were to be replayed CUDA graphs.
        reason: in words.
    """

    precision: str
    batch: int
    streams: int
    transfers: bool
    cuda_graph: bool
    reason: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransferShare(Record):
    """The share of the throughput that remains when images are copied from the host and results back.

    Attributes:
        precision: of the engine.
        batch: images of a run.
        share: of the throughput of the best row without transfers.
    """

    precision: str
    batch: int
    share: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeasuredModel(Record):
    """The model of a measurement.

    Attributes:
        variant: of the checkpoint.
        summary: of the checkpoint, for people.
        sha256: of its file.
        converted_by: the command that converted it.
    """

    variant: str | None = optional()
    summary: str | None = optional()
    sha256: str | None = optional()
    converted_by: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Environment(Record):
    """Where and when something was measured; unknown values are "" or 0.

    Attributes:
        gpu: its name.
        arch: its architecture ("sm90").
        driver: version.
        cuda: version that the driver supports.
        gpu_memory_total_mib: of the GPU.
        cpu: its name.
        cores: that this process may use.
        backend: "tensorrt" or "rtx".
        tensorrt: version of the backend.
        python: version.
        vit_convert: version.
        date: in UTC (ISO 8601).
    """

    gpu: str
    arch: str
    driver: str
    cuda: str
    gpu_memory_total_mib: int
    cpu: str
    cores: int
    backend: str
    tensorrt: str
    python: str
    vit_convert: str
    date: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchmarkResult(Environment, StageResult):
    """What the benchmark stage and command return, and `benchmark.json` holds.

    Attributes:
        model: that was measured.
        command: the command line.
        onnx: hashes of model.onnx; while they are the same, the measurements hold.
        seconds: of one pass over one row.
        warmup_seconds: before each measurement.
        status: "running" or "done".
        rows: what was measured.
        skipped: what failed.
        noise_percent: largest noise of any row.
        end_to_end: rows with transfers, compared with those without.
        recommended: the conclusion from the rows.
        roofline: the model's work and the GPU's limits.
    """

    model: MeasuredModel
    command: str
    onnx: Mapping[str, str]
    seconds: float
    warmup_seconds: float
    status: str
    rows: tuple[BenchmarkRow, ...]
    skipped: tuple[SkippedCase, ...]
    noise_percent: float | None = None
    end_to_end: tuple[TransferShare, ...] = ()
    recommended: Recommendation | None = optional()
    roofline: Roofline | None = optional()
