"""The order, the memory and the attempts of a run, with workers that do nothing but answer."""

import dataclasses

import pytest

from vit_convert.batch import local
from vit_convert.batch.estimate import Corrected, Estimate
from vit_convert.batch.job import Job
from vit_convert.batch.local import Limits, LocalRunner
from vit_convert.batch.outcome import Outcome
from vit_convert.batch.run import Settings

GIB = 1024.0


class Clock:
    """Time that passes only while a run waits."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


class FakeWorker:
    def __init__(self, number: int, world: "FakePool"):
        self.number, self.pid, self.job, self.world, self.begun = number, 100 + number, None, world, 0.0
        self.rss_mib = 400.0

    def give(self, job):
        self.job, self.begun = job, self.world.clock.now
        self.world.log.append(("start", job.name))
        self.world.most = max(self.world.most, sum(w.job is not None for w in self.world.workers))

    def take(self):
        script = self.world.script.get(self.job.name, [])
        outcome = script.pop(0) if script else Outcome(self.job.name, status="done", exit_code=0)
        name, self.job = self.job.name, None if outcome is not None else self.job
        return outcome and dataclasses.replace(outcome, name=name)


class FakePool:
    """One job ends at each step, in the order in which they began; a job whose script says "hang" never does."""

    def __init__(self, clock: Clock):
        self.clock, self.script, self.log, self.workers, self.most, self.closed = clock, {}, [], [], 0, False

    @property
    def idle(self):
        return [worker for worker in self.workers if worker.job is None]

    @property
    def busy(self):
        return [worker for worker in self.workers if worker.job is not None]

    def start(self):
        self.workers.append(FakeWorker(len(self.workers), self))
        return self.workers[-1]

    def ready(self, timeout_s):
        self.clock.now += max(timeout_s, 0.1)
        busy = [worker for worker in self.busy if self.script.get(worker.job.name) != "hang"]
        return sorted(busy, key=lambda worker: worker.begun)[:1]

    def end(self, worker):
        self.workers.remove(worker)
        self.log.append(("ended", worker.number))
        return "signal SIGTERM"

    def bury(self, worker):
        self.workers.remove(worker)
        return "signal SIGKILL"

    def close(self):
        self.closed = True


@pytest.fixture
def world(monkeypatch):
    clock = Clock()
    pool = FakePool(clock)
    monkeypatch.setattr(local, "Pool", lambda settings: pool)
    monkeypatch.setattr(local, "time", clock)
    return pool


def run(memory_mib, *, jobs=2, memory_gib=100.0, **limits):
    """Runs jobs of these sizes; returns what was said of attempts and to the user."""
    told, said = [], []
    runner = LocalRunner(
        Settings("out"),
        Limits(jobs, memory_gib, **limits),
        lambda kind, worker, job, outcome: told.append((kind, job.name, outcome)),
        said.append,
    )
    estimates = {name: Estimate((int(mib), "fp16"), 1, 1.0, mib, True) for name, mib in memory_mib.items()}
    runner.run([Job(name) for name in memory_mib], estimates)
    return told, said


def starts(world):
    return [name for kind, name in world.log if kind == "start"]


def ended(told):
    return {name: outcome for kind, name, outcome in told if kind == "end"}


def test_the_largest_come_first_and_no_more_than_asked_at_a_time(world):
    told, _ = run({"small": 100, "large": 900, "middle": 500})
    assert starts(world) == ["large", "middle", "small"] and world.most == 2 and world.closed
    assert set(ended(told)) == {"small", "large", "middle"}


def test_memory_decides_what_runs_beside_what(world):
    run({"large": 3 * GIB, "half": 2 * GIB, "small": 0.5 * GIB}, jobs=3, memory_gib=4.0)
    assert starts(world) == ["large", "small", "half"] and world.most == 2


def test_what_fits_nowhere_runs_alone_and_is_said(world):
    _, said = run({"huge": 8 * GIB, "small": 100}, memory_gib=4.0)
    assert starts(world) == ["huge", "small"] and world.most == 1
    assert len(said) == 1 and "huge: needs about 8192 MiB, more than --memory_gib=4: it runs alone" in said[0]


def test_idle_workers_make_room(world):
    run({"a": 900, "b": 890, "c": 880}, memory_gib=2.0)
    assert world.most == 2
    world.log.clear()
    run({"large": 1500}, memory_gib=1.7)  # two idle workers hold 800 MiB: one goes
    assert ("ended", 1) in world.log


def test_what_was_measured_corrects_the_estimates():
    corrected, small, other = Corrected(), *(Estimate((n, "fp16"), n, 1.0, 500.0, True) for n in (1, 2))
    assert corrected.memory_mib(small) == 500
    corrected.learn(small, 1000.0)
    corrected.learn(small, 800.0)
    assert corrected.memory_mib(small) == pytest.approx(1100) and corrected.memory_mib(other) == pytest.approx(1000)


def test_a_killed_job_is_tried_again_with_more_memory(world):
    world.script["a"] = [None, None, Outcome("", status="done", exit_code=0)]
    told, said = run({"a": 1.5 * GIB}, memory_gib=4.0)
    assert [kind for kind, _, _ in told] == ["start", "retry"] * 2 + ["start", "end"]
    assert ended(told)["a"].attempts == 3 and ended(told)["a"].status == "done"
    assert not said  # it was told once, at the first attempt, or not at all


def test_attempts_come_to_an_end(world):
    world.script["a"] = [None] * 9
    told, _ = run({"a": 100, "b": 100}, retries=1)
    outcome = ended(told)["a"]
    assert (outcome.status, outcome.exit_code, outcome.attempts) == ("failed", 1, 2) and "SIGKILL" in outcome.error
    assert ended(told)["b"].status == "done"


def test_what_will_not_pass_is_tried_once(world):
    world.script["bad"] = [Outcome("", status="failed", exit_code=3)]
    world.script["network"] = [Outcome("", status="failed", exit_code=3, passing=True)]
    told, _ = run({"bad": 100, "network": 90})
    assert ended(told)["bad"].attempts == 1 and ended(told)["network"].attempts == 2
    assert ended(told)["network"].status == "done"


def test_fail_fast_begins_nothing_more(world):
    world.script["a"] = [Outcome("", status="failed", exit_code=3)]
    told, _ = run({"a": 900, "b": 800, "c": 700}, jobs=1, fail_fast=True)
    assert starts(world) == ["a"] and set(ended(told)) == {"a"}


def test_a_late_job_is_ended_and_not_tried_again(world):
    world.script["slow"] = "hang"
    told, _ = run({"slow": 900, "b": 100}, timeout_s=3.0)
    outcome = ended(told)["slow"]
    assert (outcome.status, outcome.exit_code, outcome.attempts) == ("timeout", 130, 1)
    assert "not done after 3 s" in outcome.error and ended(told)["b"].status == "done"


def test_workers_are_ended_when_a_run_is_interrupted(world, monkeypatch):
    def interrupt(timeout_s):
        raise KeyboardInterrupt

    world.ready = interrupt
    with pytest.raises(KeyboardInterrupt):
        run({"a": 100})
    assert world.closed
