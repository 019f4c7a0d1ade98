"""Which stages run again, and what an interruption leaves."""

import json

import pytest

from vit_convert.bundle import Bundle
from vit_convert.config import default_config
from vit_convert.errors import CheckError, UsageError
from vit_convert.pipeline import Context, Stage, run_stages
from vit_convert.progress import Progress


class Road:
    """Three stages, each writing a file: a → b, and c after both; their inputs are attributes."""

    def __init__(self, root):
        self.bundle = Bundle(root)
        self.bundle.require_writable()
        self.inputs = {"a": 1, "b": 1, "c": 1}
        self.fails: dict[str, BaseException] = {}
        self.rows: list[dict] = []

    def stage(self, name, after):
        path = self.bundle.root / name

        def run(context):
            if name in self.fails:
                raise self.fails[name]
            assert {other for other in after if other in self.inputs} <= set(context.results)
            path.write_text(name)
            return {"value": self.inputs[name], "summary": f"made {name}"}

        return Stage(name, after, run, lambda context: self.inputs[name], lambda context: [path], lambda context: name in self.inputs)

    def run(self, **options) -> dict[str, str]:
        self.context = Context(default_config(), self.bundle, Progress(self.bundle.events, quiet=True))
        self.rows = []
        stages = [self.stage("a", ()), self.stage("b", ("a",)), self.stage("c", ("a", "b"))]
        try:
            run_stages(stages, self.context, self.rows, **options)
        finally:
            self.statuses = {row["name"]: row["status"] for row in self.rows}
        return self.statuses


@pytest.fixture
def road(tmp_path):
    road = Road(tmp_path / "bundle")
    assert road.run() == {"a": "done", "b": "done", "c": "done"}
    return road


def test_nothing_changed(road):
    assert road.run() == {"a": "fresh", "b": "fresh", "c": "fresh"}
    assert road.context.results["b"] == {"value": 1, "summary": "made b"}


def test_a_change_redoes_what_depends_on_it(road):
    road.inputs["b"] = 2
    assert road.run() == {"a": "fresh", "b": "done", "c": "done"}
    assert road.run() == {"a": "fresh", "b": "fresh", "c": "fresh"}


def test_a_lost_file_redoes_its_stage(road):
    (road.bundle.root / "b").unlink()
    assert road.run() == {"a": "fresh", "b": "done", "c": "fresh"}


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
    assert {row["name"]: row["status"] for row in manifest["stages"]} == {"a": "fresh", "b": "failed", "c": "done"}
    road.fails.clear()
    assert road.run() == {"a": "fresh", "b": "done", "c": "done"}


def test_a_damaged_manifest_runs_everything(road):
    road.bundle.manifest.write_text('{"stages": [')
    assert road.run() == {"a": "done", "b": "done", "c": "done"}


def test_manifest_and_events_say_what_happened(road):
    manifest = json.loads(road.bundle.manifest.read_text())
    for row in manifest["stages"]:
        assert row["seconds"] >= 0
        assert row["peak_rss_mib"] > 1
        assert len(row["key"]) == 64
    assert "numpy" in manifest["versions"]
    events = [json.loads(line) for line in road.bundle.events.read_text().splitlines()]
    assert [(e["event"], e["stage"]) for e in events if e["event"] != "message"] == [
        (kind, stage) for stage in "abc" for kind in ("start", "end")
    ]
