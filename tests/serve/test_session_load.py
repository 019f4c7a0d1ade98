"""The load test for GPU hosts, on the simulated GPU: failures are answered, engines come back, errors are seen."""

import pathlib

import pytest

BENCHMARKS = pathlib.Path(__file__).parents[2] / "benchmarks" / "gpu"


@pytest.fixture
def load(gpu, engines, monkeypatch):
    """Runs it for two seconds with a failure every 0.02."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr("vit_convert.serve.session.load_backend", lambda name, **_: gpu[0])
    import session_load

    def run(**options):
        path = str(engines("fp32", **options))
        return session_load.load(path, minutes=1 / 30, streams=2, fail_every=0.02, retry_seconds=0.005)

    return run


def test_failures_are_answered_and_engines_come_back(load):
    found = load()
    assert found["wrong"] == found["lost"] == [] and found["answers"] > 4
    # each failure is of an engine, so those after the first are of engines that came back
    assert found["failures_answered"] == found["failures_put_in"] >= 2


def test_wrong_answers_are_seen(load):
    found = load(error=1.0)
    assert found["wrong"] and found["lost"] == []
