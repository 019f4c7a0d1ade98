"""Which stages run again, and what an interruption leaves."""

import dataclasses
import errno
import json
import os
import pathlib
import shutil

import pytest

from vit_convert.core.bundle import Bundle, write_json
from vit_convert.core.config import default_config
from vit_convert.core.errors import CheckError, UsageError
from vit_convert.core.manifest import Manifest, StageRecord
from vit_convert.core.pipeline import Context, Stage, all_fresh, run_stages
from vit_convert.core.progress import Progress
from vit_convert.core.record import StageResult


@dataclasses.dataclass(frozen=True, kw_only=True)
class Made(StageResult):
    """What a stage of these tests returns."""

    value: int


class Road:
    """Three stages, each writing a file: a → b, and c after both; their inputs are attributes."""

    def __init__(self, root):
        self.bundle = Bundle(root)
        self.bundle.require_writable()
        self.inputs = {"a": 1, "b": 1, "c": 1}
        self.fails: dict[str, BaseException] = {}
        self.rows: list[StageRecord] = []
        self.writes: dict[str, str] = {}
        self.seen: dict[str, dict] = {}  # what the manifest said when a stage ran

    def stage(self, name, after):
        path = self.bundle.root / name

        def run(context):
            if name in self.fails:
                raise self.fails[name]
            self.seen[name] = {
                row["name"]: row["status"] for row in json.loads(self.bundle.manifest.read_text())["stages"]
            }
            assert {other for other in after if other in self.inputs} <= set(context.results)
            path.write_text(self.writes.get(name, name))
            return Made(value=self.inputs[name], summary=f"made {name}")

        return Stage(
            name,
            after,
            Made,
            run,
            lambda context: self.inputs[name],
            lambda context: [path],
            lambda context: name in self.inputs,
        )

    def stages(self) -> list[Stage]:
        return [self.stage("a", ()), self.stage("b", ("a",)), self.stage("c", ("a", "b"))]

    def is_fresh(self, **options) -> bool:
        """By a look alone, which leaves everything as it was."""
        before = {path.name: path.stat().st_mtime_ns for path in self.bundle.root.iterdir()}
        context = Context(default_config(), self.bundle, Progress(None, quiet=True))
        found = all_fresh(self.stages(), context, **options)
        assert {path.name: path.stat().st_mtime_ns for path in self.bundle.root.iterdir()} == before
        return found

    def run(self, **options) -> dict[str, str]:
        self.context = Context(default_config(), self.bundle, Progress(self.bundle.events, quiet=True))
        self.rows = []
        try:
            run_stages(self.stages(), self.context, self.rows, **options)
        finally:
            self.statuses = {row.name: row.status for row in self.rows}
        return self.statuses


@pytest.fixture
def road(tmp_path):
    road = Road(tmp_path / "bundle")
    assert road.run() == {"a": "done", "b": "done", "c": "done"}
    return road


def test_nothing_changed(road):
    assert road.run() == {"a": "fresh", "b": "fresh", "c": "fresh"}
    assert road.context.results.get("b") == Made(value=1, summary="made b")


def test_a_change_redoes_what_depends_on_it(road):
    road.inputs["b"] = 2
    assert road.run() == {"a": "fresh", "b": "done", "c": "done"}
    assert road.run() == {"a": "fresh", "b": "fresh", "c": "fresh"}


def test_a_lost_file_redoes_its_stage(road):
    (road.bundle.root / "b").unlink()
    assert road.run() == {"a": "fresh", "b": "done", "c": "fresh"}


def test_another_file_redoes_its_stage_and_what_read_it(road):
    (road.bundle.root / "a").write_text("another's")
    assert road.run() == {"a": "done", "b": "fresh", "c": "fresh"}  # a is again what b and c read
    assert (road.bundle.root / "a").read_text() == "a"
    (road.bundle.root / "a").unlink()
    road.writes["a"] = "not the same twice"
    assert road.run() == {"a": "done", "b": "done", "c": "done"}


def test_a_copied_bundle_is_fresh(road, tmp_path):
    shutil.copytree(road.bundle.root, tmp_path / "copy")  # with other dates
    road.bundle = Bundle(tmp_path / "copy")
    assert road.run() == {"a": "fresh", "b": "fresh", "c": "fresh"}


def test_the_manifest_tells_before_a_file_is_touched(road):
    road.inputs["a"] = 2
    road.run()
    assert road.seen == {
        "a": {"a": "running", "b": "stale", "c": "stale"},
        "b": {"a": "done", "b": "running", "c": "stale"},
        "c": {"a": "done", "b": "done", "c": "running"},
    }


