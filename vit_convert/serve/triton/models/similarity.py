"""Similarities of images and texts, from what clients have; text embeddings are cached, because texts recur."""

import collections
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from vit_convert.core.errors import BenchmarkError
from vit_convert.core.pair import PairFacts
from vit_convert.core.similarity import logits_of, probabilities_of
from vit_convert.serve.triton.models.batches import require_finite
from vit_convert.serve.triton.models.common import backend_utils, each, parameters
from vit_convert.serve.triton.models.preprocess import ENCODED, PIXELS
from vit_convert.serve.triton.models.tokenize import PROMPT

IMAGES, TEXTS = (ENCODED, PIXELS), ("tokens", PROMPT)
SIMILARITY, LOGITS = "similarity", "logits"  # this model's output
Arrays = Mapping[str, np.ndarray]


class TritonPythonModel:
    """The class named in `1/model.py` of a repository; it calls the pair's other models on the same server."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Reads from the model's parameters how embeddings are compared, and which models to call."""
        given = parameters(args)
        self._pair = PairFacts.from_dict(json.loads(given["pair"]))
        self._name, self._most = given["name"], int(given["most"])
        self._sources = {tensor["name"] for tensor in json.loads(args["model_config"])["input"]}
        self._texts = Kept(self._embed_texts, int(given["kept_texts"]), int(given["vocabulary"]))
        utils = backend_utils()
        labels = {"model": args["model_name"], "version": args["model_version"]}
        self._families = [
            utils.MetricFamily(name=name, description=text, kind=utils.MetricFamily.COUNTER)
            for name, text in (
                ("vit_convert_texts_total", "Texts compared"),
                ("vit_convert_texts_computed_total", "Texts that the text tower computed; the others were kept"),
            )
        ]
        self._compared, self._computed = (family.Metric(labels=labels) for family in self._families)

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answers each request."""
        return each(requests, self._compute)

    def _compute(self, request: Any) -> dict[str, np.ndarray]:
        given = {
            name: request_input for name in self._sources if (request_input := _optional(request, name)) is not None
        }
        source, kind = _one_of(given, IMAGES), _one_of(given, TEXTS)
        images = given[source].reshape(-1, 1) if source == ENCODED else given[source]
        image = self._ask(f"{self._name}_{source}", {source: images}, "embedding")
        tokens = given[kind]
        if kind == PROMPT:
            tokens = self._ask(f"{self._name}_tokenize", {PROMPT: tokens.reshape(-1, 1)}, "tokens")
        logits = logits_of(image, self._texts(tokens), self._pair)
        self._compared.increment(len(tokens))
        values = {SIMILARITY: probabilities_of(logits, self._pair), LOGITS: logits}
        return {name: value.astype(np.float32) for name, value in values.items()}

    def _embed_texts(self, tokens: np.ndarray) -> np.ndarray:
        self._computed.increment(len(tokens))
        return self._ask(f"{self._name}_text", {"tokens": tokens}, "embedding")

    def _ask(self, model: str, inputs: Arrays, output: str) -> np.ndarray:
        """Calls another model, in as many batches as its largest batch requires."""
        ((name, values),) = inputs.items()
        parts = range(0, max(1, len(values)), self._most)
        return np.concatenate([ask(model, {name: values[start : start + self._most]}, output) for start in parts])


class Kept:
    """A cache of the most recently used text embeddings.

    Args:
        embed: maps token ids [texts, length] to embeddings [texts, width].
        most: how many to keep.
        vocabulary: exclusive upper bound of ids; 0 for none.
    """

    def __init__(self, embed: Callable[[np.ndarray], np.ndarray], most: int, vocabulary: int = 0):
        self._embed, self._most, self._vocabulary = embed, most, vocabulary
        self._known: collections.OrderedDict[bytes, np.ndarray] = collections.OrderedDict()

    def __call__(self, tokens: np.ndarray) -> np.ndarray:
        """Embeddings [texts, width] of token ids [texts, length].

        Raises:
            BenchmarkError: no text, or an id outside the vocabulary.
        """
        if not len(tokens):
            raise BenchmarkError(f"tokens {list(tokens.shape)}: no text", fix="Send one or more.")
        if self._vocabulary and not (tokens.min() >= 0 and tokens.max() < self._vocabulary):
            place = int(np.argmax(((tokens < 0) | (tokens >= self._vocabulary)).any(axis=1)))
            said = f"tokens[{place}] of {len(tokens)}: ids lie between 0 and {self._vocabulary - 1}, "
            raise BenchmarkError(f"{said}found {tokens[place].min()} to {tokens[place].max()}", fix="Send token ids.")
        keys = [row.tobytes() for row in tokens]
        known = {key: self._known[key] for key in keys if key in self._known}
        new = {key: row for key, row in zip(keys, tokens) if key not in known}
        if new:
            known |= zip(new, self._embed(np.stack(list(new.values()))))
        for key in dict.fromkeys(keys):
            self._known[key] = known[key]
            self._known.move_to_end(key)
        while len(self._known) > self._most:
            self._known.popitem(last=False)
        return np.stack([known[key] for key in keys])


def ask(model: str, inputs: Arrays, output: str) -> np.ndarray:
    """Calls another model of the same server.

    Raises:
        BenchmarkError: it refuses.
    """
    utils = backend_utils()
    tensors = [utils.Tensor(name, np.ascontiguousarray(value)) for name, value in inputs.items()]
    memory = utils.PreferredMemory(utils.TRITONSERVER_MEMORY_CPU)  # otherwise an engine's output would stay on the GPU
    request = utils.InferenceRequest(
        model_name=model, requested_output_names=[output], inputs=tensors, preferred_memory=memory
    )
    response = request.exec()
    if response.has_error():
        raise BenchmarkError(response.error().message())
    found = utils.get_output_tensor_by_name(response, output).as_numpy()
    require_finite({f"{model}: {output}": found})
    return found


def _optional(request: Any, name: str) -> np.ndarray | None:
    tensor = backend_utils().get_input_tensor_by_name(request, name)
    return None if tensor is None else tensor.as_numpy()


def _one_of(given: Arrays, names: Sequence[str]) -> str:
    found = [name for name in names if name in given]
    if len(found) != 1:
        said = f"{' and '.join(found)} are given" if found else f"neither {' nor '.join(names)} is given"
        raise BenchmarkError(said, fix=f"Send one of {', '.join(names)}.")
    return found[0]
