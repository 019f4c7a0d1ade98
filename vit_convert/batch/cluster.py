"""Runs jobs on a Ray cluster: each conversion is a task, wherever its cores and its memory are."""

import contextlib
import dataclasses
import logging
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vit_convert.batch.attempts import Waiting, Watcher, killed, late
from vit_convert.batch.cluster_gpus import RayGpus
from vit_convert.batch.estimate import MIB, Corrected, Estimate
from vit_convert.batch.job import Job
from vit_convert.batch.local import Limits
from vit_convert.batch.outcome import Outcome
from vit_convert.batch.run import Settings, run_job
from vit_convert.core.errors import UsageError
from vit_convert.core.leftovers import tidy

_TICK_S = 0.5
_CONNECT_S = 10.0
_WAITING_A_CORE = 2  # tasks queued in Ray besides those that run, so that no core waits for us
_END_S = 10.0  # time for a cancelled conversion to release its bundle


@dataclasses.dataclass(frozen=True)
class _Begun:
    waiting: Waiting
    time: float


class RayRunner:
    """Runs the jobs of a batch as Ray tasks. Ray's own processes serve as warm workers.

    Jobs lost with a worker or a node are tried again elsewhere, up to `Limits.retries` times. The workdir must be the
    same folder on all nodes, and the same version of this package must be installed on each.

    Args:
        settings: of the batch; its paths must be valid on every node.
        limits: `jobs` of 0 means as many as the cluster has cores; `memory_gib` is ignored, because each node accounts
            for its own.
        watch: receives progress.
        warn: shows warnings to the user.
        address: of the cluster; "auto" for this machine's.

    Raises:
        UsageError: Ray is not installed, or there is no cluster at the address.
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
        """Runs all jobs; see `LocalRunner.run`."""
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
        """Starts nothing more."""
        self._stopped = True

    def close(self) -> None:
        """Leaves the cluster."""
        self._ray.shutdown()

    def _begin(self, waiting: list[Waiting]) -> None:
        """Submits tasks, not all at once, so that the memory of later ones can be set by what the first ones used."""
        room = self._limits.jobs or _WAITING_A_CORE * max(1, int(self._ray.cluster_resources().get("CPU", 1)))
        now = time.monotonic()
        for each in [each for each in waiting if each.not_before <= now][: max(0, room - len(self._begun))]:
            waiting.remove(each)
            each.attempts += 1
            reference = self._task.options(memory=self._memory_bytes(each)).remote(each.job, self._settings)
            self._begun[reference] = _Begun(each, now)
            self._watch("start", None, each.job, None)

    def _memory_bytes(self, waiting: Waiting) -> int:
        """The memory that Ray reserves for a task. A task that needs more than any node has would wait for ever, so it
        gets the largest node's."""
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
            outcome = late(waiting.job, self._limits.timeout_s)
            self._tidy(waiting.job)
        except self._ray.exceptions.RayError as e:  # a worker or a node was lost
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
        """Cancels tasks that run too long, counted from submission, which includes the time that a task waited for
        resources."""
        limit = self._limits.timeout_s
        for reference, begun in self._begun.items():
            over = time.monotonic() - begun.time - limit
            if limit and over > 0:
                self._ray.cancel(reference, force=over > _END_S)

    def _cancel(self) -> None:
        """Cancels running tasks, and waits until they release their bundles."""
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
        tidy(self._settings.bundle(job))


def convert_task(job: Job, settings: Settings) -> Outcome:
    """One conversion, in a process of Ray's that stays warm for the next one."""
    from vit_convert.core.warm import keep, keeps

    if not keeps():
        keep()
    return run_job(job, settings)


def _connected(address: str) -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as e:
        raise UsageError("--runner=ray: Ray is not installed", fix="pip install -e '.[ray]', on every node.") from e
    _require_listening(address)
    host = address.partition(":")[0]
    # With several nodes on one machine, on loopback addresses, the driver must name its own.
    here: dict[str, Any] = {"_node_ip_address": host} if host.startswith("127.") else {}
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **here)
    except (ConnectionError, RuntimeError, ValueError) as e:
        raise _no_cluster(address, e) from e
    return ray


def _require_listening(address: str) -> None:
    """Checks right away whether anybody listens at HOST:PORT: Ray itself tries for minutes, and then ends the
    process."""
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
