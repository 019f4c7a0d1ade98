"""Records the jobs' outcomes while they run: the one writer of a batch's files."""

import contextlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

from vit_convert.batch.folder import BatchFolder
from vit_convert.batch.job import Job
from vit_convert.batch.mirror import Mirror
from vit_convert.batch.outcome import Outcome
from vit_convert.batch.record import BatchRecord, now, write_table
from vit_convert.core.errors import UsageError
from vit_convert.core.progress import Progress

_SHARE = 0.02  # of the time may be spent writing the record, which for fifty thousand jobs is 30 MB


class Ledger:
    """The outcomes of a batch, in its files.

    Args:
        folder: of the files.
        jobs: of the batch, in order.
        command: the command line.
        earlier: outcomes of the last command, by name.
        mirror: sends the record on.
    """

    def __init__(
        self,
        folder: BatchFolder,
        jobs: Sequence[Job],
        command: str,
        earlier: Mapping[str, Outcome],
        mirror: Mirror,
    ):
        self._folder, self._command, self._begun, self._mirror = folder, command, now(), mirror
        self._progress = Progress(folder.events, quiet=True)
        self._outcomes = {job.name: earlier.get(job.name, Outcome(job.name, job.checkpoint)) for job in jobs}
        self._next_write = 0.0
        self._progress.event("batch", command=command, jobs=len(jobs))
        self._write("running")

    @property
    def outcomes(self) -> list[Outcome]:
        """The outcomes of all jobs, in order."""
        return list(self._outcomes.values())

    def event(self, kind: str, job: str, **fields: Any) -> None:
        """Appends a line about a job to the events."""
        self._progress.event(kind, job=job, **fields)

    def put(self, outcome: Outcome) -> None:
        """Stores a job's outcome, and writes the record unless that was done just before."""
        self._outcomes[outcome.name] = outcome
        if time.monotonic() >= self._next_write:
            with contextlib.suppress(UsageError):  # a full disk: only the bundles matter, and the next call tries again
                self._write("running")

    def close(self, status: str) -> None:
        """Writes record and table for the last time.

        Raises:
            UsageError: the disk is full.
        """
        self._progress.event("batch_end", status=status)
        self._write(status)
        write_table(self._folder.table, self.outcomes)

    def _write(self, status: str) -> None:
        started = time.monotonic()
        BatchRecord.of(self._command, self._begun, status, self._outcomes.values()).write(self._folder.record)
        self._mirror.record_changed()
        ended = time.monotonic()
        self._next_write = ended + max(0.5, (ended - started) / _SHARE)
