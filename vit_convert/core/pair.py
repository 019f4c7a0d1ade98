"""The content of `pair.json`: how the embeddings of two towers are compared, and what the text tower takes."""

import dataclasses
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from vit_convert.core.bundle import read_json
from vit_convert.core.errors import UsageError
from vit_convert.core.record import Record, RecordError

FILE = "pair.json"
TOWERS = ("image", "text")
SIMILARITIES = ("softmax", "sigmoid")


@dataclasses.dataclass(frozen=True)
class PairFacts(Record):
    """How the embeddings of an image tower and a text tower are compared.

    Attributes:
        logit_scale: factor of the cosine of two embeddings, exponentiated.
        logit_bias: added to it; None for none.
        similarity: "softmax" over the texts of an image, or "sigmoid" of each pair.
        text: how prompts become tokens, a `Prompting` as plain values.
        classes: number of classes described by the text tower's evaluation prompts; 0 if they are plain prompts, or
            there are none.
        templates: number of prompts per class, which follow each other.
    """

    logit_scale: float
    logit_bias: float | None
    similarity: str
    text: Mapping[str, Any]
    classes: int = 0
    templates: int = 0

    def __post_init__(self) -> None:
        numbers = (self.logit_scale, self.logit_bias or 0.0)
        if self.similarity not in SIMILARITIES or not all(math.isfinite(number) for number in numbers):
            raise UsageError(
                f"pair: logit_scale {self.logit_scale}, logit_bias {self.logit_bias}, similarity {self.similarity!r} "
                "are not those of a pair",
                fix=f"Both numbers are finite, and the similarity is {' or '.join(SIMILARITIES)}.",
            )


def wrong_ids(ids: np.ndarray, text: Mapping[str, Any]) -> str:
    """Why a text tower cannot use some token ids, in words; "" if it can.

    A graph would look up a negative id from the end of its table, and a causal tower that pools at the end token needs
    one.

    Args:
        ids: whole numbers [prompts, length].
        text: the tower's rule, as in `PairFacts.text`.

    Example:
        >>> wrong_ids(np.array([[1, 2]]), {"shortest": 4, "length": 8, "vocabulary": 9})
        'ids [1, 2], the model takes [texts, 4 to 8]'
        >>> wrong_ids(np.array([[1, -3]]), {"length": 2, "vocabulary": 9})
        'ids -3 to 1, the model has 9 tokens'
    """
    longest = text["length"]
    shortest = text.get("shortest") or longest  # of a graph that takes a range
    if ids.ndim != 2 or not shortest <= ids.shape[1] <= longest:
        taken = longest if shortest == longest else f"{shortest} to {longest}"
        return f"ids {list(ids.shape)}, the model takes [texts, {taken}]"
    if ids.size and (ids.min() < 0 or ids.max() >= text["vocabulary"]):
        return f"ids {ids.min()} to {ids.max()}, the model has {text['vocabulary']:,} tokens"
    end = text.get("end", -1)
    if text.get("tokenizer") == "clip" and end >= 0 and not (found := (ids == end).any(1)).all():
        return f"text {int(np.argmin(found))} has no end token ({end}), at which its embedding is taken"
    return ""


def is_pair(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder holds two towers, each a bundle of its own."""
    return os.path.isfile(pathlib.Path(folder) / FILE)


def read_pair(folder: str | os.PathLike[str]) -> PairFacts:
    """Reads a pair's record.

    Raises:
        UsageError: it is missing or damaged.
    """
    path = pathlib.Path(folder) / FILE
    found = read_json(path) or {}
    missing = [key for key in ("logit_scale", "logit_bias", "similarity", "text") if key not in found]
    try:
        if missing:
            raise RecordError(f"{', '.join(missing)} not in it")
        return PairFacts.from_dict(found)
    except (RecordError, UsageError) as e:
        raise UsageError(
            f"{path}: not the record of a pair ({e})", fix="Copy the whole folder, or convert again."
        ) from e
