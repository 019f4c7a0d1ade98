"""Runs jobs on this machine, with as many workers at a time as its cores and memory allow."""

import contextlib
import dataclasses
import socket
import time
from collections.abc import Callable, Mapping, Sequence

from vit_convert.batch.attempts import Waiting, Watcher, killed, late
from vit_convert.batch.devices import Device
from vit_convert.batch.estimate import Corrected, Estimate
from vit_convert.batch.job import Job
from vit_convert.batch.lanes import LocalGpus
from vit_convert.batch.outcome import Outcome
from vit_convert.batch.pool import Pool, Worker
from vit_convert.batch.run import Settings

_TICK_S = 0.5  # how often timeouts and the workers' memory are checked
_WARM_MIB = 1024.0  # an idle worker that holds more is ended: a fresh one holds less than half of this


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a run may use.

    Attributes:
        jobs: workers at a time.
        memory_gib: of all of them together.
        retries: further attempts of a job after a temporary failure.
        timeout_s: for one attempt; 0 for none.
        fail_fast: start nothing more after a failure.
        gpus: of this machine, for engine tasks.
    """

    jobs: int
    memory_gib: float
    retries: int = 2
    timeout_s: float = 0.0
    fail_fast: bool = False
    gpus: tuple[Device, ...] = ()


class LocalRunner:
    """Runs the jobs of a batch in worker processes.

    The largest jobs run first, so that none is left for the end; jobs of one kind run one after another, so that a
    worker can reuse what does not depend on weights. A job starts when its memory fits beside that of the others; one
    that never fits runs alone.

    Args:
        settings: of the batch.
        limits: what may be used.
        watch: receives progress.
        warn: shows warnings to the user.
    """

    def __init__(
        self, settings: Settings, limits: Limits, watch: Watcher, warn: Callable[[str], None] = lambda text: None
    ):
        self._settings, self._limits, self._watch, self._warn = settings, limits, watch, warn
        self._pool, self._stopped = Pool(settings), False
        self._corrected = Corrected()
        self._running: dict[int, Waiting] = {}  # by process number
        self._waiting: list[Waiting] = []

    def run(self, jobs: Sequence[Job], estimates: Mapping[str, Estimate]) -> None:
        """Runs all jobs.

        Args:
            jobs: what to convert.
            estimates: by name.

        Raises:
            KeyboardInterrupt: after all workers have ended.
        """
        self._waiting = [Waiting(job, estimates[job.name]) for job in jobs]
        self._waiting.sort(key=lambda waiting: waiting.estimate.memory_mib, reverse=True)
        with contextlib.closing(self._pool):
            while self._waiting or self._running:
                if self._stopped:
                    self._waiting.clear()
                self._begin_what_fits()
                for worker in self._pool.ready(self._patience_s()):
                    self._take(worker)
                self._end_late_ones()

    def gpus(self) -> LocalGpus:
        """The GPUs of this machine."""
        return LocalGpus(self._settings.workdir, self._settings.engines, self._limits.gpus)

    def stop(self) -> None:
        """Starts nothing more."""
        self._stopped = True

    def close(self) -> None:
        """Does nothing, because workers end with `run`."""

    def _patience_s(self) -> float:
        if self._running or not self._waiting:
            return _TICK_S if self._running else 0.0
        return min(_TICK_S, max(0.0, min(each.not_before for each in self._waiting) - time.monotonic()))

    def _begin_what_fits(self) -> None:
        while len(self._running) < self._limits.jobs:
            now, taken = time.monotonic(), self._taken_mib()
            able = (each for each in self._waiting if each.not_before <= now and self._fits(each, taken))
            if (waiting := next(able, None)) is None:
                return
            self._make_room(waiting, taken)
            idle = self._pool.idle
            # A worker that did a job of the same kind last still has its graph; otherwise, any worker will do.
            worker = idle[0] if idle else self._pool.start()
            self._waiting.remove(waiting)
            self._running[worker.pid] = waiting
            waiting.attempts += 1
            worker.give(waiting.job)
            self._watch("start", worker.number, waiting.job, None)

    def _taken_mib(self) -> float:
        """Memory reserved for the running jobs, or held by them if that is more."""
        return sum(max(self._needed_mib(self._running[worker.pid]), worker.rss_mib) for worker in self._pool.busy)

    def _fits(self, waiting: Waiting, taken: float) -> bool:
        """Whether a job's memory fits beside the running jobs; if none runs, any job fits."""
        return not taken or taken + self._needed_mib(waiting) <= self._limits.memory_gib * 1024

    def _make_room(self, waiting: Waiting, taken: float) -> None:
        """Ends idle workers whose memory a job needs, except the worker that it gets."""
        needed, limit = self._needed_mib(waiting), self._limits.memory_gib * 1024
        if not taken and needed > limit and waiting.attempts == 0:
            allowed = f"--memory_gib={self._limits.memory_gib:.3g}"
            self._warn(f"{waiting.job.name}: needs about {needed:.0f} MiB, more than {allowed}: it runs alone")
        idle = self._pool.idle
        while idle[1:] and taken + needed + sum(worker.rss_mib for worker in idle[1:]) > limit:
            self._pool.end(idle.pop())

    def _needed_mib(self, waiting: Waiting) -> float:
        return self._corrected.memory_mib(waiting.estimate) * waiting.factor

    def _take(self, worker: Worker) -> None:
        """Receives what a worker sends, or handles its death."""
        waiting = self._running.pop(worker.pid, None)
        outcome = worker.take()
        if outcome is None:
            seconds = time.monotonic() - worker.begun
            how = self._pool.bury(worker)
            if waiting is None:
                return
            self._ended(worker, waiting, killed(waiting.job, how, seconds))
            return
        assert waiting is not None
        self._corrected.learn(waiting.estimate, outcome.peak_rss_mib)
        if worker.rss_mib > _WARM_MIB:
            self._pool.end(worker)
        self._ended(worker, waiting, outcome)

    def _ended(self, worker: Worker, waiting: Waiting, outcome: Outcome) -> None:
        outcome = dataclasses.replace(outcome, attempts=waiting.attempts)
        if waiting.again(outcome, self._limits.retries):
            self._watch("retry", worker.number, waiting.job, outcome)
            self._waiting.append(waiting)
            return
        self._watch("end", worker.number, waiting.job, outcome)
        if outcome.failed and self._limits.fail_fast:
            self._waiting.clear()

    def _end_late_ones(self) -> None:
        limit = self._limits.timeout_s
        for worker in [worker for worker in self._pool.busy if limit and time.monotonic() - worker.begun > limit]:
            waiting = self._running.pop(worker.pid)
            self._pool.end(worker)
            self._ended(worker, waiting, dataclasses.replace(late(waiting.job, limit), host=socket.gethostname()))
