"""What two towers are as a pair, as `pair.json` has it: how embeddings are compared, and what the text tower takes."""

import dataclasses
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from vit_convert.core.bundle import read_json
from vit_convert.core.errors import UsageError

FILE = "pair.json"
TOWERS = ("image", "text")
SIMILARITIES = ("softmax", "sigmoid")


@dataclasses.dataclass(frozen=True)
class PairFacts:
    """How the embeddings of an image tower and a text tower are compared.

    Attributes:
        logit_scale: factor of the cosine of two embeddings, exponentiated.
        logit_bias: added to it; None for none.
        similarity: "softmax" over the texts of an image, or "sigmoid" of each pair.
        text: how prompts become tokens, a `Prompting` as plain values.
        classes: number of classes that the text tower's evaluation prompts are of; 0 where they are just prompts, or
            there are none.
        templates: prompts of each class, which lie behind each other.
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
                "are no pair's",
                fix=f"Both numbers are finite, and the similarity is {' or '.join(SIMILARITIES)}.",
            )

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {**dataclasses.asdict(self), "text": dict(self.text)}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> "PairFacts":
        """Reads what `to_dict` gave.

        Raises:
            UsageError: it cannot be read.
        """
        try:
            scale, bias = float(record["logit_scale"]), record["logit_bias"]
            counts = {key: int(record.get(key, 0)) for key in ("classes", "templates")}
            return cls(
                scale, None if bias is None else float(bias), str(record["similarity"]), dict(record["text"]), **counts
            )
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            raise UsageError(f"not the record of a pair ({type(e).__name__}: {e})", fix="Convert again.") from e


def is_pair(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder holds two towers, each a bundle of its own."""
    return os.path.isfile(pathlib.Path(folder) / FILE)


def read_pair(folder: str | os.PathLike[str]) -> PairFacts:
    """Reads a pair's record.

    Raises:
        UsageError: it is missing or damaged.
    """
    path = pathlib.Path(folder) / FILE
    try:
        return PairFacts.from_dict(read_json(path) or {})
    except UsageError as e:
        raise UsageError(f"{path}: {e}", fix="Copy the whole folder, or convert again.") from e
