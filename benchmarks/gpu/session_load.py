"""Our Python model for Triton on a GPU without a server: streams at once, and an engine that fails once a minute.

Each stream is a `TritonPythonModel` of its own, as instances of a server are (a pair of towers: one for each tower).
Failures are injected where the engine runs, into each of the bundles in turn; the request is answered by onnxruntime,
and the engine is loaded again. Every answer is compared with JAX, of a pair also the similarities; memory of the GPU
and of the process is written down every ten seconds, together with the result so far. Ends with 1 if an answer was
wrong or lost, if memory grew, or if an engine never ran (but for `--without_engine`).

    python benchmarks/gpu/session_load.py --bundle=out/vit_b32,out/siglip --minutes=10 --streams=4

The Python that runs it needs tensorrt and onnxruntime, not JAX.
"""

import contextlib
import dataclasses
import json
import pathlib
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np
from absl import app, flags
from triton_stand_in import COUNTED, config_of, install_utils

from vit_convert.core.bundle import as_json, write_json
from vit_convert.core.compare import compare
from vit_convert.core.errors import BenchmarkError, ConvertError
from vit_convert.core.pair import TOWERS, PairFacts, is_pair
from vit_convert.core.similarity import compare_rankings
from vit_convert.core.tolerance import similarity_misses, tolerance_for
from vit_convert.engine.backend import cuda
from vit_convert.engine.backend.trt import Backend, load_backend
from vit_convert.engine.commands import environment
from vit_convert.engine.handoff import read_config
from vit_convert.engine.pair_bundle import open_pair
from vit_convert.engine.runtime.session import Session
from vit_convert.serve.triton.models.classifier import TritonPythonModel
from vit_convert.serve.triton.models_of import models_of
from vit_convert.serve.triton.offered import Offered, read_offered
from vit_convert.serve.triton.parts import Asked
from vit_convert.serve.triton.repository import write_models

_FLAGS = flags.FlagValues()  # its own: tests import this beside other scripts
_BUNDLES = flags.DEFINE_list(
    "bundle", None, "Bundles or pairs with verified engines of this host; served at once.", required=True,
    flag_values=_FLAGS,
)  # fmt: skip
_MINUTES = flags.DEFINE_float("minutes", 10.0, "How long.", flag_values=_FLAGS)
_STREAMS = flags.DEFINE_integer("streams", 4, "Concurrent streams of each bundle.", flag_values=_FLAGS)
_FAIL_EVERY = flags.DEFINE_float("fail_every", 60.0, "Seconds between two failures.", flag_values=_FLAGS)
_RETRY = flags.DEFINE_float("retry_seconds", 5.0, "Seconds until a failed engine is loaded again.", flag_values=_FLAGS)
_OUTPUT = flags.DEFINE_string("output", "session-load.json", "Result file.", flag_values=_FLAGS)
_WITHOUT = flags.DEFINE_bool("without_engine", False, "Do not insist that an engine ran.", flag_values=_FLAGS)
# An engine of ViT-B in FP16 is 170 MiB: one that each failure leaves behind makes 1.5 GiB in ten minutes. Allocators
# keep some tens of MiB of what was freed.
_MAY_GROW = flags.DEFINE_float("may_grow_mib", 128.0, "Memory that may stay, beyond noise.", flag_values=_FLAGS)
_EVERY_SECONDS = 10.0


