"""What the manifest and the events say that each stage took: seconds of a clock that the test sets, memory that it
really touched."""

import json
import pathlib
import types

import numpy as np
import pytest

from vit_convert.core import pipeline
from vit_convert.core.bundle import Bundle
from vit_convert.core.config import default_config
from vit_convert.core.pipeline import Context, Stage, run_stages
from vit_convert.core.progress import Progress
from vit_convert.core.record import StageResult

MIB = 1 << 20


def _done(work):
    return StageResult(summary=work() or "")


@pytest.fixture
def run(tmp_path):
    """Runs stages that do what they are given to do; returns their rows."""

    def run(**works):
        bundle, rows = Bundle(tmp_path / "bundle"), []
        bundle.require_writable()
        stages = [
            Stage(name, (), StageResult, lambda context, work=work: _done(work), lambda context: 1)
            for name, work in works.items()
        ]
        context = Context(
            default_config(), bundle, Progress(bundle.events, quiet=True), "python -m vit_convert --config=x.py"
        )
        run_stages(stages, context, rows)
        return {row.name: row for row in rows}, bundle

    return run


def resident_mib(key: str) -> float:
    """What Linux says of this process; read here apart from the code under test."""
    return int(pathlib.Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0]) / 1024


@pytest.mark.skipif(
    not pathlib.Path("/proc/self/clear_refs").exists(), reason="Linux alone forgets the high-water mark"
)
def test_peak_memory_is_in_mib_and_each_stage_has_its_own(run):
    before, peak = {}, {}

    def touch(mib):
        before[mib] = resident_mib("VmRSS")
        np.ones(mib * MIB, np.uint8)  # written, so resident; gone when the next line runs
        peak[mib] = resident_mib("VmHWM")

    rows, _ = run(small=lambda: touch(1), large=lambda: touch(300), after=lambda: touch(2))
    # between the two readings the process does next to nothing: far less than the 2.4 % by which 1000 is not 1024
    assert abs(rows["large"].peak_rss_mib - peak[300]) < 4 < 0.024 * 300
    # other memory that it touches or frees meanwhile
    assert abs(rows["large"].peak_rss_mib - before[300] - 300) < 60
    for name, mib in (("small", 1), ("after", 2)):
        assert abs(rows[name].peak_rss_mib - before[mib]) < 60, name


@pytest.mark.parametrize(
    ("status", "mib"),
    [("VmPeak:\t 9999999 kB\nVmHWM:\t  524288 kB\nVmRSS:\t 7 kB\n", 512.0), ("Name:\tpython\n", 192.0), (None, 192.0)],
)
def test_the_kernels_unit_is_kib(monkeypatch, status, mib):
    """Both in man 5 proc and, where that is not there, in man 2 getrusage."""

    def read_text(**options):
        if status is None:
            raise FileNotFoundError
        return status

    monkeypatch.setattr(
        pipeline, "pathlib", types.SimpleNamespace(Path=lambda path: types.SimpleNamespace(read_text=read_text))
    )
    usage = types.SimpleNamespace(ru_maxrss=196_608)
    monkeypatch.setattr(pipeline, "resource", types.SimpleNamespace(RUSAGE_SELF=0, getrusage=lambda whose: usage))
    assert pipeline._peak_rss_mib() == mib


def test_seconds_of_each_stage(run, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(pipeline, "time", types.SimpleNamespace(monotonic=lambda: now[0]))

    def passes(seconds):
        now[0] += seconds

    rows, bundle = run(quick=lambda: passes(0.0126), slow=lambda: passes(75.0621))
    assert (rows["quick"].seconds, rows["slow"].seconds) == (0.013, 75.062)
    stages = {row["name"]: row for row in json.loads(bundle.manifest.read_text())["stages"]}
    ends = [event for event in map(json.loads, bundle.events.read_text().splitlines()) if event["event"] == "end"]
    for event in ends:
        assert (event["seconds"], event["peak_rss_mib"]) == tuple(
            stages[event["stage"]][key] for key in ("seconds", "peak_rss_mib")
        )
    assert [event["seconds"] for event in ends] == [0.013, 75.062]


def test_the_command_and_the_versions_stand_in_the_manifest(run):
    _, bundle = run(only=lambda: None)
    manifest = json.loads(bundle.manifest.read_text())
    assert manifest["command"] == "python -m vit_convert --config=x.py"
    assert manifest["versions"]["numpy"] == np.__version__
    assert len(manifest["stages"][0]["key"]) == 64
