"""A repository of a bundle in several forms, clients that compare all answers with JAX, and an engine that fails."""

import dataclasses
import io
import os
import pathlib
import threading
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from vit_convert.core.errors import ConvertError
from vit_convert.serve.triton.client import infer
from vit_convert.serve.triton.models_of import models_of
from vit_convert.serve.triton.offered import Offered, read_offered
from vit_convert.serve.triton.parts import Asked
from vit_convert.serve.triton.repository import write_models

# In place of the Python model's `model.py`: its engine is onnxruntime, which answers right, and fails once a second.
FAILING = """
import time, types

from vit_convert.core.errors import BenchmarkError
from vit_convert.serve import session
from vit_convert.serve.triton.models.classifier import TritonPythonModel


class Engine:
    def __init__(self, bundle):
        self._runner, self._until = session._OnnxRunner(bundle), time.monotonic() + 1.0

    def require_inputs(self, inputs):
        pass

    def run(self, inputs):
        if time.monotonic() > self._until:
            raise BenchmarkError("simulated: a kernel failed")
        return self._runner.run(inputs)

    def close(self):
        self._runner.close()


session.Session = Engine
session.load_backend = lambda name, **options: types.SimpleNamespace(name="tensorrt")
session.open_engine = lambda backend, bundle, plan: bundle
session._best_plan = lambda backend, bundle: bundle.root
session.require_model = lambda bundle, plan: None
"""
# The same for this host's own engine, which runs on the GPU until it fails.
FAILING_ENGINE = """
import time

from vit_convert.core.errors import BenchmarkError
from vit_convert.serve import session
from vit_convert.serve.triton.models.classifier import TritonPythonModel


class Engine(session.Session):
    def __init__(self, *given, **options):
        super().__init__(*given, **options)
        self._until = time.monotonic() + 1.0

    def run(self, inputs):
        if time.monotonic() > self._until:
            raise BenchmarkError("put in on purpose: a kernel failed")
        return super().run(inputs)


session.Session = Engine
"""
RETRY_SECONDS = 0.2


@dataclasses.dataclass
class Found:
    """What the clients of one model saw.

    Attributes:
        seconds: of each answer.
        wrong: answers further from JAX than allowed.
        lost: requests without an answer, with the reason.
        worst: largest absolute difference to JAX.
    """

    seconds: list[float] = dataclasses.field(default_factory=list)
    wrong: list[str] = dataclasses.field(default_factory=list)
    lost: list[str] = dataclasses.field(default_factory=list)
    worst: float = 0.0

    def summary(self, wall: float) -> dict[str, float | int | list[str]]:
        """For a result file."""
        p50, p99 = 1e3 * np.percentile(self.seconds, [50, 99]) if self.seconds else (float("nan"),) * 2
        return {
            "answers": len(self.seconds),
            "answers_per_second": round(len(self.seconds) / wall, 1),
            "p50_ms": round(float(p50), 3),
            "p99_ms": round(float(p99), 3),
            "max_abs_error": self.worst,
            "wrong": self.wrong,
            "lost": self.lost,
        }


@dataclasses.dataclass(frozen=True)
class Question:
    """A request and its right answer.

    Attributes:
        model: to ask.
        inputs: of the request.
        output: that is compared.
        expected: JAX's values of it.
    """

    model: str
    inputs: Mapping[str, np.ndarray]
    output: str
    expected: np.ndarray


def write_repository(bundle: str | os.PathLike[str], root: pathlib.Path, *, failing: str) -> Offered:
    """Writes "graph" (onnxruntime, with its ensembles) and "session" (ours).

    Args:
        bundle: to serve.
        root: of the repository.
        failing: the `model.py` of an engine that fails once a second, FAILING or FAILING_ENGINE; "" for one that does
            not.

    Returns:
        What the bundle offers.
    """
    offered = read_offered(bundle)
    write_models(root, models_of(offered, Asked("graph", runtime="onnxruntime")))
    write_models(root, models_of(offered, Asked("session", runtime="python"))[:1])
    if failing:
        (root / "session" / "1" / "model.py").write_text(failing)
        config = root / "session" / "config.pbtxt"
        retry = 'key: "retry_seconds" value { string_value: '
        config.write_text(config.read_text().replace(f'{retry}"60"', f'{retry}"{RETRY_SECONDS}"'))
    return offered


