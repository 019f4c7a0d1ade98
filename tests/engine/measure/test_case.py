"""One measurement: warmed up before anything counts, in halves of its time, and closed whatever happens; its row as
text and as a point of a picture."""

import contextlib
import types

import numpy as np
import pytest
from recorded_axes import Axes

from vit_convert.core.benchmark_results import BenchmarkRow, MeasuredEngine
from vit_convert.core.errors import BenchmarkError
from vit_convert.core.recommend import RESIDENT
from vit_convert.engine.measure import benchmark as module
from vit_convert.engine.measure import plot
from vit_convert.engine.measure.benchmark import END_TO_END, Case, Pass, rows_table, summarise_case
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
    transfers = "".join(list(RESIDENT))  # as a word out of a file is: none of Python's own copies
    return BenchmarkRow.from_dict({**given, "transfers": transfers, "cuda_graph": True, **more})


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


def test_the_digits_that_a_row_keeps():
    """Of images a second and MiB one, of percent two, of milliseconds four."""
    latency = Latency(np.array([1.23456, 1.23456]), np.array([0.98765, 0.98765]))
    passes = [Pass(rate, latency, round(20.44 * 2**20), True, "", {}) for rate in (1000.04, 1000.24)]
    about = MeasuredEngine.from_dict({"graph": "m", "input": "float32", "engine_memory_mib": 100.2})
    found = summarise_case(Case("fp16", 8, 1, False, True), passes, about)
    assert (found.images_per_second, found.context_memory_mib, found.gpu_memory_mib) == (1000.1, 20.4, 120.6)
    assert (found.noise_percent, found.p50_ms, found.gpu_p99_ms) == (0.02, 1.2346, 0.9877)


@pytest.mark.parametrize("told", [None, types.SimpleNamespace(int8_layers=3, fused_attention=None)])
def test_what_is_the_same_for_all_rows_of_an_engine(told):
    record = types.SimpleNamespace(
        summary=told, onnx=types.SimpleNamespace(path="lowerings/plugin.onnx"),
        plan=types.SimpleNamespace(bytes=7), build_seconds=1.5,
    )  # fmt: skip
    leading = types.SimpleNamespace(dtype=np.dtype("uint8"))
    engine = types.SimpleNamespace(record=record, leading=leading, memory_bytes=round(10.26 * 2**20))
    expected = {
        "graph": "plugin.onnx",
        "input": "uint8",
        "plan_bytes": 7,
        "build_seconds": 1.5,
        "engine_memory_mib": 10.3,
    }
    assert module._about(engine).to_dict() == {**expected, **({"int8_layers": 3} if told else {})}


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [("", "", []), ("no NVML", "no NVML", ["clocks and power are not sampled: no NVML"]),
     ("", "it went away", ["clocks and power were not sampled to the end: it went away"])],
)  # fmt: skip
def test_what_could_not_be_sampled_is_said_once(monkeypatch, before, after, said):
    """Before anything is measured, where it is known then."""
    warned, monitor = [], types.SimpleNamespace(missing=before)

    def run_case(*arguments):
        monitor.missing = after
        return Pass(100.0, LATENCY, 0, True, "", {})

    monkeypatch.setattr(module, "Monitor", lambda: monitor)
    monkeypatch.setattr(module, "_run_case", run_case)
    monkeypatch.setattr(module, "_about", lambda engine: MeasuredEngine.from_dict({}))
    progress = types.SimpleNamespace(
        warn=warned.append, bar=lambda *_, **__: contextlib.nullcontext(lambda count: None)
    )
    saved = []
    rows, skipped = module.run_cases(
        {"fp16": None}, [Case("fp16", 8, 1, False, True)], seconds=1.0, warmup_seconds=0.1, progress=progress,
        save=lambda rows, skipped: saved.append(len(rows)),
    )  # fmt: skip
    assert warned == said and (len(rows), skipped, saved) == (1, [], [1, 1]) and rows[0].noise_percent == 0.0


def test_transfers_are_measured_on_two_streams_at_least():
    """One copies while the other computes; more if more are asked for."""
    for streams, count in (([1], 2), ([1, 2], 2), ([1, 4], 4)):
        cases = module.plan_cases(["fp16"], [8], streams, cuda_graphs=(True, False))
        assert [case for case in cases if case.transfers] == [Case("fp16", 8, count, True, True)]


@pytest.mark.parametrize(("batch", "taken"), [(4, True), (5, False), (3, False)])
def test_a_batch_that_would_be_padded_is_not_measured(monkeypatch, batch, taken):
    """To more images, or split into fewer."""
    engine = types.SimpleNamespace(ranges=[types.SimpleNamespace(optimal=(4, 3))])
    monkeypatch.setattr(module, "choose_profile", lambda ranges, shape: types.SimpleNamespace(shape=(4, 3)))
    monkeypatch.setattr(module, "describe", lambda ranges: "batch 4")
    if taken:
        assert module.shape_to_measure(engine, batch) == (4, 3)
    else:
        with pytest.raises(BenchmarkError, match=f"batch {batch} would be padded to 4: the engine takes batch 4"):
            module.shape_to_measure(engine, batch)
