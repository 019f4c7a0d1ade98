"""Runs jobs on a Ray cluster: each conversion is a task, wherever its cores and its memory are."""

import contextlib
import dataclasses
import logging
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vit_convert.batch.attempts import Waiting, Watcher, killed
from vit_convert.batch.cluster_gpus import RayGpus
from vit_convert.batch.estimate import MIB, Corrected, Estimate
from vit_convert.batch.job import Job
from vit_convert.batch.local import Limits
from vit_convert.batch.outcome import Outcome
from vit_convert.batch.run import Settings, run_job
from vit_convert.core.bundle import Bundle
from vit_convert.core.errors import INTERRUPTED, UsageError
from vit_convert.core.leftovers import tidy

_TICK_S = 0.5
_CONNECT_S = 10.0
_WAITING_A_CORE = 2  # tasks that Ray holds beside those that run, so that no core waits for us
_END_S = 10.0  # that a cancelled conversion has to let go of its bundle


@dataclasses.dataclass(frozen=True)
class _Begun:
    waiting: Waiting
    time: float


class RayRunner:
    """Runs the jobs of a batch as Ray tasks. Ray's own processes are the warm workers, where there is room.

    What is lost with a worker or a node is tried again elsewhere, as often as `Limits.retries` says. The workdir has
    to be one folder for all nodes, and this package installed on each in the same version.

    Args:
        settings: of the batch; its paths are as every node sees them.
        limits: `jobs` of 0 is as many as the cluster has cores; `memory_gib` is each node's own affair.
        watch: what people and files are told.
        warn: says what a user should know.
        address: of the cluster, "auto" for the one of this machine.

    Raises:
        UsageError: there is no Ray, or no cluster at the address.
    """

    def __init__(
        self,
        settings: Settings,
        limits: Limits,
        watch: Watcher,
        warn: Callable[[str], None] = lambda text: None,
        *,
        address: str = "auto",
    ):
        self._settings = dataclasses.replace(
            settings,
            workdir=os.path.abspath(settings.workdir),
            checkpoints=tuple(os.path.abspath(folder) for folder in settings.checkpoints),
        )
        self._limits, self._watch, self._warn = limits, watch, warn
        self._corrected = Corrected()
        self._ray = _connected(address)
        self._task = self._ray.remote(max_retries=0, num_cpus=1)(convert_task)
        self._begun: dict[Any, _Begun] = {}  # by the reference of its outcome
        self._stopped = False

    def run(self, jobs: Sequence[Job], estimates: Mapping[str, Estimate]) -> None:
        """Runs jobs to their end; see `LocalRunner.run`."""
        waiting = [Waiting(job, estimates[job.name]) for job in jobs]
        waiting.sort(key=lambda each: each.estimate.memory_mib, reverse=True)
        try:
            while waiting or self._begun:
                if self._stopped:
                    waiting.clear()
                self._begin(waiting)
                ready, _ = self._ray.wait([*self._begun], timeout=_TICK_S) if self._begun else ([], [])
                for reference in ready:
                    self._take(reference, waiting)
                self._end_late_ones()
                if not self._begun:
                    time.sleep(
                        min(_TICK_S, max(0.0, min((w.not_before for w in waiting), default=0.0) - time.monotonic()))
                    )
        finally:
            self._cancel()

    def gpus(self) -> RayGpus:
        """The GPUs of the cluster."""
        return RayGpus(self._ray, self._settings.workdir, self._settings.engines)

    def stop(self) -> None:
        """Begins nothing more."""
        self._stopped = True

    def close(self) -> None:
        """Leaves the cluster."""
        self._ray.shutdown()

    def _begin(self, waiting: list[Waiting]) -> None:
        """Hands tasks over: not all at once, so that the memory of later ones is that of the first as measured."""
        room = self._limits.jobs or _WAITING_A_CORE * max(1, int(self._ray.cluster_resources().get("CPU", 1)))
        now = time.monotonic()
        for each in [each for each in waiting if each.not_before <= now][: max(0, room - len(self._begun))]:
            waiting.remove(each)
            each.attempts += 1
            reference = self._task.options(memory=self._memory_bytes(each)).remote(each.job, self._settings)
            self._begun[reference] = _Begun(each, now)
            self._watch("start", None, each.job, None)

    def _memory_bytes(self, waiting: Waiting) -> int:
        """What Ray sets aside for a task. One that no node has would wait for ever: it gets the largest node's."""
        needed = int(self._corrected.memory_mib(waiting.estimate) * waiting.factor * MIB)
        largest = max(
            (int(node["Resources"].get("memory", 0)) for node in self._ray.nodes() if node["Alive"]), default=0
        )
        if largest and needed > largest:
            if waiting.attempts == 1:
                said = f"{needed / MIB:.0f} MiB, more than any node's {largest / MIB:.0f}"
                self._warn(f"{waiting.job.name}: needs about {said}: it runs alone on one")
            return largest
        return needed

    def _take(self, reference: Any, left: list[Waiting]) -> None:
        begun = self._begun.pop(reference)
        waiting = begun.waiting
        try:
            outcome: Outcome = self._ray.get(reference)
        except self._ray.exceptions.TaskCancelledError:
            outcome = _late(waiting.job, self._limits.timeout_s)
            self._tidy(waiting.job)
        except self._ray.exceptions.RayError as e:  # a worker or a node that is gone
            how = f"{type(e).__name__} ({' '.join(str(e).split())[:300]})"
            outcome = killed(waiting.job, how, time.monotonic() - begun.time)
            self._tidy(waiting.job)
        self._corrected.learn(waiting.estimate, outcome.peak_rss_mib)
        outcome = dataclasses.replace(outcome, attempts=waiting.attempts)
        if waiting.again(outcome, self._limits.retries):
            self._watch("retry", None, waiting.job, outcome)
            left.append(waiting)
            return
        self._watch("end", None, waiting.job, outcome)
        if outcome.failed and self._limits.fail_fast:
            left.clear()

    def _end_late_ones(self) -> None:
        """Cancels what runs too long, by its begin here: a task that Ray had no room for has waited that time too."""
        limit = self._limits.timeout_s
        for reference, begun in self._begun.items():
            late = time.monotonic() - begun.time - limit
            if limit and late > 0:
                self._ray.cancel(reference, force=late > _END_S)

    def _cancel(self) -> None:
        """Cancels what still runs, and waits for it to let go of its bundle."""
        for reference in self._begun:
            self._ray.cancel(reference, force=False)
        if self._begun:
            self._ray.wait([*self._begun], num_returns=len(self._begun), timeout=_END_S)
            for reference in self._begun:
                with contextlib.suppress(self._ray.exceptions.RayError):
                    self._ray.cancel(reference, force=True)
        for begun in self._begun.values():
            self._tidy(begun.waiting.job)

    def _tidy(self, job: Job) -> None:
        """After a process that may not have cleaned up; what is on a node's own disk is out of reach."""
        tidy(Bundle(os.path.join(self._settings.workdir, job.name)))


