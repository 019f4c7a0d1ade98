"""What is passed on of each attempt: to the files, to people and to engines; and the files of a remote workdir."""

import types

import pytest

from vit_convert.batch import mirror as mirror_module
from vit_convert.batch.folder import BatchFolder
from vit_convert.batch.job import Job
from vit_convert.batch.mirror import Mirror, mirrored
from vit_convert.batch.outcome import EngineOutcome, Outcome
from vit_convert.batch.told import Told
from vit_convert.core.errors import UsageError


class Noting:
    """Notes every call."""

    def __init__(self, name, done):
        self._name, self._done = name, done

    def __getattr__(self, called):
        return lambda *arguments, **options: self._done.append((f"{self._name}.{called}", arguments, options))


@pytest.fixture
def told():
    """With lanes for engines, if asked; what was done, in order."""

    def told(earlier=(), fail_fast=False, engines=False):
        done = []
        found = Told(Noting("ledger", done), Noting("screen", done), dict(earlier), fail_fast=fail_fast)
        if engines:
            found._lanes, found._runner = Noting("lanes", done), Noting("runner", done)
        return found, done

    return told


def names(done):
    return [name for name, *_ in done]


JOB, DONE = Job("a", "a.npz"), Outcome("a", status="done", exit_code=0, seconds=3.0, peak_rss_mib=7.0, host="h")


def test_a_conversion_from_its_start_to_its_end(told):
    found, done = told()
    found.watch("start", 2, JOB, None)
    assert done == [("ledger.event", ("start", "a"), {"worker": 2}), ("screen.start", (2, JOB), {})]
    done.clear()
    found.watch("end", 2, JOB, DONE)
    assert names(done) == ["ledger.event", "ledger.put", "screen.end"]
    assert done[0][2] == {"worker": 2, "status": "done", "exit_code": 0, "seconds": 3.0, "peak_rss_mib": 7.0,
                          "attempts": 0, "error": ""}  # fmt: skip
    assert done[1][1] == (DONE,) and done[2][1] == (2, DONE)


def test_another_attempt_is_said(told):
    found, done = told()
    found.watch("retry", 2, JOB, Outcome("a", status="failed", error="killed"))
    assert names(done) == ["ledger.event", "screen.say"] and done[1][1] == ("a: killed; another attempt follows",)


@pytest.mark.parametrize(
    ("status", "seconds", "kept"),
    [("fresh", 9.0, True), ("done", 9.0, False), ("fresh", 0.0, False), ("timeout", 9.0, False)],
)
def test_what_a_fresh_one_took_is_what_the_last_command_measured(told, status, seconds, kept):
    earlier = Outcome("a", seconds=seconds, peak_rss_mib=100.0, host="there")
    found, done = told({"a": earlier})
    found.ended(1, Outcome("a", status=status, seconds=0.5, host="here"))
    (outcome,) = done[0][1]
    assert (outcome.seconds, outcome.peak_rss_mib, outcome.host) == (
        (9.0, 100.0, "there") if kept else (0.5, 0.0, "here")
    )


def test_engines_follow_a_whole_bundle(told):
    found, done = told(engines=True)
    found.ended(3, DONE)
    assert names(done) == ["ledger.put", "screen.rest", "lanes.add"]
    assert (done[0][1][0].status, done[0][1][0].exit_code) == ("pending", None)  # until its engines are there
    assert done[1][1] == (3,) and done[2][1] == (DONE,)
    done.clear()
    found.ended(3, Outcome("a", status="failed", exit_code=3))
    assert names(done) == ["ledger.put", "screen.end"]
    done.clear()
    found.wait()
    assert names(done) == ["lanes.wait"]
    told()[0].wait()


@pytest.mark.parametrize(
    ("status", "fail_fast", "engines", "stops"),
    [
        ("failed", True, True, True),
        ("failed", False, True, False),
        ("failed", True, False, False),
        ("done", True, True, False),
        ("timeout", True, True, True),
    ],
)
def test_nothing_more_is_begun_after_a_failure_if_asked(told, status, fail_fast, engines, stops):
    found, done = told(fail_fast=fail_fast, engines=engines)
    found._finished(None, Outcome("a", status=status))
    assert names(done) == ["ledger.put", "screen.end", *(["runner.stop", "lanes.stop"] if stops else [])]


