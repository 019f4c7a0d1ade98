"""Our Python model for Triton on a GPU without a server: streams at once, and an engine that fails once a minute.

Each stream is a `TritonPythonModel` of its own, as instances of a server are. A failure is put in where the engine
runs; the request is answered by onnxruntime, and the engine is loaded again. Every answer is compared with JAX; GPU
memory and the process's own are written down every ten seconds. Ends with 1 if an answer was wrong or lost.

    python benchmarks/gpu/session_load.py --bundle=out/vit_b32 --minutes=10 --streams=4
"""

import collections
import contextlib
import dataclasses
import json
import pathlib
import resource
import sys
import tempfile
import threading
import time
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
from absl import app, flags

from vit_convert.core.errors import BenchmarkError
from vit_convert.core.tolerance import tolerance_for
from vit_convert.engine.backend import cuda
from vit_convert.engine.commands import environment
from vit_convert.engine.handoff import read_config
from vit_convert.engine.runtime.session import Session
from vit_convert.serve.triton.models.classifier import TritonPythonModel
from vit_convert.serve.triton.models_of import models_of
from vit_convert.serve.triton.offered import Offered, read_offered
from vit_convert.serve.triton.parts import Asked
from vit_convert.serve.triton.repository import write_models

_FLAGS = flags.FlagValues()  # its own: tests import this beside other scripts
_BUNDLE = flags.DEFINE_string(
    "bundle", None, "A bundle with verified engines of this host.", required=True, flag_values=_FLAGS
)
_MINUTES = flags.DEFINE_float("minutes", 10.0, "How long.", flag_values=_FLAGS)
_STREAMS = flags.DEFINE_integer("streams", 4, "At once.", flag_values=_FLAGS)
_FAIL_EVERY = flags.DEFINE_float("fail_every", 60.0, "Seconds between two failures.", flag_values=_FLAGS)
_RETRY = flags.DEFINE_float("retry_seconds", 5.0, "Until a failed engine is loaded again.", flag_values=_FLAGS)
_OUTPUT = flags.DEFINE_string("output", "session-load.json", "Result file.", flag_values=_FLAGS)
_EVERY_SECONDS = 10.0


@dataclasses.dataclass
class Tally:
    """What one stream saw."""

    answers: int = 0
    images: int = 0
    wrong: list[str] = dataclasses.field(default_factory=list)
    lost: list[str] = dataclasses.field(default_factory=list)
    seconds: list[float] = dataclasses.field(default_factory=list)


_COUNTED: collections.Counter[str] = collections.Counter()  # by metric, of all models


class _Family:
    COUNTER = GAUGE = None

    def __init__(self, name: str, **about: Any):
        self._name = name

    def Metric(self, labels: dict[str, str]) -> Any:
        def increment(by: int) -> None:
            _COUNTED[self._name] += by

        return types.SimpleNamespace(increment=increment, set=lambda to: None)


def install_utils() -> None:
    """Puts what our Python model uses of Triton's module in its place."""
    module = types.ModuleType("triton_python_backend_utils")
    module.get_input_tensor_by_name = lambda request, name: types.SimpleNamespace(as_numpy=lambda: request[name])
    module.Tensor = lambda name, value: (name, value)
    module.TritonError = str
    module.InferenceResponse = lambda tensors, error=None: types.SimpleNamespace(tensors=dict(tensors), error=error)
    module.MetricFamily = _Family
    sys.modules[module.__name__] = module


@contextlib.contextmanager
def failing(every: float) -> Iterator[list[float]]:
    """Lets one run of an engine fail every so many seconds; yields when."""
    whole, failed, lock = Session.run, [time.monotonic()], threading.Lock()

    def run(self: Session, inputs: Any) -> Any:
        with lock:
            due = time.monotonic() - failed[-1] > every
            if due:
                failed.append(time.monotonic())
        if due:
            raise BenchmarkError("put in on purpose: a kernel failed")
        return whole(self, inputs)

    Session.run = run  # type: ignore[method-assign]
    try:
        yield failed
    finally:
        Session.run = whole  # type: ignore[method-assign]


