"""The outcome of a job."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from vit_convert.core.record import Record

DONE = ("done", "fresh")
PENDING = "pending"


@dataclasses.dataclass(frozen=True)
class Checked(Record):
    """How one precision's graph compares with JAX.

    Attributes:
        precision: "fp32", "fp16", …; for a pair's towers "image/fp32", ….
        passed: whether it met its tolerance.
        cosine: smallest of any image, to JAX; None if not measured.
        top1: in percent; None without labelled images.
    """

    precision: str
    passed: bool
    cosine: float | None = None
    top1: float | None = None


@dataclasses.dataclass(frozen=True)
class Figures(Record):
    """A summary of a bundle's report.

    Attributes:
        family, variant: of the model.
        num_params: its parameters.
        image_size: (height, width) in pixels.
        onnx_bytes: of model.onnx and its weights.
        top1: of JAX, in percent; None without labelled images.
        checks: one per precision, in order.
        warnings: oddities of a checkpoint that was converted nevertheless, such as a head of zeros.
    """

    family: str = ""
    variant: str = ""
    num_params: int = 0
    image_size: tuple[int, ...] = ()
    onnx_bytes: int = 0
    top1: float | None = None
    checks: tuple[Checked, ...] = ()
    warnings: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class EngineOutcome(Record):
    """The outcome for a bundle's engines on one type of GPU.

    Attributes:
        gpu: the type, by its name in the cluster or the driver; "" if unknown.
        device: which GPU of its host.
        host: where it ran.
        status: "done", "fresh" (nothing had changed), "failed" or "timeout".
        exit_code: what `python -m vit_convert.engine` ended with; 130 after a timeout.
        seconds: of the last attempt.
        attempts: how often it was begun by this command.
        error: what went wrong, and `fix` what to do about it; "" otherwise.
        passing: whether another attempt may succeed.
        gpu_name: the GPU of the benchmark; "" without one.
        recommended: the precision that the benchmark recommends; "" for none.
        images_per_second: the fastest row of the benchmark; 0 without one.
    """

    gpu: str = ""
    device: str = ""
    host: str = ""
    status: str = "failed"
    exit_code: int = 1
    seconds: float = 0.0
    attempts: int = 0
    error: str = ""
    fix: str = ""
    passing: bool = False
    gpu_name: str = ""
    recommended: str = ""
    images_per_second: float = 0.0

    @property
    def finished(self) -> bool:
        """Whether everything requested is there."""
        return self.status in DONE


@dataclasses.dataclass(frozen=True)
class Outcome(Record):
    """One job's row in `batch.json`.

    Attributes:
        name: of the job, and of its bundle in the workdir.
        checkpoint: as given; "" if the config file gives it.
        status: "done", "fresh" (nothing had changed), "failed", "timeout", or "pending": not started or not finished.
        exit_code: what a single conversion would have ended with; 130 after a timeout, None while pending.
        seconds: of the last attempt.
        peak_rss_mib: peak memory of its process in any stage that ran.
        host: where it ran.
        attempts: how often it was begun by this command.
        error: what went wrong, and `fix` what to do about it; "" otherwise.
        passing: whether another attempt may succeed, because the process was killed, or a network or a lock failed.
        figures: from the bundle's report, as far as it got if the job failed.
        engines: outcomes for its engines, one per type of GPU; () if none were requested. If one fails, so does the
            job, with the same exit code and message.
    """

    name: str
    checkpoint: str = ""
    status: str = PENDING
    exit_code: int | None = None
    seconds: float = 0.0
    peak_rss_mib: float = 0.0
    host: str = ""
    attempts: int = 0
    error: str = ""
    fix: str = ""
    passing: bool = False
    figures: Figures = Figures()
    engines: tuple[EngineOutcome, ...] = ()

    @property
    def finished(self) -> bool:
        """Whether its bundle is whole."""
        return self.status in DONE

    @property
    def failed(self) -> bool:
        """Whether it ended without one."""
        return self.status not in (*DONE, PENDING)

    def with_engines(self, engines: Sequence[EngineOutcome]) -> "Outcome":
        """The outcome of a job whose bundle is whole and whose engines ended like this."""
        failed = next((each for each in engines if not each.finished), None)
        if failed is None:
            done = self.status == "done" or any(each.status == "done" for each in engines)
            return dataclasses.replace(self, status="done" if done else "fresh", engines=tuple(engines))
        error = f"engines{f' for {failed.gpu}' if failed.gpu else ''}: {failed.error}"
        return dataclasses.replace(
            self,
            status=failed.status,
            exit_code=failed.exit_code,
            error=error,
            fix=failed.fix,
            engines=tuple(engines),
        )


def figures_of(report: Mapping[str, Any]) -> Figures:
    """Extracts the figures from a bundle's report; only this part of a batch knows the report's keys."""
    checkpoint, accuracy = report.get("checkpoint") or {}, report.get("accuracy") or {}
    checks = dict(report.get("checks") or {})
    for tower, found in (report.get("towers") or {}).items():
        checks |= {f"{tower}/{precision}": check for precision, check in (found.get("checks") or {}).items()}
    return Figures(
        family=checkpoint.get("family", ""),
        variant=checkpoint.get("variant", ""),
        num_params=checkpoint.get("num_params", 0),
        image_size=tuple(checkpoint.get("image_size", ())),
        onnx_bytes=(report.get("onnx") or {}).get("bytes", 0),
        top1=accuracy.get("jax"),
        checks=tuple(
            Checked(precision, bool(check.get("passed")), check.get("cosine"), check.get("top1"))
            for precision, check in checks.items()
        ),
        warnings=tuple(checkpoint.get("warnings") or ()),
    )


def peak_of(report: Mapping[str, Any]) -> float:
    """The largest peak of the stages that ran, in MiB; 0 for a pair, whose report does not include its towers'
    stages."""
    ran = [row for row in report.get("stages") or [] if row.get("status") != "fresh" and not report.get("towers")]
    return max((row.get("peak_rss_mib") or 0.0 for row in ran), default=0.0)


def is_fresh(report: Mapping[str, Any]) -> bool:
    """Whether a conversion found nothing to do."""
    return all(row.get("status") == "fresh" for row in report.get("stages") or [])
