"""`batch.json`: the record of a whole batch, with one writer; and the same as a table."""

import csv
import dataclasses
import pathlib
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vit_convert.batch.outcome import Checked, Outcome
from vit_convert.core.bundle import atomic, read_json, write_json
from vit_convert.core.record import Record, RecordError
from vit_convert.core.version import __version__

SCHEMA = "vit_convert.batch/1"


@dataclasses.dataclass(frozen=True)
class BatchRecord(Record):
    """The content and schema of `batch.json`.

    Attributes:
        schema: version of these attributes; files with another one are not read.
        vit_convert: version of the writer.
        command: the last command line.
        begun, updated: in UTC, ISO 8601.
        status: "running", or how the last command ended: "done", "failed", "interrupted".
        counts: jobs by status.
        jobs: in the order of the request.
    """

    schema: str
    vit_convert: str
    command: str
    begun: str
    updated: str
    status: str
    counts: Mapping[str, int]
    jobs: tuple[Outcome, ...]

    @classmethod
    def of(cls, command: str, begun: str, status: str, outcomes: Iterable[Outcome]) -> "BatchRecord":
        """The record of these outcomes, dated now."""
        jobs = tuple(outcomes)
        counts: dict[str, int] = {}
        for job in jobs:
            counts[job.status] = counts.get(job.status, 0) + 1
        return cls(SCHEMA, __version__, command, begun, now(), status, counts, jobs)

    def write(self, path: pathlib.Path) -> None:
        """Writes the file, whole or not at all."""
        write_json(path, self)

    @classmethod
    def read(cls, path: pathlib.Path) -> "BatchRecord | None":
        """Reads a file; None if it is missing, damaged or of another schema."""
        value = read_json(path)
        if not value or value.get("schema") != SCHEMA:
            return None
        try:
            return cls.from_dict(value)
        except RecordError:
            return None


def now() -> str:
    """The time in UTC, ISO 8601."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


_COLUMNS = ("name", "checkpoint", "status", "exit_code", "seconds", "peak_rss_mib", "host", "attempts")
_OF_ENGINES = ("status", "recommended", "images_per_second")
_FIGURES = ("family", "variant", "num_params", "onnx_bytes", "top1")


def write_table(path: pathlib.Path, jobs: Sequence[Outcome]) -> None:
    """Writes one row per job, with columns for each precision and each type of GPU that occurs."""
    precisions = list(dict.fromkeys(check.precision for job in jobs for check in job.figures.checks))
    gpus = list(dict.fromkeys(engine.gpu for job in jobs for engine in job.engines))
    header = [
        *_COLUMNS,
        *_FIGURES,
        "image_size",
        *(f"{p}_{what}" for p in precisions for what in ("passed", "cosine", "top1")),
        *(f"{_column(gpu)}_{what}" for gpu in gpus for what in _OF_ENGINES),
        "warnings",
        "error",
    ]
    with atomic(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, header, lineterminator="\n")
        writer.writeheader()
        writer.writerows(_row(job) for job in jobs)


def _row(job: Outcome) -> dict[str, Any]:
    row: dict[str, Any] = {column: getattr(job, column) for column in _COLUMNS}
    row |= {column: getattr(job.figures, column) for column in _FIGURES}
    row |= {"image_size": "x".join(map(str, job.figures.image_size)), "error": " ".join(job.error.split())}
    row["warnings"] = " ".join("; ".join(job.figures.warnings).split())
    for check in job.figures.checks:
        row |= _cells(check)
    for engine in job.engines:
        row |= {f"{_column(engine.gpu)}_{what}": getattr(engine, what) for what in _OF_ENGINES}
    return row


def _column(gpu: str) -> str:
    return gpu or "gpu"


def _cells(check: Checked) -> dict[str, Any]:
    return {f"{check.precision}_{what}": getattr(check, what) for what in ("passed", "cosine", "top1")}