def convert_task(job: Job, settings: Settings) -> Outcome:
    """One conversion, in a process of Ray's that goes on to the next one warm."""
    from vit_convert.core.warm import keep, keeps

    if not keeps():
        keep()
    return run_job(job, settings)


def _late(job: Job, limit: float) -> Outcome:
    said = f"not done after {limit:g} s"
    fix = "Give more by --timeout, or look at its events.jsonl for the stage that it was in."
    return Outcome(job.name, job.checkpoint, "timeout", INTERRUPTED, limit, error=said, fix=fix)


def _connected(address: str) -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as e:
        raise UsageError("--runner=ray: Ray is not installed", fix="pip install -e '.[ray]', on every node.") from e
    _require_listening(address)
    host = address.partition(":")[0]
    # Nodes on loopback addresses, several on one machine: the driver is one of them by name.
    here: dict[str, Any] = {"_node_ip_address": host} if host.startswith("127.") else {}
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **here)
    except (ConnectionError, RuntimeError, ValueError) as e:
        raise _no_cluster(address, e) from e
    return ray


def _require_listening(address: str) -> None:
    """Asks at once whether anybody is at HOST:PORT: Ray itself asks for minutes, and then ends the process."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():  # "auto"
        return
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_S).close()
    except OSError as e:
        raise _no_cluster(address, e) from e


def _no_cluster(address: str, error: Exception) -> UsageError:
    return UsageError(
        f"--ray_address={address}: no cluster there ({' '.join(str(error).split())[:300]})",
        fix="ray start --head begins one, ray start --address=HEAD:6379 joins it.",
    )
