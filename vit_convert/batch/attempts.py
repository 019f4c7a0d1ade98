"""A job on its way through a runner: how often it was tried, what it is taken to need, when it may be tried again."""

import dataclasses
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from vit_convert.batch.devices import Gpus
from vit_convert.batch.estimate import Estimate
from vit_convert.batch.job import Job
from vit_convert.batch.outcome import Outcome
from vit_convert.core.errors import HeldError
from vit_convert.core.lock import DEAD_AFTER_S

_PAUSE_S = 2.0  # before another attempt: a lock or a network takes a moment
_AFTER_DEATH = 2.0  # what was killed, perhaps for its memory, is given so much more of it

Watcher = Callable[[str, int | None, Job, Outcome | None], None]
"""Told of "start", "retry" and "end" of attempts, with the number of the worker where there is one."""


class Runner(Protocol):
    """What brings jobs to their end, on one machine or on many."""

    def run(self, jobs: Sequence[Job], estimates: Mapping[str, Estimate]) -> None:
        """Runs jobs, and tells its watcher of each."""

    def gpus(self) -> Gpus:
        """Where engine tasks run."""

    def stop(self) -> None:
        """Begins nothing more; from any thread."""

    def close(self) -> None:
        """Lets go of what outlives a run."""


@dataclasses.dataclass
class Waiting:
    """A job that has not ended.

    Attributes:
        job: what to convert.
        estimate: what it will take.
        attempts: how often it was begun.
        factor: by which its memory is taken to be more than estimated.
        not_before: when it may be begun, by `time.monotonic`.
    """

    job: Job
    estimate: Estimate
    attempts: int = 0
    factor: float = 1.0
    not_before: float = 0.0

    def again(self, outcome: Outcome, retries: int) -> bool:
        """Whether another attempt may end better; if so, this is made ready for it."""
        if not outcome.passing or self.attempts > retries:
            return False
        self.not_before = time.monotonic() + pause_s(outcome.exit_code, self.attempts)
        if outcome.exit_code == 1:  # killed, or out of memory
            self.factor *= _AFTER_DEATH
        return True


def pause_s(exit_code: int | None, attempts: int) -> float:
    """Seconds before another attempt, after so many that ended so."""
    # Of a holder on a machine that is gone nothing is known until its lock has been silent for so long.
    held = exit_code == HeldError.exit_code and attempts > 1
    return DEAD_AFTER_S + _PAUSE_S if held else _PAUSE_S


def killed(job: Job, how: str, seconds: float) -> Outcome:
    """The outcome of a job whose process ended under it."""
    return Outcome(
        *(job.name, job.checkpoint, "failed", 1),
        seconds=round(seconds, 3),
        host=socket.gethostname(),
        error=f"its process ended by {how}",
        fix="SIGKILL is mostly the system's answer to too little memory: lower --jobs or --memory_gib.",
        passing=True,
    )
