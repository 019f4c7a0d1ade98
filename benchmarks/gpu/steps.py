"""Steps of a long run: each a process group of its own, in lanes that run side by side; the next run continues where
this one ended."""

import contextlib
import dataclasses
import datetime
import os
import pathlib
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

from vit_convert.core.bundle import read_json, write_json

DONE, FAILED, LEFT = "done", "failed", "left"
State = dict[str, dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Step:
    """One process.

    Attributes:
        key: "b16-224/build".
        command: its words.
        lane: the steps of a lane share its workers, and start in their order.
        after: keys of steps that must be done first, if they are requested; when one of them runs again, so does this
            one.
        behind: keys of steps that must have ended first, whatever their result.
        environment: variables that are added to those of this process.
    """

    key: str
    command: Sequence[str]
    lane: str
    after: Sequence[str] = ()
    behind: Sequence[str] = ()
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def name(self) -> str:
        """What it does: "build"."""
        return self.key.rpartition("/")[2]


class Runner:
    """Runs steps and records their results; the clock starts with it.

    Args:
        folder: holds steps.json and the output of each step, logs/<key>.txt.
        stop_after: seconds after which no step starts.
        limit: seconds after which steps that run are ended, and not done.
        changed: called after every step, one call at a time.
    """

    def __init__(self, folder: pathlib.Path, *, stop_after: float, limit: float, changed: Callable[[State], None]):
        (folder / "logs").mkdir(parents=True, exist_ok=True)
        self._folder, self._path = folder, folder / "steps.json"
        self.state: State = read_json(self._path) or {}
        self.outcomes: dict[str, Future[str]] = {}
        self._started, self._stop_after, self._limit, self._changed = time.monotonic(), stop_after, limit, changed
        self._lock, self._running, self._closed = threading.Lock(), set[subprocess.Popen[bytes]](), False

    def run(self, steps: Sequence[Step], workers: Mapping[str, int]) -> None:
        """Runs steps; when it returns, none of them runs.

        Args:
            steps: each after those that it waits for.
            workers: how many steps of each lane run at the same time.
        """
        with contextlib.ExitStack() as stack:
            pools = {lane: stack.enter_context(ThreadPoolExecutor(count)) for lane, count in workers.items()}
            try:
                # a step waits for earlier ones alone and a lane keeps the order, so one of them can always run
                for step in steps:
                    before = {key: self.outcomes[key] for key in step.after if key in self.outcomes}
                    behind = [self.outcomes[key] for key in step.behind if key in self.outcomes]
                    self.outcomes[step.key] = pools[step.lane].submit(self._outcome, step, before, behind)
                for step in steps:
                    self.outcomes[step.key].result()
            except BaseException:
                self._close()
                raise

    def count(self, outcome: str) -> int:
        """How many of the steps asked for came out as DONE, FAILED or LEFT."""
        return sum(future.result() == outcome for future in self.outcomes.values())

    def _outcome(self, step: Step, before: Mapping[str, Future[str]], behind: Sequence[Future[str]]) -> str:
        found = {key: future.result() for key, future in before.items()}
        with self._lock:
            done = is_done(self.state, step.key, step.after) and self.state[step.key]["command"] == shlex.join(
                step.command
            )
        if done and {*found.values()} <= {DONE}:
            return DONE
        wait(behind)
        if LEFT in found.values() or not self._fits(step):
            return LEFT
        failed = [key for key, outcome in found.items() if outcome == FAILED]
        return (
            self._record(step, _now(), FAILED, 0.0, [f"not run: {', '.join(failed)} failed"])
            if failed
            else self._execute(step)
        )

    def _fits(self, step: Step) -> bool:
        """Whether it may start, and would end in time if it took as long as the slowest of its name: ended steps begin
        anew."""
        spent = time.monotonic() - self._started
        with self._lock:
            usual = [
                row["seconds"]
                for key, row in self.state.items()
                if key.endswith(f"/{step.name}") and row["status"] == DONE
            ]
        return spent <= self._stop_after and spent + max(usual, default=0.0) <= self._limit

    def _execute(self, step: Step) -> str:
        log = self._folder / "logs" / f"{step.key.replace('/', '.')}.txt"
        date, started = _now(), time.monotonic()
        with log.open("w") as stream:
            try:
                with self._lock:
                    if self._closed:
                        return LEFT
                    print(f"[{started - self._started:5.0f} s] {step.key}", flush=True)
                    # A group, not a session: whoever ends this program's session ends its steps too.
                    process = subprocess.Popen(
                        step.command,
                        stdout=stream,
                        stderr=subprocess.STDOUT,
                        env={**os.environ, **step.environment},
                        process_group=0,
                    )
                    self._running.add(process)
            except OSError as e:
                return self._record(step, date, FAILED, 0.0, [str(e)])
            try:
                status = DONE if process.wait(max(0.0, self._limit - (started - self._started))) == 0 else FAILED
            except subprocess.TimeoutExpired:
                status = LEFT
            _end(process)
            with self._lock:
                self._running.discard(process)
                status = LEFT if self._closed else status
        seconds = time.monotonic() - started
        tail = log.read_text(errors="replace").strip().splitlines()[-25:]
        return self._record(
            step, date, status, seconds, [*tail, *([f"ended after {seconds:.0f} s"] if status == LEFT else [])]
        )

    def _record(self, step: Step, date: str, status: str, seconds: float, tail: list[str]) -> str:
        row = {
            "command": shlex.join(step.command),
            "status": status,
            "started": date,
            "seconds": round(seconds, 1),
            "tail": tail,
        }
        with self._lock:
            self.state[step.key] = row
            write_json(self._path, self.state)
            spent = time.monotonic() - self._started
            lines = (f"{' ' * 10} | {line[:200]}" for line in tail[-2 if status == DONE else -12 :])
            print(f"[{spent:5.0f} s] {step.key}: {status} in {seconds:.1f} s", *lines, sep="\n", flush=True)
            self._changed(self.state)
        return status

    def _close(self) -> None:
        """Ends running steps for good, because this program is ending."""
        with self._lock:
            self._closed = True
            for process in self._running:
                _end(process)


def is_done(state: State, key: str, after: Sequence[str]) -> bool:
    """Whether a step is done, and none of those that it comes after has run since.

    Args:
        state: of the steps.
        key: of the step.
        after: keys of those that it comes after.
    """
    row = state.get(key, {})
    return row.get("status") == DONE and all(
        state[before]["started"] <= row["started"] for before in after if before in state
    )


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        # also what it left behind: compile workers would disturb what is measured next
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _now() -> str:
    # a step may take less than a second
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds")
