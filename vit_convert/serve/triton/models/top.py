"""From scores of all classes to the best few, with their names."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vit_convert.serve.triton.models.batches import require_finite
from vit_convert.serve.triton.models.common import array_of, each, parameters

LABELS = "labels.txt"


class TritonPythonModel:
    """The class named in `1/model.py` of a repository."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Reads the class names beside the model."""
        folder = pathlib.Path(args["model_repository"]) / args["model_version"]
        self._names = np.array((folder / LABELS).read_text(encoding="utf-8").splitlines(), dtype=object)
        self._source = json.loads(args["model_config"])["input"][0]["name"]
        self._count = int(parameters(args)["top_k"])

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answers each request."""
        return each(requests, self._compute)

    def _compute(self, request: Any) -> dict[str, np.ndarray]:
        scores = array_of(request, self._source)
        require_finite({self._source: scores})
        return best(scores, self._names, self._count)


def best(scores: np.ndarray, names: np.ndarray, count: int) -> dict[str, np.ndarray]:
    """The best classes; among equals, the lowest number comes first.

    Args:
        scores: float [batch, classes], as the model gives them.
        names: of the classes, object [classes].
        count: how many.

    Returns:
        class_ids int32, class_names bytes as objects, and scores float32, each [batch, count].

    Example:
        >>> found = best(np.array([[0.5, 2.0, 1.0]]), np.array(["cat", "dog", "cow"], dtype=object), 2)
        >>> found["class_ids"].tolist(), [name.decode() for name in found["class_names"][0]]
        ([[1, 2]], ['dog', 'cow'])
    """
    order = np.argsort(-scores, axis=-1, kind="stable")[:, :count]
    encoded = np.array([str(name).encode() for name in names], dtype=object)
    return {
        "class_ids": order.astype(np.int32),
        "class_names": encoded[order],
        "scores": np.take_along_axis(scores, order, axis=-1).astype(np.float32),
    }
