"""Where the time of one run goes: each kernel, how long it takes and how it uses tensor cores and memory, by Nsight
Compute.

    python benchmarks/gpu/ncu.py BUNDLE --precision=fp16 --batch=256 --output=benchmarks/results/h200-ncu-b16.json

The engine has to be built. Needs what `python -m vit_convert.engine` does, and `ncu`, which must be allowed to read the
GPU's counters (https://developer.nvidia.com/ERR_NVGPUCTRPERM). Kernels are replayed for each group of counters, at the
clocks that the GPU takes, and
find in the caches what fits there: of tensors that are several times as large, little.
"""

import shlex
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import app, flags
from counters import DURATION, METRICS, by_kernel, read_csv

from vit_convert.core.bundle import Bundle, write_json
from vit_convert.core.command import exit_code
from vit_convert.core.errors import BenchmarkError
from vit_convert.engine.backend import cuda
from vit_convert.engine.backend.trt import load_backend
from vit_convert.engine.bundle_engines import find_plan, open_engine
from vit_convert.engine.commands import environment
from vit_convert.engine.handoff import describe_model, open_bundle
from vit_convert.engine.measure.benchmark import shape_to_measure
from vit_convert.engine.measure.loops import Worker, measure_latency, measure_throughput
from vit_convert.engine.runtime.engine import Engine
from vit_convert.engine.runtime.session import Session

_PRECISION = flags.DEFINE_string("precision", "fp16", "Which engine of the bundle.")
_BATCH = flags.DEFINE_integer("batch", 256, "Images of the run.")
_NCU = flags.DEFINE_string("ncu", "ncu", "Nsight Compute's command line.")
_SECONDS = flags.DEFINE_float("seconds", 1.0, "Of timing whole runs, without the profiler.")
_OUTPUT = flags.DEFINE_string("output", None, "The JSON file.")
_INSIDE = flags.DEFINE_bool(
    "inside", False, "Do the single run that is profiled; this script calls itself with this flag."
)


def main(argv: Sequence[str]) -> int:
    if len(argv) != 2:
        raise app.UsageError(f"takes one bundle, given {len(argv) - 1}")
    if _OUTPUT.value is None and not _INSIDE.value:
        raise app.UsageError("--output: not given")
    return exit_code(lambda: _run(argv[1]), debug=False, when_interrupted="nothing is written")


def _run(path: str) -> int:
    backend, bundle = load_backend("auto", for_this_gpu=True), open_bundle(path)
    engine = open_engine(backend, bundle, find_plan(backend, bundle, _PRECISION.value))
    if _INSIDE.value:
        run_once(engine)
        return 0
    found = profile(bundle, engine)
    write_json(
        _OUTPUT.value, {"command": shlex.join(["python", *sys.argv]), "environment": environment(backend), **found}
    )
    for row in found["kernels"]:
        print(f"{row['share_percent']:5.1f} %  {row['launches']:3} x {row['mean_us']:8.1f} us  {row['name'][:100]}")
    return 0


def profile(bundle: Bundle, engine: Engine) -> dict[str, Any]:
    """Times whole runs of an engine, and then each kernel of one run.

    Args:
        bundle: holds it.
        engine: loaded.

    Returns:
        model, precision, graph, batch, run_us (median of a replayed CUDA graph, by the GPU's clock), kernels_us (the
        sum of their durations under the profiler), kernels: see `by_kernel`.

    Raises:
        BenchmarkError: the engine takes no such batch, its runs cannot be recorded, or ncu is missing or read nothing.
    """
    with Session(engine) as session:
        worker = Worker(session, shape_to_measure(engine, _BATCH.value), transfers=False)
        if worker.prepared.graph is None:
            raise BenchmarkError(
                f"{engine.path.name}: {worker.prepared.why_no_graph}", fix="A run is timed as a CUDA graph."
            )
        measure_throughput([worker], _SECONDS.value)  # brings the clocks to their level between runs
        run_ms = float(np.median(measure_latency([worker], _SECONDS.value).gpu_ms))
    command = [
        _NCU.value,
        "--csv",
        "--page=raw",
        "--print-units=base",
        f"--metrics={','.join(METRICS)}",
        "--profile-from-start=off",
    ]
    # By default ncu empties the caches before each kernel, which would charge it for data left there by its
    # predecessor.
    command += ["--clock-control=none", "--cache-control=none"]
    inside = [
        sys.executable,
        __file__,
        str(bundle.root),
        f"--precision={_PRECISION.value}",
        f"--batch={_BATCH.value}",
        "--inside",
    ]
    try:
        done = subprocess.run([*command, *inside], capture_output=True, text=True)
    except OSError as e:
        raise BenchmarkError(
            f"--ncu={_NCU.value}: {e.strerror}", fix="Install Nsight Compute, or say where it is."
        ) from e
    launches = [launch for launch in read_csv(done.stdout) if DURATION in launch]
    if done.returncode or not launches:
        said = (done.stdout + done.stderr).strip()[-2000:]
        raise BenchmarkError(
            f"{_NCU.value} exits with {done.returncode}, {len(launches)} kernels: {said}",
            fix="See this script's first lines.",
        )
    return {
        "model": describe_model(bundle),
        "precision": _PRECISION.value,
        "graph": engine.record.onnx.path,
        "batch": _BATCH.value,
        "run_us": round(1e3 * run_ms, 1),
        "kernels_us": round(sum(launch[DURATION] for launch in launches) / 1e3, 1),
        "kernels": by_kernel(launches),
    }


def run_once(engine: Engine) -> None:
    """Runs an engine once between cuProfilerStart and cuProfilerStop, after a run that warms up."""
    with Session(engine, cuda_graphs=False) as session:
        worker = Worker(session, shape_to_measure(engine, _BATCH.value), transfers=False)
        cuda.call("cuProfilerStart")
        worker.enqueue()
        session.wait()
        cuda.call("cuProfilerStop")


if __name__ == "__main__":
    app.run(main)