@dataclasses.dataclass
class Tally:
    """What one stream saw."""

    answers: int = 0
    images: int = 0  # or texts
    runs_on: dict[str, int] = dataclasses.field(default_factory=dict)
    wrong: list[str] = dataclasses.field(default_factory=list)
    lost: list[str] = dataclasses.field(default_factory=list)
    seconds: list[float] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Part:
    """A model, or a tower of a pair: what it is asked and has to answer."""

    name: str
    offered: Offered
    precision: str
    tolerance: Any


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is served: a model, or a pair with the config of its check."""

    name: str
    parts: Sequence[Part]
    pair: PairFacts | None = None
    config: ml_collections.ConfigDict | None = None


def subject_of(path: str) -> Subject:
    """Reads a bundle or a pair."""
    name = pathlib.Path(path).name
    if not is_pair(path):
        return Subject(name, [_part(name, path)])
    facts, bundles = open_pair(path)
    parts = [_part(f"{name}_{tower}", str(bundles[tower].root)) for tower in TOWERS]
    return Subject(name, parts, facts, read_config(bundles["image"]))


def _part(name: str, path: str) -> Part:
    offered = read_offered(path)
    precision = offered.plans[0].precision if offered.plans else "fp32"
    return Part(name, offered, precision, tolerance_for(read_config(offered.bundle), precision, engine=True))


@contextlib.contextmanager
def failing(every: float, names: Sequence[str]) -> Iterator[list[str]]:
    """Lets one run of an engine fail at this interval, in the threads of these names in turn; yields the list of
    names."""
    whole, last, failed, lock = Session.run, [time.monotonic()], [], threading.Lock()

    def run(self: Session, inputs: Any) -> Any:
        name = threading.current_thread().name
        with lock:
            due = time.monotonic() - last[0] > every and name == names[len(failed) % len(names)]
            if due:
                last[0] = time.monotonic()
                failed.append(name)
        if due:
            raise BenchmarkError("put in on purpose: a kernel failed")
        return whole(self, inputs)

    Session.run = run  # type: ignore[method-assign]
    try:
        yield failed
    finally:
        Session.run = whole  # type: ignore[method-assign]


def stream(root: pathlib.Path, subject: Subject, end: float, retry_seconds: float, tally: Tally) -> None:
    """Asks one instance until the end; what stops it is a request that was lost."""
    try:
        _stream(root, subject, end, retry_seconds, tally)
    except Exception as e:
        tally.lost.append(f"{subject.name}: the stream ended: {type(e).__name__}: {e}")


def _stream(root: pathlib.Path, subject: Subject, end: float, retry_seconds: float, tally: Tally) -> None:
    """Asks one instance in a loop, with batches of one to all of the reference's inputs."""
    with contextlib.ExitStack() as held:
        models = []
        for part in subject.parts:
            model = TritonPythonModel()
            about = {"model_name": part.name, "model_repository": str(root / part.name), "model_version": "1"}
            model.initialize({**about, "model_config": json.dumps(config_of(part.offered, retry_seconds))})
            held.callback(model.finalize)
            models.append(model)
        number = 0
        while time.monotonic() < end:
            answers = [_ask(model, part, number, tally) for model, part in zip(models, subject.parts)]
            if subject.pair is not None and all(answer is not None for answer in answers):
                _compare_pair(subject, [answer for answer in answers if answer is not None], tally)
            number += 1


def _ask(model: TritonPythonModel, part: Part, number: int, tally: Tally) -> Mapping[str, np.ndarray] | None:
    """One request; None where it was refused."""
    signature, samples = part.offered.signature, part.offered.samples
    size = number % len(samples[signature.inputs[0].name]) + 1
    begun = time.perf_counter()
    (answer,) = model.execute([{tensor.name: samples[tensor.name][:size] for tensor in signature.inputs}])
    if answer.error is not None:
        tally.lost.append(f"{part.name}: {answer.error}")
        return None
    tally.seconds.append(time.perf_counter() - begun)
    tally.answers, tally.images = tally.answers + 1, tally.images + size
    tally.runs_on[model.runs_on] = tally.runs_on.get(model.runs_on, 0) + 1
    for output in signature.outputs:
        found = compare(part.offered.expected[output.name][:size], answer.tensors[output.name])
        if not part.tolerance.met_by(found):
            tally.wrong.append(f"{part.name}: {output.name} at batch {size}: cosine {found.cosine:.6f}")
    return answer.tensors


def _compare_pair(subject: Subject, answers: Sequence[Mapping[str, np.ndarray]], tally: Tally) -> None:
    """Compares the similarity of the images and texts of two answers with JAX's."""
    names = [part.offered.signature.outputs[0].name for part in subject.parts]
    image, text = (answer[name] for answer, name in zip(answers, names))
    right = [
        part.offered.expected[name][: len(found)] for part, name, found in zip(subject.parts, names, (image, text))
    ]
    plain = dataclasses.replace(subject.pair, classes=0)  # a part of the prompts is of no whole classes
    ranking = compare_rankings((right[0], right[1]), (image, text), plain)
    lower = max((part.precision for part in subject.parts), key=("fp32", "fp16", "bf16", "int8", "fp8").index)
    misses = similarity_misses(subject.config, lower, ranking, judges_ranks=False, engine=True)
    tally.wrong += [f"{subject.name}: {miss}" for miss in misses]


def memory() -> dict[str, float]:
    """MiB that are free on the GPU, and that this process has in memory."""
    free = cuda.free_memory_bytes() / 2**20 if cuda.gpu() else 0.0
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return {"gpu_free_mib": round(free, 1), "rss_mib": round(pages * 4096 / 2**20, 1)}