def png(pixels: np.ndarray) -> bytes:
    """One image as a file that keeps every pixel."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def questions(offered: Offered, count: int) -> list[Question]:
    """Requests of one image, in turns to the graph, the session and the ensemble from files."""
    name, output = offered.signature.inputs[0].name, offered.signature.outputs[0].name
    images, expected = offered.samples[name], offered.expected[output]
    pixels, logits = np.load(offered.bundle.images("evaluation")), np.load(offered.bundle.predictions)
    found = []
    for number in range(count):
        one, place = slice(number % len(images), number % len(images) + 1), number % len(pixels)
        found += [Question(model, {name: images[one]}, output, expected[one]) for model in ("graph", "session")]
        best = -np.sort(-logits[place : place + 1], axis=-1)[:, :5]
        file = np.array([[png(pixels[place])]], object)
        found.append(Question("graph_image", {"image": file}, "scores", best))
    return found


def ask(
    url: str, asked: Sequence[Question], clients: int, seconds: float, atol: float
) -> tuple[dict[str, Found], float]:
    """Lets clients ask a server; as `ask_with`."""
    return ask_with(lambda one: infer(url, one.model, one.inputs)[one.output], asked, clients, seconds, atol)


def ask_with(
    answer: Callable[[Question], np.ndarray], asked: Sequence[Question], clients: int, seconds: float, atol: float
) -> tuple[dict[str, Found], float]:
    """Lets clients ask in a loop, each its own question after the other.

    Args:
        answer: gets the answer to a question.
        asked: questions; client i begins with the i-th.
        clients: how many ask at once.
        seconds: how long.
        atol: the largest difference to JAX that is no wrong answer.

    Returns:
        By model what was seen, and the seconds that passed.
    """
    found = {question.model: Found() for question in asked}
    lock, started = threading.Lock(), time.perf_counter()

    def client(number: int) -> None:
        while time.perf_counter() - started < seconds:
            question = asked[number % len(asked)]
            number += clients + (clients % len(asked) == 0)  # or a client would ask the same for ever
            _ask_one(answer, question, found[question.model], lock, atol)

    _together([lambda number=number: client(number) for number in range(clients)])
    return found, time.perf_counter() - started


def _ask_one(
    answer: Callable[[Question], np.ndarray], question: Question, found: Found, lock: threading.Lock, atol: float
) -> None:
    begun = time.perf_counter()
    try:
        value = answer(question)
    except (ValueError, OSError, ConvertError) as e:
        with lock:
            found.lost.append(str(e)[:200])
        return
    taken, error = time.perf_counter() - begun, float(np.abs(value - question.expected).max())
    with lock:
        found.seconds.append(taken)
        found.worst = max(found.worst, error)
        if not error <= atol:
            found.wrong.append(f"{question.model}: {error:.3g}")


def _together(works: Sequence[Callable[[], None]]) -> None:
    threads = [threading.Thread(target=work) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def reload(url: str, root: pathlib.Path, model: str) -> None:
    """Makes the server load a model again while it serves it (--model-control-mode=explicit)."""
    os.utime(root / model / "config.pbtxt")  # an unchanged model is not loaded again
    request = urllib.request.Request(f"{url}/v2/repository/models/{model}/load", b"{}")
    with urllib.request.urlopen(request, timeout=60) as reply:
        reply.read()


def metrics(url: str) -> dict[str, float]:
    """What the server counts: {'nv_inference_count{model="graph",version="1"}': 12.0}."""
    with urllib.request.urlopen(url, timeout=10) as reply:
        lines = reply.read().decode().splitlines()
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}