def test_the_report_goes_before_anything_changes_and_stays_where_nothing_does(road):
    """It tells of files that are no more those of a conversion that was killed."""
    road.bundle.report.write_text("{}")
    road.run()
    assert road.bundle.report.exists()
    road.inputs["b"] = 2
    road.fails["b"] = Killed()
    with pytest.raises(Killed):
        road.run()
    assert not road.bundle.report.exists()


class Killed(BaseException):
    """After it nothing of the process runs: not even what it would have written."""


@pytest.mark.parametrize("killed", ["a", "b", "c"])
@pytest.mark.parametrize("wrote", [False, True])
def test_a_killed_stage_is_run_again(road, monkeypatch, killed, wrote):
    """A, then B killed, then A: what B left of the stage, and what A left behind it, are told apart."""
    road.inputs["a"] = 2
    road.fails[killed] = Killed()
    road.writes = dict.fromkeys("abc", "B's")

    def written(path, value):
        if any(row["status"] == "failed" for row in value["stages"]):
            raise Killed()
        write_json(path, value)

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr("vit_convert.core.pipeline.write_json", written)
        road.run()
    if wrote:
        (road.bundle.root / killed).write_text("B's")
    finished = Manifest.read(road.bundle)
    assert [finished.finished(name) for name in "abc"] == [name < killed for name in "abc"]
    road.inputs["a"] = 1
    road.fails, road.writes = {}, {}
    road.run()
    assert [(road.bundle.root / name).read_text() for name in "abc"] == ["a", "b", "c"]


def test_what_lies_behind_the_last_stage_is_looked_at(road):
    """Under this config; what is of another one goes."""
    assert road.run(until="a") == {"a": "fresh"}
    assert [Manifest.read(road.bundle).finished(name) for name in "abc"] == [True, True, True]
    road.inputs["b"] = 2
    assert road.run(until="a") == {"a": "fresh"}
    assert [Manifest.read(road.bundle).finished(name) for name in "abc"] == [True, False, False]
    assert set(road.context.results) == {"a"}


def test_a_stage_that_is_not_wanted_does_not_end_the_look(road):
    del road.inputs["b"]
    road.run()
    assert road.run(until="a") == {"a": "fresh"}
    assert [Manifest.read(road.bundle).finished(name) for name in "abc"] == [True, False, True]
    assert (road.bundle.root / "c").exists()


@pytest.mark.parametrize("until", ["a", "b", "c", ""])
def test_the_manifest_names_each_stage_once_and_in_order(road, until):
    for force in (False, True):
        road.run(until=until, force=force)
        manifest = json.loads(road.bundle.manifest.read_text())
        assert [row["name"] for row in manifest["stages"]] == ["a", "b", "c"]


