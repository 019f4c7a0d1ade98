"""One measurement: warmed up before anything counts, in halves of its time, and closed whatever happens; its row as
text and as a point of a picture."""

import contextlib
import types

import numpy as np
import pytest
from recorded_axes import Axes

from vit_convert.core.benchmark_results import BenchmarkRow
from vit_convert.core.errors import BenchmarkError
from vit_convert.core.recommend import RESIDENT
from vit_convert.engine.measure import benchmark as module
from vit_convert.engine.measure import plot
from vit_convert.engine.measure.benchmark import END_TO_END, Case, rows_table
from vit_convert.engine.measure.loops import Latency
from vit_convert.engine.measure.plot import plot_rows

LATENCY = Latency(np.ones(3), np.ones(3))


@pytest.fixture
def measured(monkeypatch):
    """Runs a case on an engine of which this is known; what was done, in order."""
    done, free = [], iter([1000, 400])

    class Session:
        def __init__(self, engine, *, cuda_graphs):
            done.append(("open", cuda_graphs))
            self.number = sum(step[0] == "open" for step in done)

        def close(self):
            done.append(("close", self.number))

    def worker(session, shape, *, transfers):
        done.append(("worker", session.number, shape, transfers))
        graph = None if session.number > 1 else "graph"
        return types.SimpleNamespace(prepared=types.SimpleNamespace(graph=graph, why_no_graph=f"{session.number}"))

    def throughput(workers, seconds):
        done.append(("throughput", len(workers), seconds))
        return 100.0 * seconds

    def run(latency=lambda workers, seconds: LATENCY):
        monkeypatch.setattr(module, "Session", Session)
        monkeypatch.setattr(module, "Worker", worker)
        monkeypatch.setattr(module, "measure_throughput", throughput)
        monkeypatch.setattr(module, "measure_latency", latency)
        monkeypatch.setattr(module, "shape_to_measure", lambda engine, batch: (batch, 3))
        monkeypatch.setattr(module.cuda, "free_memory_bytes", lambda: next(free))

        class Monitor(contextlib.nullcontext):
            def __enter__(self):
                done.append(("monitor", "on"))

            def __exit__(self, *error):
                done.append(("monitor", "off"))

            def summary(self):
                return {"power_w": 7.0}

        return module._run_case("engine", Case("fp16", 4, 2, False, True), 3.0, 0.5, Monitor()), done

    return run


def test_warm_first_then_half_its_time_each(measured):
    latency = []
    found, done = measured(latency=lambda workers, seconds: latency.append(seconds) or LATENCY)
    assert done == [
        ("open", True), ("open", True), ("worker", 1, (4, 3), False), ("worker", 2, (4, 3), False),
        ("throughput", 2, 0.5), ("monitor", "on"), ("throughput", 2, 1.5), ("monitor", "off"),
        ("close", 1), ("close", 2),
    ]  # fmt: skip
    assert latency == [1.5] and found.images_per_second == 150.0  # what was warmed up does not count
    assert (found.context_bytes, found.gpu, found.latency) == (600, {"power_w": 7.0}, LATENCY)
    assert (found.cuda_graph, found.why_no_graph) == (True, "1")  # of the stream that latency is taken of


def test_sessions_are_closed_when_it_fails(measured):
    def fails(workers, seconds):
        raise BenchmarkError("out of memory")

    with pytest.raises(BenchmarkError, match="out of memory"):
        measured(latency=fails)


def row(precision="fp16", batch=1, rate=1000.0, p50=1.0, **more):
    given = {"precision": precision, "batch": batch, "streams": 1, "images_per_second": rate, "p50_ms": p50}
    return BenchmarkRow.from_dict({**given, "transfers": RESIDENT, "cuda_graph": True, **more})


def test_the_table_word_for_word():
    plain = row(rate=12345.6, noise_percent=0.25, p95_ms=1.25, p99_ms=1.5, gpu_p50_ms=0.75, gpu_memory_mib=99.6)
    other = row("int8", 64, transfers=END_TO_END, cuda_graph=False, sm_clock_mhz=1980.4, power_w=310.7)
    header, *lines = rows_table([plain, other]).splitlines()
    assert header.split()[:7] == ["precision", "batch", "streams", "transfers", "graph", "images/s", "±%"]
    first, second = lines[-2:]
    assert first.split() == [
        "fp16", "1", "1", "none", "on", "12", "346", "0.2", "1.000", "1.250", "1.500", "0.750", "100",
    ]  # fmt: skip
    assert second.split()[:5] == ["int8", "64", "1", "in+out", "off"] and second.split()[-3:] == ["1", "980", "311"]


def test_the_picture_has_a_line_for_each_kind_and_a_point_for_each_batch(monkeypatch):
    painted = []
    monkeypatch.setattr(plot, "draw", lambda path, size, paint: painted.append((path, size, paint)) or "")
    rows = [row(batch=8, rate=300.0, p50=4.0), row(batch=1, rate=100.0, p50=2.0), row("int8", 1, 120.0, 1.5)]
    rows += [row(batch=1, rate=90.0, p50=2.5, transfers=END_TO_END), row(batch=1, rate=80.0, p50=3.0, cuda_graph=False)]
    assert plot_rows(rows, "a.png", title="GPU") == ""
    (path, _, paint), axes = painted[0], Axes()
    paint(axes)
    assert path == "a.png"
    assert {options["label"]: [*zip(*arguments)] for arguments, options in axes.of("plot")} == {
        "fp16, 1 streams": [(100.0, 2.0), (300.0, 4.0)],  # by batch
        "int8, 1 streams": [(120.0, 1.5)],
        "fp16, 1 streams, with transfers": [(90.0, 2.5)],
        "fp16, 1 streams, no graph": [(80.0, 3.0)],
    }
    assert sorted((arguments[1], arguments[0]) for arguments, _ in axes.of("annotate"))[-1] == ((300.0, 4.0), "8")
    ((_, said),) = axes.of("set")
    assert (said["title"], said["yscale"]) == ("GPU", "log") and "images/s" in said["xlabel"]
