"""The load test for GPU hosts, on the simulated GPU: failures are answered, engines come back, errors are seen."""

import json
import pathlib

import pytest
import simulated_gpu
from pair_by_hand import LENGTH, SIDE, write_pair

from vit_convert.core.bundle import Bundle

BENCHMARKS = pathlib.Path(__file__).parents[2] / "benchmarks" / "gpu"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import session_load

    return session_load


@pytest.fixture
def load(gpu, script, monkeypatch, tmp_path):
    """Runs it for two seconds, with a failure every 0.02 unless told otherwise."""
    monkeypatch.setattr("vit_convert.serve.session.load_backend", lambda name, **_: gpu[0])
    output = tmp_path / "so_far.json"

    def run(*paths, fail_every=0.02):
        given = {"minutes": 1 / 30, "streams": 2, "fail_every": fail_every, "retry_seconds": 0.005}
        found = script.load([str(path) for path in paths], **given, output=str(output))
        assert found["done"] and json.loads(output.read_text())["done"] is False
        return found

    return run


@pytest.fixture
def pair(gpu, tmp_path):
    """A pair with engines for the simulated GPU, the text tower's off by an error."""

    def write(error=0.0):
        root = write_pair(tmp_path / "pair")
        for tower, shape in (("image", (SIDE, SIDE, 3)), ("text", (LENGTH,))):
            bundle = Bundle(root / tower)
            plan = bundle.plan("tensorrt", "8.6.0", "sm90", "fp32")
            ranges = [((1, *shape), (4, *shape), (4, *shape))]
            simulated_gpu.write_plan(plan, bundle.onnx(), ranges, error=error if tower == "text" else 0.0)
        return root

    return write


def test_failures_are_answered_and_engines_come_back(load, script, engines, pair):
    found = load(engines("fp32"), pair())
    for row in found["bundles"].values():
        assert row["wrong"] == row["lost"] == [] and row["answers"] > 4 and row["runs_on"]["tensorrt"] > 0
        # each failure is of an engine, so those after the first are of engines that came back
        assert row["failures_answered"] == row["failures_put_in"] >= 2
    assert script.faults(found, may_grow_mib=1024) == []


def test_wrong_answers_are_seen(load, script, engines):
    found = load(engines("fp32", error=1.0), fail_every=1e9)
    (row,) = found["bundles"].values()
    assert row["wrong"] and row["lost"] == []
    assert any("wrong" in line for line in script.faults(found, may_grow_mib=1024))


def test_the_command_writes_what_it_saw(load, script, engines, tmp_path, capsys):
    words = ["--minutes=0.01", "--streams=1", "--fail_every=0.02", "--retry_seconds=0.005", "--may_grow_mib=1024"]
    output = tmp_path / "load.json"
    script._FLAGS(["session_load.py", f"--bundle={engines('fp32')}", f"--output={output}", *words])
    assert script.main([]) == 0
    written = json.loads(output.read_text())
    assert written["done"] and written["faults"] == [] and written["environment"]["python"] and written["memory"]
    assert json.loads(capsys.readouterr().out)["bundles"] == written["bundles"]


def test_wrong_similarities_are_seen(load, pair):
    found = load(pair(error=0.3), fail_every=1e9)["bundles"]["pair"]
    assert any("the cosine of an image and a text is off" in line for line in found["wrong"])


def test_memory_that_grows_and_engines_that_never_ran_are_faults(script):
    samples = [{"gpu_free_mib": 4000.0 - 200 * (place // 10), "rss_mib": 900.0} for place in range(60)]
    grown = script.growth(samples)
    assert grown == {"gpu_mib": 400.0, "rss_mib": 0.0}  # of 40 to 59 against 20 to 39: two steps of 200
    row = {"answers": 3, "runs_on": {"onnxruntime": 3}, "wrong": [], "lost": []}
    said = script.faults({"growth": grown, "bundles": {"a": row}}, may_grow_mib=128)
    assert said == ["gpu_mib grew by 400.0 MiB", "a: no engine ran, see its session's warning"]
    assert script.faults({"growth": grown, "bundles": {"a": row}}, may_grow_mib=500, without_engine=True) == []
    swinging = [{"gpu_free_mib": 4000.0 + 300 * (place % 6 == 5), "rss_mib": 900.0} for place in range(60)]
    assert script.growth(swinging)["gpu_mib"] == 0.0  # an engine that is absent after its failure
