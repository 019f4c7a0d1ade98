"""How JAX and PyTorch are timed: as vit_convert.engine.measure.loops times our engines, one call at a time and calls
queued ahead."""

import datetime
import os
import pathlib
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np

from vit_convert.core.bundle import read_json, write_json
from vit_convert.engine.backend import cuda
from vit_convert.engine.measure.loops import MIN_RUNS, QUEUED
from vit_convert.engine.measure.monitor import Monitor, merge_summaries

PASSES = 2  # passes, whose difference is the noise of a row


def measure(
    call: Callable[[], Any], wait: Callable[[Any], None], batch: int, seconds: float, warmup_seconds: float
) -> dict[str, Any]:
    """Times one function whose results are computed asynchronously.

    Args:
        call: starts one batch and returns a handle of its result.
        wait: waits for a handle.
        batch: images per call.
        seconds: of one pass: half of it for throughput, half for latency.
        warmup_seconds: called before the first measurement.

    Returns:
        images_per_second, noise_percent, p50_ms, p95_ms, p99_ms, runs, and NVML's clocks and power, if available.
    """
    _queued(call, wait, warmup_seconds)
    rates, latencies, told, monitor = [], [], [], Monitor()
    for _ in range(PASSES):
        with monitor:  # while the GPU is busy, as for our engines
            rates.append(batch * _queued(call, wait, seconds / 2))
        told.append(monitor.summary())
        latencies += _single(call, wait, seconds / 2)
    mean = float(np.mean(rates))
    return {
        "images_per_second": round(mean, 1),
        "noise_percent": round(100 * (max(rates) - min(rates)) / mean, 2),
        **{f"p{q}_ms": round(float(np.percentile(latencies, q)), 4) for q in (50, 95, 99)},
        "runs": len(latencies),
        **merge_summaries(told),
    }


def _queued(call: Callable[[], Any], wait: Callable[[Any], None], seconds: float) -> float:
    pending: deque[Any] = deque()
    calls, started = 0, time.perf_counter()
    while calls < MIN_RUNS or time.perf_counter() < started + seconds:
        if len(pending) == QUEUED:
            wait(pending.popleft())
        pending.append(call())
        calls += 1
    while pending:
        wait(pending.popleft())
    return calls / (time.perf_counter() - started)


def _single(call: Callable[[], Any], wait: Callable[[Any], None], seconds: float) -> list[float]:
    times: list[float] = []
    deadline = time.perf_counter() + seconds
    while len(times) < MIN_RUNS or time.perf_counter() < deadline:
        started = time.perf_counter()
        wait(call())
        times.append(1e3 * (time.perf_counter() - started))
    return times


class Results:
    """Rows in a JSON file, written after each, with their date; a row that is there already, measured alike, is not
    measured again.

    Args:
        path: the file.
        **about: what holds for all rows (versions, GPU, model, image size, seconds), to which the driver and the loops'
            own settings are
            added: rows of anything else are dropped.
    """

    def __init__(self, path: str | os.PathLike[str], **about: Any):
        self._path, gpu = pathlib.Path(path), cuda.gpu()
        about |= {"driver": gpu.driver if gpu else "", "min_calls": MIN_RUNS, "queued": QUEUED, "passes": PASSES}
        found = read_json(self._path, {})
        known = found.pop("rows", [])
        self.rows: list[dict[str, Any]] = [row for row in known if "failed" not in row and found == about]
        self._about = about

    def add(self, key: dict[str, Any], work: Callable[[], dict[str, Any]]) -> None:
        """Measures one row, unless it is known; a failure is recorded, and the next row continues."""
        if any(all(row.get(name) == value for name, value in key.items()) for row in self.rows):
            return
        row = {**key, "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")}
        try:
            row |= work()
        except Exception as e:  # a variant that a library cannot run is a result
            row["failed"] = f"{type(e).__name__}: {str(e)[:300]}"
        print(row, flush=True)
        self.rows.append(row)
        write_json(self._path, {**self._about, "rows": self.rows})
