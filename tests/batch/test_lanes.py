"""Engine tasks find their GPUs: one at a time on each, one at a time for each bundle, each type once."""

import threading
import time

import pytest

from vit_convert.batch import lanes
from vit_convert.batch.devices import Device
from vit_convert.batch.engines import Cancelled, EngineSettings
from vit_convert.batch.lanes import Lanes
from vit_convert.batch.outcome import EngineOutcome, Outcome


class FakeGpus:
    """Tasks that note who runs beside whom; a bundle's script says how its attempts end.

    The first ones wait until `meeting` run at a time.
    """

    def __init__(self, *given: Device, meeting: int = 1):
        self.meeting = meeting
        self.given, self.log, self.running, self.beside = list(given), [], [], []
        self.script, self.lock, self.hold = {}, threading.Lock(), threading.Event()
        if meeting == 1:
            self.hold.set()

    def devices(self):
        return self.given

    def run(self, name, device):
        with self.lock:
            self.running.append((name, device))
            self.beside.append(list(self.running))
            self.log.append((name, device))
            if len(self.running) == self.meeting > 1:
                self.hold.set()
        time.sleep(0.002)
        self.hold.wait(10)
        with self.lock:
            self.running.remove((name, device))
            script = self.script.get(name, [])
            status = script.pop(0) if script else "done"
        if status == "cancelled":
            raise Cancelled
        passing = status == "lost"
        return EngineOutcome(gpu=device.type, status="done" if status == "done" else "failed", passing=passing)

    def close(self):
        self.hold.set()


def through(gpus, names, *, retries=2, wait=True):
    """Runs bundles past these GPUs; returns how they ended, by name."""
    ended, lines = {}, []
    made = Lanes(
        gpus,
        "nowhere",
        EngineSettings(("build",)),
        retries=retries,
        begun=lambda name, device: lines.append(("start", name)),
        ended=lambda name, outcome, again: lines.append(("retry" if again else "end", name)),
        finished=lambda outcome: ended.__setitem__(outcome.name, outcome),
    )
    try:
        for name in names:
            made.add(Outcome(name, status="done", exit_code=0))
        if wait:
            made.wait()
    finally:
        made.close()
    return ended, lines


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    monkeypatch.setattr(lanes, "pause_s", lambda exit_code, attempts: 0.0)


def test_one_task_at_a_time_on_each_gpu_and_all_of_them_at_work():
    gpus = FakeGpus(Device("0", "A"), Device("1", "A"), meeting=2)
    ended, _ = through(gpus, [f"b{i}" for i in range(6)])
    assert len(ended) == 6 and all(outcome.status == "done" for outcome in ended.values())
    assert max(map(len, gpus.beside)) == 2
    assert all(len({device for _, device in row}) == len(row) for row in gpus.beside)


def test_a_bundle_goes_to_each_type_once_and_never_to_two_at_a_time():
    gpus = FakeGpus(Device("0", "A"), Device("1", "B"), Device("2", "B"), meeting=3)
    names = [f"b{i}" for i in range(8)]
    ended, _ = through(gpus, names)
    assert sorted((name, device.type) for name, device in gpus.log) == sorted((n, t) for n in names for t in "AB")
    assert all(len({name for name, _ in row}) == len(row) for row in gpus.beside)
    assert {tuple(sorted(row.gpu for row in outcome.engines)) for outcome in ended.values()} == {("A", "B")}
    assert max(map(len, gpus.beside)) == 3  # no type waits until all are through with the other


def test_what_may_pass_is_tried_again_and_the_rest_is_not():
    gpus = FakeGpus(Device("0", "A"))
    gpus.script = {"lost": ["lost", "lost", "done"], "never": ["lost"] * 9, "bad": ["bad", "done"]}
    ended, lines = through(gpus, ["lost", "never", "bad"])
    assert {name: outcome.status for name, outcome in ended.items()} == {
        "lost": "done",
        "never": "failed",
        "bad": "failed",
    }
    assert {name: outcome.engines[0].attempts for name, outcome in ended.items()} == {"lost": 3, "never": 3, "bad": 1}
    assert [kind for kind, name in lines if name == "lost"] == ["start", "retry"] * 2 + ["start", "end"]


def test_closing_ends_what_runs_and_begins_nothing():
    gpus = FakeGpus(Device("0", "A"))
    gpus.hold.clear()
    gpus.script = {"a": ["cancelled"]}
    ended, lines = through(gpus, ["a", "b"], wait=False)
    assert not ended and not gpus.running and [name for _, name in lines] in ([], ["a"])


def test_what_breaks_a_thread_ends_the_run():
    gpus = FakeGpus(Device("0", "A"))
    gpus.run = lambda name, device: 1 / 0
    with pytest.raises(ZeroDivisionError):
        through(gpus, ["a", "b"])


def test_a_gpu_that_joins_gets_tasks():
    gpus = FakeGpus(Device("", "A"))
    made = Lanes(
        *(gpus, "nowhere", EngineSettings(("build",))),
        retries=0,
        begun=lambda name, device: None,
        ended=lambda name, outcome, again: None,
        finished=lambda outcome: None,
    )
    gpus.given = [Device("", "A"), Device("", "A"), Device("", "B")]
    made.add(Outcome("a", status="done", exit_code=0))
    made.wait()
    assert made.types == ["A", "B"] and sum(map(len, made._threads.values())) == 3
    made.close()


def test_stop_lets_what_runs_end_and_leaves_the_rest():
    gpus = FakeGpus(Device("0", "A"))
    gpus.hold.clear()
    ended = []
    made = Lanes(
        *(gpus, "nowhere", EngineSettings(("build",))),
        retries=0,
        begun=lambda name, device: None,
        ended=lambda name, outcome, again: None,
        finished=lambda outcome: ended.append(outcome.name),
    )
    for name in ("a", "b", "c"):
        made.add(Outcome(name, status="done", exit_code=0))
    while not gpus.running:
        time.sleep(0.001)
    made.stop()
    made.add(Outcome("d", status="done", exit_code=0))
    gpus.hold.set()
    made.wait()
    made.close()
    assert ended == ["a"]
