"""Runs one job in this process, which survives whatever happens to it."""

import dataclasses
import os
import pathlib
import socket
import time
from typing import Any

from vit_convert.batch.engines import EngineSettings
from vit_convert.batch.job import Job
from vit_convert.batch.outcome import Outcome, figures_of, is_fresh, peak_of
from vit_convert.batch.stored import store
from vit_convert.core.bundle import Bundle, read_json
from vit_convert.core.errors import INTERRUPTED, ConvertError, PassingError
from vit_convert.core.host import give_memory_back
from vit_convert.core.pipeline import file_identity
from vit_convert.core.user_code import explain
from vit_convert.core.warm import keeps, settle


@dataclasses.dataclass(frozen=True)
class Settings:
    """What all jobs of a batch have in common.

    Attributes:
        workdir: for the bundles of all jobs.
        checkpoints: folders searched for checkpoints; downloads go to the first.
        until: last stage; "" for all.
        force: redo fresh stages.
        engines: what to do with each bundle on a GPU.
        remote: the address to which whole bundles go from `workdir`; "" if they stay.
        page: write report.html of each bundle, where its packages are installed.
    """

    workdir: str
    checkpoints: tuple[str, ...] = ()
    until: str = ""
    force: bool = False
    engines: EngineSettings = dataclasses.field(default_factory=EngineSettings)
    remote: str = ""
    page: bool = False

    @property
    def folders(self) -> list[str]:
        """The folders to search for a checkpoint."""
        return [*self.checkpoints, "checkpoints"]

    def bundle(self, job: Job) -> Bundle:
        """The bundle of a job, in the workdir."""
        return Bundle(os.path.join(self.workdir, job.name))


def run_job(job: Job, settings: Settings) -> Outcome:
    """Converts, and turns whatever happens, except an interrupt, into an outcome.

    Args:
        job: what to convert.
        settings: of the batch.

    Returns:
        The outcome of this attempt.
    """
    from vit_convert.convert import convert

    started, bundle = time.monotonic(), settings.bundle(job)
    before = _identity(bundle.report)
    begun = Outcome(job.name, job.checkpoint, host=socket.gethostname(), attempts=1)
    report: dict[str, Any] = {}
    try:
        report = convert(
            job.make_config(),
            settings.workdir,
            until=settings.until,
            force=settings.force,
            quiet=True,
            command=["python", "-m", "vit_convert", *job.words, f"--workdir={settings.workdir}"],
            checkpoints=settings.checkpoints,
            page=settings.page,
        )
        ended = dataclasses.replace(begun, status="fresh" if is_fresh(report) else "done", exit_code=0)
    except (Exception, SystemExit) as e:
        ended = _failed(begun, e)
        if _identity(bundle.report) != before:  # otherwise it is from an earlier conversion
            report = read_json(bundle.report) or {}
    finally:
        give_memory_back()  # the next conversion's memory is estimated for an empty process
        if keeps():
            settle()
    ended = dataclasses.replace(ended, peak_rss_mib=peak_of(report), figures=figures_of(report))
    if ended.finished and settings.remote:
        ended = _stored(job, settings, bundle, dataclasses.replace(ended, seconds=_since(started)))
    return dataclasses.replace(ended, seconds=_since(started))


def _since(started: float) -> float:
    return round(time.monotonic() - started, 3)


def _stored(job: Job, settings: Settings, bundle: Bundle, ended: Outcome) -> Outcome:
    """Uploads a bundle; a fresh one that had not been uploaded yet counts as done."""
    done = dataclasses.replace(ended, status="done")
    try:
        store(bundle, settings.remote, job, settings.until, settings.folders, done)
    except Exception as e:
        return _failed(ended, e)
    return done


def _identity(path: pathlib.Path) -> list[Any]:
    try:
        return file_identity(path)
    except OSError:
        return []


def _failed(begun: Outcome, error: BaseException) -> Outcome:
    if isinstance(error, ConvertError):
        passing = isinstance(error, PassingError)
        return dataclasses.replace(
            begun, status="failed", exit_code=error.exit_code, error=str(error), fix=error.fix, passing=passing
        )
    if isinstance(error, MemoryError):
        fix = "Give it more by --memory_gib and fewer --jobs."
        return dataclasses.replace(
            begun, status="failed", exit_code=INTERRUPTED, error="out of memory", fix=fix, passing=True
        )
    said = f"{explain(error)}. This is a bug: please report it with the traceback that a conversion of it alone shows"
    return dataclasses.replace(begun, status="failed", exit_code=1, error=said)
