"""Where the time of one run goes, layer by layer, as TensorRT's own profiler tells: which are ours, which are its
convolutions, and which only copy from one format into another.

    python benchmarks/gpu/layer_times.py BUNDLE --precision=fp16 --batch=256 --output=RESULT.json

The engine has to be built; needs what `python -m vit_convert.engine` does, and a GPU that does nothing else. Layers run
one after the other, without a CUDA graph: their sum is somewhat more than a run takes.
"""

import collections
import re
import shlex
import sys
from collections.abc import Mapping, Sequence

import numpy as np
from absl import app, flags

from vit_convert.core.bundle import write_json
from vit_convert.core.command import exit_code
from vit_convert.engine.backend.trt import Backend, load_backend
from vit_convert.engine.bundle_engines import find_plan, open_engine
from vit_convert.engine.commands import environment
from vit_convert.engine.handoff import open_bundle
from vit_convert.engine.measure.benchmark import shape_to_measure
from vit_convert.engine.measure.loops import Worker
from vit_convert.engine.runtime.engine import Engine
from vit_convert.engine.runtime.session import Session

_PRECISION = flags.DEFINE_string("precision", "fp16", "Which engine of the bundle.")
_BATCH = flags.DEFINE_integer("batch", 256, "Images of the run.")
_RUNS = flags.DEFINE_integer("runs", 20, "How many are measured; medians are given.")
_OUTPUT = flags.DEFINE_string("output", None, "The JSON file.", required=True)


def by_kind(layers: Mapping[str, float]) -> dict[str, float]:
    """Sums over layers whose names differ only in their numbers, the largest first.

    Example:
        >>> by_kind({"stage_1/conv1 [profile 2]": 0.5, "stage_2/conv1 [profile 2]": 1.0, "MaxPool [profile 2]": 2.0})
        {'MaxPool': 2.0, 'stage_#/conv#': 1.5}
    """
    kinds: dict[str, float] = collections.defaultdict(float)
    for name, ms in layers.items():
        kinds[re.sub(r"\d+", "#", re.sub(r" \[profile \d+\]$", "", name))[:120]] += ms
    return {name: round(ms, 4) for name, ms in sorted(kinds.items(), key=lambda row: -row[1])}


def profile(backend: Backend, engine: Engine) -> dict[str, float]:
    """Median milliseconds of each layer, the longest first."""
    times: dict[str, list[float]] = collections.defaultdict(list)

    class Profiler(backend.module.IProfiler):  # type: ignore[name-defined]
        """Gets every layer of a run when that has ended."""

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            times[layer_name].append(ms)

    with Session(engine, cuda_graphs=False) as session:
        worker = Worker(session, shape_to_measure(engine, _BATCH.value), transfers=False)
        for _ in range(3):
            worker.enqueue()
        session.wait()
        worker.prepared.context.profiler = profiler = Profiler()
        for _ in range(_RUNS.value):
            worker.enqueue()
            session.wait()
    del profiler  # which TensorRT does not keep alive
    medians = {name: float(np.median(found)) for name, found in times.items()}
    return {name: round(ms, 4) for name, ms in sorted(medians.items(), key=lambda row: -row[1])}


def main(argv: Sequence[str]) -> int:
    """Profiles an engine of a bundle."""
    if len(argv) != 2:
        raise app.UsageError(f"takes one bundle, given {len(argv) - 1}")
    return exit_code(lambda: _run(argv[1]), debug=False, when_interrupted="nothing is written")


def _run(path: str) -> int:
    backend, bundle = load_backend("auto", for_this_gpu=True), open_bundle(path)
    engine = open_engine(backend, bundle, find_plan(backend, bundle, _PRECISION.value))
    layers = profile(backend, engine)
    kinds = by_kind(layers)
    about = {"command": shlex.join(["python", *sys.argv]), "environment": environment(backend)}
    about |= {"graph": engine.record.onnx.path, "batch": _BATCH.value, "sum_ms": round(sum(layers.values()), 3)}
    write_json(_OUTPUT.value, {**about, "kinds_ms": kinds, "layers_ms": layers})
    print(f"{about['sum_ms']} ms in {len(layers)} layers")
    for name, ms in [*kinds.items()][:25]:
        print(f"{ms:8.4f} ms  {name}")
    return 0


if __name__ == "__main__":
    app.run(main)