def stream(
    root: pathlib.Path, offered: Offered, tolerance: Any, end: float, retry_seconds: float, tally: Tally
) -> None:
    """Asks one model in a loop, with batches of one to all of the reference's images."""
    from vit_convert.core.compare import compare

    inputs, outputs = ([tensor.name for tensor in of] for of in (offered.signature.inputs, offered.signature.outputs))
    config = {
        "max_batch_size": offered.max_batch,
        "input": [{"name": name} for name in inputs],
        "output": [{"name": name} for name in outputs],
        "parameters": {"retry_seconds": {"string_value": str(retry_seconds)}},
    }
    about = {"model_config": json.dumps(config), "model_repository": str(root / "model"), "model_version": "1"}
    model = TritonPythonModel()
    model.initialize({**about, "model_name": "model"})
    count, number = len(offered.samples[inputs[0]]), 0
    try:
        while time.monotonic() < end:
            size, number = number % count + 1, number + 1
            begun = time.perf_counter()
            (answer,) = model.execute([{name: offered.samples[name][:size] for name in inputs}])
            if answer.error is not None:
                tally.lost.append(answer.error)
                continue
            tally.seconds.append(time.perf_counter() - begun)
            tally.answers, tally.images = tally.answers + 1, tally.images + size
            for name in outputs:
                if not tolerance.met_by(found := compare(offered.expected[name][:size], answer.tensors[name])):
                    tally.wrong.append(f"{name} at batch {size}: cosine {found.cosine:.6f}")
    finally:
        model.finalize()


def memory() -> dict[str, float]:
    """MiB that are free on the GPU, and the most that this process ever had."""
    free = cuda.free_memory_bytes() / 2**20 if cuda.gpu() else 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"gpu_free_mib": round(free, 1), "peak_rss_mib": round(peak, 1)}


def load(bundle: str, *, minutes: float, streams: int, fail_every: float, retry_seconds: float) -> dict[str, Any]:
    """Runs the streams.

    Args:
        bundle: with engines of this host.
        minutes: how long.
        streams: at once.
        fail_every: seconds between two failures.
        retry_seconds: until a failed engine is loaded again.

    Returns:
        What they saw.
    """
    install_utils()
    _COUNTED.clear()
    offered = read_offered(bundle)
    precision = offered.plans[0].precision if offered.plans else "fp32"
    tolerance = tolerance_for(read_config(offered.bundle), precision, engine=True)
    tallies, samples = [Tally() for _ in range(streams)], []
    with tempfile.TemporaryDirectory() as folder, failing(fail_every) as failed:
        root = pathlib.Path(folder)
        write_models(root, models_of(offered, Asked("model", runtime="python"))[:1])
        started = time.monotonic()
        end = started + 60 * minutes
        threads = [
            threading.Thread(target=stream, args=(root, offered, tolerance, end, retry_seconds, tally))
            for tally in tallies
        ]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            samples.append({"seconds": round(time.monotonic() - started, 1), **memory()})
            threads[0].join(min(_EVERY_SECONDS, 60 * minutes / 4))
        wall = time.monotonic() - started
    seconds = np.concatenate([tally.seconds for tally in tallies])
    return {
        "about": (__doc__ or "").splitlines()[0],
        "command": " ".join(["python", "benchmarks/gpu/session_load.py", *sys.argv[1:]]),
        "environment": environment(None),
        "precision": precision,
        "streams": streams,
        "seconds": round(wall, 1),
        "answers": sum(tally.answers for tally in tallies),
        "images_per_second": round(sum(tally.images for tally in tallies) / wall, 1),
        "p50_ms": round(1e3 * float(np.percentile(seconds, 50)), 3),
        "p99_ms": round(1e3 * float(np.percentile(seconds, 99)), 3),
        "failures_put_in": len(failed) - 1,
        "failures_answered": _COUNTED["vit_convert_engine_failures_total"],
        "wrong": [line for tally in tallies for line in tally.wrong][:20],
        "lost": [line for tally in tallies for line in tally.lost][:20],
        "memory": samples,
    }


def main(argv: list[str]) -> int:
    """Runs the streams and writes what they saw; 1 if an answer was wrong or lost."""
    found = load(
        _BUNDLE.value,
        minutes=_MINUTES.value,
        streams=_STREAMS.value,
        fail_every=_FAIL_EVERY.value,
        retry_seconds=_RETRY.value,
    )
    pathlib.Path(_OUTPUT.value).write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps({key: value for key, value in found.items() if key != "memory"}, indent=1))
    return 1 if found["wrong"] or found["lost"] else 0


if __name__ == "__main__":
    flags.FLAGS.append_flag_values(_FLAGS)
    flags.mark_flag_as_required("bundle")
    _FLAGS.mark_as_parsed()  # by app.run, which knows them now
    app.run(main)