def test_begin_comes_after_the_manifest_and_before_the_first_file(road):
    def begin():
        seen.append(json.loads(road.bundle.manifest.read_text())["stages"][1]["status"])

    seen = []
    road.run(begin=begin)
    road.inputs["b"] = 2
    road.run(begin=begin)
    assert seen == ["fresh", "running"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_fails_under_a_stage_is_a_users_mistake(road, number):
    road.inputs["b"] = 2
    road.fails["b"] = OSError(number, os.strerror(number), str(road.bundle.root / "labels"))
    with pytest.raises(UsageError, match="labels: "):
        road.run()
    road.fails["b"] = OSError(errno.EACCES, "Permission denied", "/somewhere/checkpoint.npz")
    with pytest.raises(PermissionError):
        road.run()


def removing(road, monkeypatch, where, *names, then=None):
    """Lets somebody remove files while a stage writes its own."""
    write = pathlib.Path.write_text

    def written(path, text, *arguments, **options):
        found = write(path, text, *arguments, **options)
        if path.name == where:
            for name in names:
                (road.bundle.root / name).unlink()
            if then is not None:
                raise then
        return found

    monkeypatch.setattr(pathlib.Path, "write_text", written)


@pytest.mark.parametrize("error", [FileNotFoundError(errno.ENOENT, "No such file"), RuntimeError("no graph"), None])
@pytest.mark.parametrize("where", ["b", "c"])
def test_a_file_that_somebody_removes_meanwhile_is_named(road, monkeypatch, where, error):
    """Whatever the stage that misses it raises, and if none does."""
    removing(road, monkeypatch, where, "a", then=error)
    with pytest.raises(UsageError, match=r"/a: was removed while the command worked in its folder$") as caught:
        road.run(force=True)
    assert caught.value.__cause__ is error and caught.value.fix == "Run it again."
    monkeypatch.undo()
    assert set(road.run().values()) <= {"done", "fresh"} and (road.bundle.root / "a").read_text() == "a"


def test_a_failure_with_all_files_in_place_is_the_stages_own(road, monkeypatch):
    removing(road, monkeypatch, "c", then=RuntimeError("ours"))
    with pytest.raises(RuntimeError, match="ours"):
        road.run(force=True)


def test_force_and_until(road):
    assert road.run(force=True, until="b") == {"a": "done", "b": "done"}
    assert road.run() == {"a": "fresh", "b": "fresh", "c": "fresh"}
    with pytest.raises(UsageError, match=r"--until=bb: not one of a, b, c"):
        road.run(until="bb")


def test_a_stage_that_is_not_wanted(road):
    del road.inputs["b"]
    assert road.run() == {"a": "fresh", "c": "done"}  # c depended on b before


@pytest.mark.parametrize("error", [CheckError("no"), KeyboardInterrupt(), ZeroDivisionError()])
def test_failure_is_recorded_and_continued(road, error):
    road.inputs |= {"b": 2}
    road.fails["b"] = error
    with pytest.raises(type(error)):
        road.run()
    assert road.statuses == {"a": "fresh", "b": "failed"}
    manifest = json.loads(road.bundle.manifest.read_text())
    assert {row["name"]: row["status"] for row in manifest["stages"]} == {"a": "fresh", "b": "failed", "c": "stale"}
    road.fails.clear()
    assert road.run() == {"a": "fresh", "b": "done", "c": "done"}


def test_a_damaged_manifest_runs_everything(road):
    road.bundle.manifest.write_text('{"stages": [')
    assert road.run() == {"a": "done", "b": "done", "c": "done"}


def test_events_say_what_happened(road):
    events = [json.loads(line) for line in road.bundle.events.read_text().splitlines()]
    assert [(e["event"], e["stage"]) for e in events if e["event"] != "message"] == [
        (kind, stage) for stage in "abc" for kind in ("start", "end")
    ]


# --- a look without a run ---------------------------------------------------------------------------------------------


def test_a_look_finds_what_a_run_would(tmp_path):
    road = Road(tmp_path / "new")
    assert not road.is_fresh() and not road.is_fresh(until="a")
    road.run(until="a")
    assert road.is_fresh(until="a") and not road.is_fresh(until="b")
    road.run()
    assert road.is_fresh()
    road.inputs["b"] = 2
    assert road.is_fresh(until="a") and not road.is_fresh(until="b") and not road.is_fresh()


def test_a_stage_that_is_not_wanted_is_no_work(road):
    del road.inputs["b"]
    road.run()
    assert road.is_fresh()
    road.inputs["b"] = 1
    assert not road.is_fresh()


WRONG = [CheckError("gone"), KeyError("gone"), OSError("gone")]


@pytest.mark.parametrize("error", WRONG, ids=lambda error: type(error).__name__)
def test_inputs_that_cannot_be_read_are_for_a_run_to_tell(road, monkeypatch, error):
    """A look says that there is work; what lies behind the last stage of a run is given up."""
    road.run()
    stage = road.stage

    def broken(name, after):
        def inputs(context):
            raise error

        return dataclasses.replace(stage(name, after), inputs=inputs) if name == "b" else stage(name, after)

    monkeypatch.setattr(road, "stage", broken)
    assert not road.is_fresh() and road.is_fresh(until="a")
    road.run(until="a")
    assert list(Manifest.read(road.bundle).rows) == ["a"]
    with pytest.raises(type(error), match="gone"):
        road.run()


def test_later_stages_see_what_a_fresh_one_returned(road, monkeypatch):
    road.run()
    stage, seen = road.stage, []

    def looking(name, after):
        def inputs(context):
            seen.append({key: context.results.get(key).value for key in context.results})
            return road.inputs[name]

        return dataclasses.replace(stage(name, after), inputs=inputs)

    monkeypatch.setattr(road, "stage", looking)
    assert road.is_fresh()
    assert seen == [{}, {"a": 1}, {"a": 1, "b": 1}]


def test_a_result_that_cannot_be_read_is_made_again(road):
    """Another version's, or a damaged one."""
    road.run()
    manifest = json.loads(road.bundle.manifest.read_text())
    manifest["stages"][1]["result"] = {"value": "one"}
    write_json(road.bundle.manifest, manifest)
    assert not road.is_fresh() and road.is_fresh(until="a")
    assert road.run() == {"a": "fresh", "b": "done", "c": "fresh"}
    assert road.context.results.get("b").value == 1