@pytest.mark.parametrize(
    ("outcome", "again", "event", "said"),
    [
        (
            EngineOutcome(status="done", gpu="h100", device="1", seconds=90.0),
            False,
            "engines_end",
            "a: engines on h100 1 in ",
        ),
        (EngineOutcome(status="fresh", seconds=90.0), False, "engines_end", "a: engines in "),
        (EngineOutcome(status="failed", error="no driver"), False, "engines_end", ""),
        (
            EngineOutcome(status="failed", error="no driver"),
            True,
            "engines_retry",
            "a: no driver; another attempt follows",
        ),
    ],
)
def test_what_is_said_of_engines(told, outcome, again, event, said):
    found, done = told(engines=True)
    found._engines_ended("a", outcome, again)
    assert done[0][:2] == ("ledger.event", (event, "a")) and done[0][2]["status"] == outcome.status
    assert [arguments[0].startswith(said) for name, arguments, _ in done[1:]] == ([True] if said else [])
    found._engines_began("a", types.SimpleNamespace(type="h100", id="1"))
    assert done[-1] == ("ledger.event", ("engines_start", "a"), {"gpu": "h100", "device": "1"})


class Store:
    """A remote workdir in memory; refuses while it is down."""

    def __init__(self):
        self.files, self.down, self.writes = {}, False, 0

    def read(self, name):
        return self.files.get(name)

    def write(self, name, content):
        if self.down:
            raise UsageError("the store is down")
        self.writes += 1
        self.files[name] = content


@pytest.fixture
def folder(tmp_path):
    found = BatchFolder(tmp_path / "work")
    found.root.mkdir()
    return found


def test_the_last_commands_files_are_fetched(folder):
    store = Store()
    store.files = {folder.record.name: b"record"}
    Mirror(folder, store).fetch()
    assert folder.record.read_bytes() == b"record" and not folder.events.exists()
    Mirror(folder, None).fetch()


def test_a_record_is_sent_now_and_then(folder, monkeypatch):
    now, store = [100.0], Store()
    monkeypatch.setattr(mirror_module.time, "monotonic", lambda: now[0])
    mirror = Mirror(folder, store)
    for time, content, sent in ((100.0, b"1", b"1"), (129.9, b"2", b"1"), (130.0, b"3", b"3")):
        now[0] = time
        folder.record.write_bytes(content)
        mirror.record_changed()
        assert store.files[folder.record.name] == sent
    now[0], store.down = 200.0, True
    folder.record.write_bytes(b"4")
    mirror.record_changed()  # a later call tries again
    assert store.files[folder.record.name] == b"3"
    Mirror(folder, None).record_changed()


def test_at_the_end_all_are_sent_and_then_removed(folder):
    store, paths = Store(), (folder.events, folder.table, folder.record)  # and no page
    for path in paths:
        path.write_bytes(path.name.encode())
    Mirror(folder, None).finish()
    assert all(path.exists() for path in paths)
    store.down = True
    with pytest.raises(UsageError, match="down"):
        Mirror(folder, store).finish()
    assert all(path.exists() for path in paths)
    store.down = False
    Mirror(folder, store).finish()
    assert store.files == {path.name: path.name.encode() for path in paths} and not any(path.exists() for path in paths)


@pytest.mark.parametrize("fails", [False, True])
def test_a_remote_workdir_is_held_and_left_clean(folder, monkeypatch, fails):
    store, held = Store(), []

    class Hold:
        def __init__(self, *arguments):
            held.append(arguments)

        def __enter__(self):
            held.append("in")

        def __exit__(self, *error):
            held.append("out")

    monkeypatch.setattr(mirror_module, "remote_at", lambda address: store)
    monkeypatch.setattr(mirror_module, "hold_remote", Hold)
    store.files = {folder.record.name: b"before"}
    try:
        with mirrored(folder, "s3://b/w", "batch"):
            assert folder.record.read_bytes() == b"before" and held == [(store, folder.lock.name, "batch"), "in"]
            folder.record.write_bytes(b"after")
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    assert store.files[folder.record.name] == b"after" and held[-1] == "out"
    assert folder.root.exists() is fails  # unfinished bundles may be there


def test_a_folder_is_no_remote(folder):
    with mirrored(folder, "", "batch") as mirror:
        folder.record.write_bytes(b"record")
        mirror.record_changed()
    assert folder.record.exists()
