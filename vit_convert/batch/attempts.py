"""A job on its way through a runner: how often it was tried, its estimated needs, when it may be tried again."""

import dataclasses
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from vit_convert.batch.devices import Gpus
from vit_convert.batch.estimate import Estimate
from vit_convert.batch.job import Job
from vit_convert.batch.outcome import Outcome
from vit_convert.core.errors import INTERRUPTED, HeldError
from vit_convert.core.lock import DEAD_AFTER_S

_PAUSE_S = 2.0  # before another attempt: locks and networks need a moment
_AFTER_DEATH = 2.0  # a job that was killed, perhaps for its memory, gets this much more of it

Watcher = Callable[[str, int | None, Job, Outcome | None], None]
"""Called at the "start", "retry" and "end" of attempts, with the number of the worker if there is one."""


class Runner(Protocol):
    """Runs jobs, on one machine or on many."""

    def run(self, jobs: Sequence[Job], estimates: Mapping[str, Estimate]) -> None:
        """Runs jobs, and informs its watcher about each."""

    def gpus(self) -> Gpus:
        """Where engine tasks run."""

    def stop(self) -> None:
        """Starts nothing more; may be called from any thread."""

    def close(self) -> None:
        """Releases what outlives a run."""


@dataclasses.dataclass
class Waiting:
    """An unfinished job.

    Attributes:
        job: what to convert.
        estimate: of the time and memory it needs.
        attempts: how often it was started.
        factor: by which its estimated memory is multiplied.
        not_before: the earliest time to start it, by `time.monotonic`.
    """

    job: Job
    estimate: Estimate
    attempts: int = 0
    factor: float = 1.0
    not_before: float = 0.0

    def again(self, outcome: Outcome, retries: int) -> bool:
        """Whether another attempt may succeed; if so, prepares this job for it."""
        if not outcome.passing or self.attempts > retries:
            return False
        self.not_before = time.monotonic() + pause_s(outcome.exit_code, self.attempts)
        if outcome.exit_code == 1:  # killed, or out of memory
            self.factor *= _AFTER_DEATH
        return True


def pause_s(exit_code: int | None, attempts: int) -> float:
    """Seconds to wait before another attempt, after this many with such an outcome."""
    # Nothing is known about a lock's holder on a lost machine until the lock has been silent for this long.
    held = exit_code == HeldError.exit_code and attempts > 1
    return DEAD_AFTER_S + _PAUSE_S if held else _PAUSE_S


def late(job: Job, limit_s: float) -> Outcome:
    """The outcome of a job that was ended because it took longer than it may."""
    return Outcome(
        *(job.name, job.checkpoint, "timeout", INTERRUPTED, limit_s),
        error=f"not done after {limit_s:g} s",
        fix="Give more by --timeout, or look at its events.jsonl for the stage that it was in.",
    )


def killed(job: Job, how: str, seconds: float) -> Outcome:
    """The outcome of a job whose process ended while running it."""
    return Outcome(
        *(job.name, job.checkpoint, "failed", 1),
        seconds=round(seconds, 3),
        host=socket.gethostname(),
        error=f"its process ended by {how}",
        fix="SIGKILL is mostly the system's answer to too little memory: lower --jobs or --memory_gib.",
        passing=True,
    )
