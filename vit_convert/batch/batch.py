"""One batch from its jobs to its record."""

import contextlib
import dataclasses
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vit_convert.batch.attempts import Runner
from vit_convert.batch.estimate import estimate, is_here
from vit_convert.batch.folder import BatchFolder
from vit_convert.batch.job import Job
from vit_convert.batch.ledger import Ledger
from vit_convert.batch.local import Limits, LocalRunner
from vit_convert.batch.mirror import mirrored
from vit_convert.batch.outcome import Outcome, figures_of
from vit_convert.batch.record import BatchRecord
from vit_convert.batch.remote import Commit, remote_at
from vit_convert.batch.run import Settings
from vit_convert.batch.screen import Screen, summary
from vit_convert.batch.stored import is_fresh
from vit_convert.batch.told import Told
from vit_convert.core.errors import BatchError, ConvertError, UsageError
from vit_convert.core.lock import hold


def run_batch(
    jobs: Sequence[Job],
    settings: Settings,
    limits: Limits,
    *,
    shard: tuple[int, int] | None = None,
    only_failed: bool = False,
    runner: Callable[..., Runner] = LocalRunner,
    quiet: bool = False,
    command: Sequence[str] = (),
) -> list[Outcome]:
    """Converts all jobs, and keeps record, events and table in the workdir.

    Args:
        jobs: what to convert, with names of their own.
        settings: common to all jobs.
        limits: what may be used of this machine.
        shard: (number, of how many) to which these jobs belong; names the files.
        only_failed: run only those that failed in the last command.
        runner: creates the Runner from settings, limits, a watcher and a function that warns.
        quiet: print nothing.
        command: the command line, for the record.

    Returns:
        The outcomes, in the order of the jobs.

    Raises:
        BatchError: some failed; the others are whole.
        UsageError: another batch is using the workdir, or it cannot be written.
        KeyboardInterrupt: after the workers have ended and the record is written.
    """
    folder, line = BatchFolder(settings.workdir, shard), shlex.join(command)
    folder.require_writable()
    with mirrored(folder, settings.remote, line) as mirror, hold(folder, line):
        for left in folder.root.glob(".batch*.tmp"):  # left by a batch that was killed while writing
            left.unlink(missing_ok=True)
        record = BatchRecord.read(folder.record)
        earlier = {outcome.name: outcome for outcome in record.jobs} if record else {}
        kept = _kept(folder, jobs, earlier) if only_failed else {}
        ledger, status = Ledger(folder, jobs, line, kept, mirror), "failed"
        try:
            _run([job for job in jobs if job.name not in kept], settings, limits, ledger, earlier, runner, quiet=quiet)
            status = "failed" if any(outcome.failed for outcome in ledger.outcomes) else "done"
        except KeyboardInterrupt:
            status = "interrupted"
            raise
        finally:
            ledger.close(status)
            if not quiet:
                print(summary(ledger.outcomes))
        if settings.page:
            _write_page(folder, ledger, quiet=quiet)
    failed = [outcome for outcome in ledger.outcomes if outcome.failed]
    if failed:
        where = f"{settings.remote}/{folder.record.name}" if settings.remote else os.fspath(folder.record)
        raise BatchError(
            f"{len(failed)} of {len(jobs)} jobs failed: {where} says why",
            fix="The same command tries them again and skips finished ones; --only_failed considers no others.",
        )
    return ledger.outcomes


def _write_page(folder: BatchFolder, ledger: Ledger, *, quiet: bool) -> None:
    """Writes the page of the zoo, if anything changed and its packages are installed."""
    if folder.page.exists() and all(outcome.status == "fresh" for outcome in ledger.outcomes):
        return
    from vit_convert.report.zoo import read_batch, write_zoo_page

    try:
        write_zoo_page(folder.page, read_batch(folder.record), title=folder.root.resolve().name)
    except UsageError as e:  # only the bundles matter
        if not quiet:
            print(f"no {folder.page.name}: {e}", file=sys.stderr)


def _kept(folder: BatchFolder, jobs: Sequence[Job], earlier: Mapping[str, Outcome]) -> Mapping[str, Outcome]:
    """The outcomes of jobs that did not fail in the last command.

    Raises:
        UsageError: there was none.
    """
    if not earlier:
        raise UsageError(
            f"--only_failed: {folder.record} is not there, or not of this version", fix="Run without it once."
        )
    return {job.name: earlier[job.name] for job in jobs if job.name in earlier and not earlier[job.name].failed}


def _run(
    jobs: Sequence[Job],
    settings: Settings,
    limits: Limits,
    ledger: Ledger,
    earlier: Mapping[str, Outcome],
    runner: Callable[..., Runner],
    *,
    quiet: bool,
) -> None:
    estimates = {job.name: estimate(job, settings.folders) for job in jobs}
    with Screen(estimates, quiet=quiet) as screen, contextlib.ExitStack() as stack:
        told, runs, left = Told(ledger, screen, earlier, fail_fast=limits.fail_fast), None, []
        if settings.engines.commands:
            runs = stack.enter_context(contextlib.closing(runner(settings, limits, told.watch, screen.say)))
            stack.enter_context(contextlib.closing(told.begin_engines(runs, settings, limits.retries)))
        known = {} if settings.force or not settings.remote else remote_at(settings.remote).commits([*estimates])
        for job in jobs:
            found = None if settings.force else _fresh(job, settings, known)
            if found is None:
                left.append(job)
            else:
                told.ended(None, found)
        if left:
            runs = runs or stack.enter_context(contextlib.closing(runner(settings, limits, told.watch, screen.say)))
            runs.run(left, estimates)
        told.wait()


def _fresh(job: Job, settings: Settings, known: Mapping[str, Commit]) -> Outcome | None:
    """The outcome of a job that has nothing to do."""
    from vit_convert.convert import fresh_report

    try:
        if settings.remote:
            commit = known.get(job.name)
            if commit is None or not is_fresh(commit, job, settings.until, settings.folders):
                return None
            return dataclasses.replace(commit.outcome, status="fresh", attempts=0)
        if not os.path.exists(settings.bundle(job).root) or not is_here(job, settings.folders):
            return None
        config = job.make_config()
        given: dict[str, Any] = {"until": settings.until, "checkpoints": settings.checkpoints, "page": settings.page}
        report = fresh_report(config, settings.workdir, **given)
    except ConvertError:  # its conversion will report it
        return None
    return Outcome(job.name, job.checkpoint, "fresh", 0, figures=figures_of(report)) if report is not None else None
