"""Passes on what happens to the jobs of a batch: to its files, to people, and from conversions to engines."""

import dataclasses
import threading
from collections.abc import Mapping
from typing import Any

from vit_convert.batch.attempts import Runner
from vit_convert.batch.devices import Device
from vit_convert.batch.job import Job
from vit_convert.batch.lanes import Lanes
from vit_convert.batch.ledger import Ledger
from vit_convert.batch.outcome import PENDING, EngineOutcome, Outcome
from vit_convert.batch.run import Settings
from vit_convert.batch.screen import Screen
from vit_convert.core.progress import human_seconds

_TOLD = ("status", "exit_code", "seconds", "peak_rss_mib", "attempts", "error")
_TOLD_OF_ENGINES = ("gpu", "device", "host", "status", "exit_code", "seconds", "attempts", "error")


class Told:
    """Receives every attempt of a job, from any thread.

    Args:
        ledger: the files.
        screen: what people see.
        earlier: outcomes of the last command, by name, which have the time and memory of jobs that are fresh now.
        fail_fast: begin nothing more after a failure.
    """

    def __init__(self, ledger: Ledger, screen: Screen, earlier: Mapping[str, Outcome], *, fail_fast: bool):
        self._ledger, self._screen, self._earlier, self._fail_fast = ledger, screen, earlier, fail_fast
        self._lock = threading.RLock()
        self._lanes: Lanes | None = None
        self._runner: Runner | None = None

    def begin_engines(self, runner: Runner, settings: Settings, retries: int) -> Lanes:
        """Makes engine tasks follow conversions.

        Args:
            runner: of the batch.
            settings: of the batch.
            retries: further attempts after temporary failures.

        Returns:
            The lanes; the caller closes them.

        Raises:
            UsageError: there is no GPU.
        """
        self._runner = runner
        self._lanes = Lanes(
            *(runner.gpus(), settings.workdir, settings.engines),
            retries=retries,
            begun=self._engines_began,
            ended=self._engines_ended,
            finished=lambda outcome: self._finished(None, outcome),
        )
        return self._lanes

    def watch(self, kind: str, line: int | None, job: Job, outcome: Outcome | None) -> None:
        """Called when a conversion starts or ends; see `Watcher`."""
        if outcome is None:
            with self._lock:
                self._ledger.event(kind, job.name, worker=line)
                self._screen.start(line, job)
            return
        with self._lock:
            self._ledger.event(kind, job.name, worker=line, **_fields(outcome, _TOLD))
        if kind == "end":
            self.ended(line, outcome)
        else:
            self._screen.say(f"{job.name}: {outcome.error}; another attempt follows")

    def ended(self, line: int | None, outcome: Outcome) -> None:
        """A conversion has ended, now or earlier; its engines are next, if requested."""
        before = self._earlier.get(outcome.name)
        if outcome.status == "fresh" and before is not None and before.seconds:
            taken = {name: getattr(before, name) for name in ("seconds", "peak_rss_mib", "host")}
            outcome = dataclasses.replace(outcome, **taken)
        if self._lanes is None or not outcome.finished:
            self._finished(line, outcome)
            return
        with self._lock:
            self._ledger.put(dataclasses.replace(outcome, status=PENDING, exit_code=None))
            self._screen.rest(line)
        self._lanes.add(outcome)

    def wait(self) -> None:
        """Waits for the engines."""
        if self._lanes is not None:
            self._lanes.wait()

    def _finished(self, line: int | None, outcome: Outcome) -> None:
        with self._lock:
            self._ledger.put(outcome)
            self._screen.end(line, outcome)
        if outcome.failed and self._fail_fast and self._lanes is not None and self._runner is not None:
            self._runner.stop()
            self._lanes.stop()

    def _engines_began(self, name: str, device: Device) -> None:
        with self._lock:
            self._ledger.event("engines_start", name, gpu=device.type, device=device.id)

    def _engines_ended(self, name: str, outcome: EngineOutcome, again: bool) -> None:
        with self._lock:
            self._ledger.event("engines_retry" if again else "engines_end", name, **_fields(outcome, _TOLD_OF_ENGINES))
        if again:
            self._screen.say(f"{name}: {outcome.error}; another attempt follows")
        elif outcome.finished:
            where = " ".join(filter(None, (outcome.gpu, outcome.device)))
            self._screen.say(f"{name}: engines{f' on {where}' if where else ''} in {human_seconds(outcome.seconds)}")


def _fields(outcome: Any, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: getattr(outcome, name) for name in names}
