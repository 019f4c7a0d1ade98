"""The results of tuning engines, as stored in `tune.json`."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from vit_convert.core.benchmark_results import BenchmarkRow, Environment, MeasuredModel, SkippedCase
from vit_convert.core.engine_results import AttentionKernels
from vit_convert.core.record import Record, optional


@dataclasses.dataclass(frozen=True, kw_only=True)
class TunedTrial(Record):
    """One engine that was tried.

    Attributes:
        lowering: name of the graph's lowering.
        profile: its only profile: "fixed 64" or "range 1-8-64".
        sizes: {"min", "opt", "max"} batch of the profile.
        precision: of the engine.
        batches: batch sizes at which it was timed.
        seconds: of one pass over one of them.
        options: the config keys that its build depends on, with their values.
        key: hash of all that the result depends on.
        date: in UTC (ISO 8601).
        failed: why it could not be built or run; the keys below are then missing.
        plan: the engine, in the bundle.
        build_seconds: wall time of its build.
        fused_attention: None if unknown.
        cosine: smallest of any image, to JAX.
        passed: whether it met its tolerance.
        misses: in words.
        rows: what was measured.
        skipped: cases that could not be measured.
    """

    lowering: str
    profile: str
    sizes: Mapping[str, int]
    precision: str
    batches: tuple[int, ...]
    seconds: float
    options: Mapping[str, Any]
    key: str
    date: str
    failed: str | None = optional()
    plan: str | None = optional()
    build_seconds: float | None = optional()
    fused_attention: AttentionKernels | None = optional()
    cosine: float | None = optional()
    passed: bool | None = optional()
    misses: tuple[str, ...] = ()
    rows: tuple[BenchmarkRow, ...] = ()
    skipped: tuple[SkippedCase, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Winner(Record):
    """The fastest trial of one precision at one batch.

    Attributes:
        precision: of the engine.
        batch: images of a run.
        key: of the trial.
        lowering: of the trial.
        profile: of the trial.
        sizes: of the trial.
        options: of the trial, where they differ from the bundle's own config.
        images_per_second: at this batch.
        noise_percent: of the measurement; None of one pass.
        ratio: to the default lowering's best; None if that was not tried.
        within_noise_of: the next engine, if the lead over it is within the noise of both; otherwise "".
    """

    precision: str
    batch: int
    key: str
    lowering: str
    profile: str
    sizes: Mapping[str, int]
    options: Mapping[str, Any]
    images_per_second: float
    noise_percent: float | None
    ratio: float | None
    within_noise_of: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class TunedEngine(Record):
    """A summary of one trial at one batch, for the report.

    Attributes:
        precision: of the engine.
        lowering: of the trial.
        profile: of the trial.
        batch: images per run; None if the trial failed.
        images_per_second: at this batch.
        fused_attention: in words.
        note: "fastest", what it missed, or why it failed.
        words: flags that build it as the bundle's engine; "" if another is faster.
    """

    precision: str
    lowering: str
    profile: str
    batch: int | None
    images_per_second: float | None
    fused_attention: str
    note: str
    words: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class TuneResult(Environment):
    """What the tune command returns, and `tune.json` holds.

    Attributes:
        model: that was tuned.
        command: the command line.
        onnx: hashes of model.onnx; while they are the same, the trials hold.
        trials: all that are still valid, including those of earlier commands.
        winners: by precision and batch.
    """

    model: MeasuredModel
    command: str
    onnx: Mapping[str, str]
    trials: tuple[TunedTrial, ...]
    winners: tuple[Winner, ...]
