"""The schemas of `report.json`, and the one writer of it: for conversions, and for the commands on a GPU host.

`Report` has every key of a model's file, `PairReport` those of a pair of towers; their sections are records that
document their own keys. Keys that do not apply are empty or missing. Files of earlier versions are read, too, and their
unknown keys stay unchanged.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import TypeVar

from vit_convert.core.benchmark_results import BenchmarkRow, Recommendation
from vit_convert.core.bundle import Bundle, read_json, write_json
from vit_convert.core.check_results import GraphCheck, LargestActivation, PlanResult, SensitivityResult, Verdict
from vit_convert.core.engine_results import EngineSummary, RecommendedEngine, Verification
from vit_convert.core.errors import UsageError
from vit_convert.core.manifest import StageRecord
from vit_convert.core.pair import PairFacts
from vit_convert.core.pair_results import SimilarityCheck, ZeroShot
from vit_convert.core.record import Record, RecordError, optional, section
from vit_convert.core.roofline import Roofline
from vit_convert.core.stage_results import Calibration, Checkpoint, OnnxGraph, Reference
from vit_convert.core.tune_results import TunedEngine


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageRow(Record):
    """How one stage went.

    Attributes:
        name: as --until calls it.
        status: "done", "fresh" (nothing changed since an earlier run) or "failed".
        seconds: wall time.
        peak_rss_mib: largest resident memory of the process while it ran.
        error: of one that failed.
    """

    name: str
    status: str
    seconds: float
    peak_rss_mib: float
    error: str | None = optional()

    @classmethod
    def of(cls, row: StageRecord) -> "StageRow":
        """The report's row for a stage in the manifest."""
        return cls(
            name=row.name,
            status=row.status,
            seconds=row.seconds or 0.0,
            peak_rss_mib=row.peak_rss_mib or 0.0,
            error=row.error,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report(Record):
    """All results of a conversion and its engines.

    Attributes:
        name: of the bundle.
        vit_convert: version that converted.
        command: the command line.
        date: when, in UTC (ISO 8601).
        status: "done" or "failed".
        versions: of the packages that converted.
        hashes: SHA-256 in hex of each graph and its weights, by file.
        checkpoint: what is converted.
        stages: those that ran or were fresh, in order.
        onnx: the graph model.onnx.
        reference: the images that graphs and engines are compared on.
        check: of model.onnx, or of the first graph that was checked.
        checks: by precision, each graph that was checked.
        max_abs_activation: by block, for TensorRT 8.6, which has no fp16 graph.
        calibration: the ranges of int8 and fp8.
        sensitivity: what each layer loses when it is quantized.
        plan: the layers that precision=auto quantizes.
        accuracy: top-1 in percent of "jax", "onnx" (fp32), each lower precision, and "engine".
        verdicts: by quantized precision, whether its loss is allowed.
        engines: all that were built.
        engine: the recommended one.
        benchmark: the measurements.
        verify: what verification found.
        recommended: the conclusion from the measurements.
        roofline: the model's work and the GPU's limits, to compare the measurements with.
        tuning: the engines that `tune` tried.

    Example:
        >>> report = Report.from_dict({"name": "vit_b32", "checks": {"fp32": {"passed": True, "cosine": 1.0}}})
        >>> report.checks["fp32"].passed, report.engine
        (True, None)
    """

    name: str
    vit_convert: str
    command: str
    date: str
    status: str
    versions: Mapping[str, str]
    hashes: Mapping[str, str]
    checkpoint: Checkpoint | None = section()
    stages: tuple[StageRow, ...]
    onnx: OnnxGraph | None = section()
    reference: Reference | None = section()
    check: GraphCheck | None = section()
    checks: Mapping[str, GraphCheck]
    max_abs_activation: Mapping[str, LargestActivation] | None = optional()
    calibration: Calibration | None = section()
    sensitivity: SensitivityResult | None = section()
    plan: PlanResult | None = section()
    accuracy: Mapping[str, float | None]
    verdicts: Mapping[str, Verdict]
    engines: tuple[EngineSummary, ...]
    engine: RecommendedEngine | None = section()
    benchmark: tuple[BenchmarkRow, ...]
    verify: Verification | None = optional()
    recommended: Recommendation | None = optional()
    roofline: Roofline | None = optional()
    tuning: tuple[TunedEngine, ...] | None = optional()


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairCheckpoint(Record):
    """The checkpoint of two towers.

    Attributes:
        path: of the file.
        sha256: of the file, in hex.
        family: its name.
        variant: for example "SigLIP-B/16".
        image_size: [height, width] of the image tower in pixels.
        num_params: of both towers.
    """

    path: str
    sha256: str
    family: str
    variant: str
    image_size: tuple[int, ...]
    num_params: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class TowerCheck(Record):
    """One graph of a tower compared with JAX.

    Attributes:
        passed: whether it met its tolerance.
        max_rel: largest absolute difference, over the output's largest magnitude.
        cosine: smallest of any sample.
    """

    passed: bool
    max_rel: float
    cosine: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class TowerReport(Record):
    """A summary of one tower, whose own bundle has a full `Report`.

    Attributes:
        bundle: its folder in the pair's.
        report: its report, in the pair's folder.
        status: "done" or "failed".
        engine: the recommended one.
        verdicts: by quantized precision, whether its loss is allowed.
        checks: by precision, each graph that was checked.
    """

    bundle: str
    report: str
    status: str
    engine: RecommendedEngine | None = section()
    verdicts: Mapping[str, Verdict]
    checks: Mapping[str, TowerCheck]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Samples(Record):
    """The samples on which similarities were compared.

    Attributes:
        source: "evaluation data" or "seeded noise".
    """

    source: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairReport(Record):
    """All results of two towers as a pair.

    Attributes:
        name: of the pair's folder.
        vit_convert: version that converted.
        command: the command line.
        date: when, in UTC (ISO 8601).
        status: "done" or "failed".
        pair: how embeddings are compared, as in `pair.json`.
        checkpoint: of both towers.
        towers: by "image" and "text".
        stages: those of the pair that ran or were fresh, in order; a tower's own stages are in its report.
        similarity: the images and texts that were compared.
        checks: by precision, the graphs' similarities.
        zero_shot: if there are labelled images and class prompts.
        accuracy: zero-shot top-1 in percent of "jax" and of each precision's graphs.
        engines: by precision, the engines' similarities.

    Example:
        >>> report = PairReport.from_dict({"name": "siglip", "pair": {"logit_scale": 9.5, "similarity": "sigmoid"}})
        >>> report.pair.logit_scale, dict(report.checks)
        (9.5, {})
    """

    name: str
    vit_convert: str
    command: str
    date: str
    status: str
    pair: PairFacts | None = section()
    checkpoint: PairCheckpoint | None = section()
    towers: Mapping[str, TowerReport]
    stages: tuple[StageRow, ...]
    similarity: Samples | None = section()
    checks: Mapping[str, SimilarityCheck]
    zero_shot: ZeroShot | None = optional()
    accuracy: Mapping[str, float | None]
    engines: Mapping[str, SimilarityCheck]


_Kind = TypeVar("_Kind", Report, PairReport)


def read_report(bundle: Bundle) -> Report | None:
    """Reads a bundle's report; None if it is missing or damaged.

    Args:
        bundle: of a conversion by this or an earlier version.
    """
    return read(bundle, Report)


def read(bundle: Bundle, kind: type[_Kind]) -> _Kind | None:
    """Reads a report; None if it is missing, damaged or of another kind.

    Args:
        bundle: holds the report; of a pair, the folder of both towers.
        kind: Report or PairReport.
    """
    try:
        return kind.from_dict(found) if (found := read_json(bundle.report)) is not None else None
    except (RecordError, UsageError):
        return None


def write(bundle: Bundle, report: Report | PairReport) -> None:
    """Writes the report of a conversion.

    Args:
        bundle: gets `report.json`.
        report: its content.
    """
    write_json(bundle.report, report.to_dict())


def update(bundle: Bundle, change: Callable[[_Kind], _Kind], kind: type[_Kind]) -> None:
    """Changes a report; all other keys stay unchanged, including those of other versions.

    Args:
        bundle: holds the report; a new one is started if it is missing or damaged.
        change: maps the report to the new one.
        kind: Report or PairReport.
    """
    before = read(bundle, kind)
    if before is None:
        write(bundle, change(kind.from_dict({"name": bundle.root.name})))
        return
    known, changed = before.to_dict(), change(before).to_dict()
    kept = {key: value for key, value in read_json(bundle.report, {}).items() if key not in known or key in changed}
    write_json(bundle.report, kept | {key: value for key, value in changed.items() if value != known.get(key)})