def growth(samples: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """How much more memory was taken in the last third than in the second: medians, since a failed engine is absent
    for a while, and its stand-in present. The first third has the warm-up, and the first failure of each bundle."""
    third = max(1, len(samples) // 3)
    before, after = samples[third : 2 * third] or samples, samples[2 * third :] or samples
    found = {key: statistics.median(row[key] for row in after) - statistics.median(row[key] for row in before)
             for key in ("gpu_free_mib", "rss_mib")}  # fmt: skip
    return {"gpu_mib": round(0.0 - found["gpu_free_mib"], 1), "rss_mib": round(found["rss_mib"], 1)}


def load(
    paths: Sequence[str], *, minutes: float, streams: int, fail_every: float, retry_seconds: float, output: str = ""
) -> dict[str, Any]:
    """Runs the streams of all bundles at once.

    Args:
        paths: bundles or pairs with engines of this host.
        minutes: how long.
        streams: at once, of each.
        fail_every: seconds between two failures.
        retry_seconds: until a failed engine is loaded again.
        output: a file that gets the result so far with each sample of the memory; "" for none.

    Returns:
        What they saw.
    """
    install_utils()
    COUNTED.clear()
    subjects = [subject_of(path) for path in paths]
    tallies = {subject.name: [Tally() for _ in range(streams)] for subject in subjects}
    samples: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder, failing(fail_every, list(tallies)) as failed:
        root = pathlib.Path(folder)
        for part in (part for subject in subjects for part in subject.parts):
            write_models(root, models_of(part.offered, Asked(part.name, runtime="python"))[:1])
        started = time.monotonic()
        end = started + 60 * minutes
        threads = [
            threading.Thread(target=stream, name=subject.name, args=(root, subject, end, retry_seconds, tally))
            for subject in subjects
            for tally in tallies[subject.name]
        ]
        for thread in threads:
            thread.start()
        while (now := time.monotonic() - started) < 60 * minutes:  # not while streams close their models
            samples.append({"seconds": round(now, 1), **memory()})
            if output:
                write_json(pathlib.Path(output), _result(subjects, tallies, samples, failed, now, done=False))
            time.sleep(min(_EVERY_SECONDS, 60 * minutes / 12))
        for thread in threads:
            thread.join()
        return _result(subjects, tallies, samples, failed, time.monotonic() - started, done=True)


def _result(
    subjects: Sequence[Subject],
    tallies: Mapping[str, Sequence[Tally]],
    samples: Sequence[Mapping[str, float]],
    failed: Sequence[str],
    wall: float,
    *,
    done: bool,
) -> dict[str, Any]:
    return {
        "about": (__doc__ or "").splitlines()[0],
        "command": " ".join(["python", "benchmarks/gpu/session_load.py", *sys.argv[1:]]),
        "environment": environment(_backend()),
        "done": done,
        "seconds": round(wall, 1),
        "bundles": {subject.name: _of_subject(subject, tallies[subject.name], failed, wall) for subject in subjects},
        "growth": growth(samples),
        "memory": list(samples),
    }


def _backend() -> Backend | None:
    with contextlib.suppress(ConvertError):
        return load_backend("auto", for_this_gpu=True)
    return None


def _of_subject(subject: Subject, tallies: Sequence[Tally], failed: Sequence[str], wall: float) -> dict[str, Any]:
    seconds = np.concatenate([tally.seconds for tally in tallies] + [np.zeros(0)])
    runs_on: dict[str, int] = {}
    for tally in tallies:
        for name, count in list(tally.runs_on.items()):
            runs_on[name] = runs_on.get(name, 0) + count
    return {
        "precision": {part.name: part.precision for part in subject.parts},
        "streams": len(tallies),
        "answers": sum(tally.answers for tally in tallies),
        "runs_on": runs_on,
        "images_per_second": round(sum(tally.images for tally in tallies) / wall, 1),
        "p50_ms": round(1e3 * float(np.percentile(seconds, 50)), 3) if len(seconds) else None,
        "p99_ms": round(1e3 * float(np.percentile(seconds, 99)), 3) if len(seconds) else None,
        "failures_put_in": sum(name == subject.name for name in failed),
        "failures_answered": sum(COUNTED["vit_convert_engine_failures_total", part.name] for part in subject.parts),
        "wrong": [line for tally in tallies for line in tally.wrong][:20],
        "lost": [line for tally in tallies for line in tally.lost][:20],
    }


def faults(found: Mapping[str, Any], *, may_grow_mib: float, without_engine: bool = False) -> list[str]:
    """What is not as it should be, in words."""
    said = [f"{kind} grew by {mib} MiB" for kind, mib in found["growth"].items() if mib > may_grow_mib]
    for name, row in found["bundles"].items():
        said += [f"{name}: {key}: {line}" for key in ("wrong", "lost") for line in row[key][:1]]
        if not row["answers"]:
            said.append(f"{name}: no answer")
        if not without_engine and not set(row["runs_on"]) - {"onnxruntime"}:
            said.append(f"{name}: no engine ran, see its session's warning")
    return said


def main(argv: list[str]) -> int:
    """Runs the streams and writes what they saw; 1 if something is not as it should be."""
    found = load(
        _BUNDLES.value,
        minutes=_MINUTES.value,
        streams=_STREAMS.value,
        fail_every=_FAIL_EVERY.value,
        retry_seconds=_RETRY.value,
        output=_OUTPUT.value,
    )
    found["faults"] = faults(found, may_grow_mib=_MAY_GROW.value, without_engine=_WITHOUT.value)
    write_json(pathlib.Path(_OUTPUT.value), found)
    print(as_json({key: value for key, value in found.items() if key != "memory"}))
    return 1 if found["faults"] else 0


if __name__ == "__main__":
    flags.FLAGS.append_flag_values(_FLAGS)
    flags.mark_flag_as_required("bundle")
    _FLAGS.mark_as_parsed()  # by app.run, which knows them now
    app.run(main)
