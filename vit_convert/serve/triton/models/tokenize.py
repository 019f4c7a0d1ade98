"""From prompts to a text tower's input, with the tokenizer beside the model."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vit_convert.core.errors import BenchmarkError
from vit_convert.serve.triton.models.common import array_of, each, parameters
from vit_convert.text.prompting import Prompting
from vit_convert.text.tokenizer import open_tokenizer

PROMPT, FOLDER = "prompt", "tokenizer"


class TritonPythonModel:
    """The class named in `1/model.py` of a repository."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Opens the tokenizer, by the rule in the model's parameters."""
        given = parameters(args)
        folder = pathlib.Path(args["model_repository"]) / args["model_version"] / FOLDER
        rule = Prompting.from_dict(json.loads(given["prompting"]))
        self._tokenizer = open_tokenizer(folder / given["file"], rule)
        self._target = json.loads(args["model_config"])["output"][0]["name"]

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answers each request."""
        return each(requests, self._compute)

    def _compute(self, request: Any) -> dict[str, np.ndarray]:
        return {self._target: self._tokenizer(words_of(array_of(request, PROMPT)))}


def words_of(prompts: np.ndarray) -> list[str]:
    """Prompts as strings.

    Args:
        prompts: bytes of UTF-8, of any shape.

    Raises:
        BenchmarkError: one is not UTF-8; its place in the request is named.

    Example:
        >>> words_of(np.array([[b"a cat"]], object))
        ['a cat']
    """
    flat, found = prompts.reshape(-1).tolist(), []
    for place, data in enumerate(flat):
        try:
            found.append(data.decode("utf-8"))
        except UnicodeDecodeError as e:
            raise BenchmarkError(f"{PROMPT}[{place}] of {len(flat)}: no UTF-8 ({e.reason})", fix="Send UTF-8.") from e
    return found
