"""The record of how a prompt becomes a text tower's input."""

import dataclasses
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from vit_convert.core.errors import UsageError

KINDS = ("sentencepiece", "bert", "clip")
_ASCII = str.maketrans("ABCDEFGHIJKLMNOPQRSTUVWXYZ", "abcdefghijklmnopqrstuvwxyz")


@dataclasses.dataclass(frozen=True)
class Prompting:
    """How a text tower's training turned prompts into token ids; stored with the pair, so that no other code needs to
    know it.

    Attributes:
        tokenizer: "sentencepiece", "bert" (WordPiece) or "clip" (byte pairs).
        length: ids per prompt; shorter prompts are padded, longer ones are cut.
        vocabulary: its size; all ids are smaller.
        start: the id before a text; -1 for none.
        end: the id after a text; -1 for none.
        pad: the id used for padding.
        lower: whether prompts are lower-cased first.
        sticky_end: whether a prompt that is cut still ends with the end id.

    Raises:
        UsageError: a value that is not offered.

    Example:
        >>> siglip = Prompting("sentencepiece", 4, 32000, start=-1, end=1, pad=1, lower=True, sticky_end=True)
        >>> siglip.fit([7, 8]), siglip.fit([7, 8, 9, 10, 11])
        ([7, 8, 1, 1], [7, 8, 9, 1])
    """

    tokenizer: str
    length: int
    vocabulary: int
    start: int
    end: int
    pad: int
    lower: bool
    sticky_end: bool

    def __post_init__(self) -> None:
        ids = (self.start, self.end, self.pad)
        if (
            self.tokenizer not in KINDS
            or self.length < 2
            or self.pad < 0
            or not all(-1 <= i < self.vocabulary for i in ids)
        ):
            raise UsageError(
                f"prompting {dataclasses.asdict(self)}: not offered", fix=f"Tokenizers are {', '.join(KINDS)}."
            )

    @classmethod
    def of(cls, pair: Any) -> "Prompting":
        """The prompting of a pair, whose record has all of these fields and more."""
        return cls(**{field.name: getattr(pair, field.name) for field in dataclasses.fields(cls)})

    def lowered(self, prompt: str) -> str:
        """A prompt in the case that the model was trained on.

        Args:
            prompt: as a person wrote it. For SentencePiece, only A to Z are lower-cased, as by tf.strings.lower in
                big_vision.
        """
        if not self.lower:
            return prompt
        return (
            prompt.translate(_ASCII)
            if self.tokenizer == "sentencepiece"
            else unicodedata.normalize("NFC", prompt).lower()
        )

    def fit(self, ids: Sequence[int]) -> list[int]:
        """Brings the ids of one prompt to the model's length.

        Args:
            ids: of the prompt, without start and end.

        Returns:
            `length` ids.
        """
        front, back = [self.start] * (self.start >= 0), [self.end] * (self.end >= 0)
        whole = [*front, *ids, *back][: self.length]
        if back and self.sticky_end and len(front) + len(ids) + 1 > self.length:
            whole[-1] = self.end
        return whole + [self.pad] * (self.length - len(whole))

    def to_dict(self) -> dict[str, Any]:
        """The record as JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> "Prompting":
        """The inverse of `to_dict`; further keys of the record are ignored."""
        return cls(**{field.name: record[field.name] for field in dataclasses.fields(cls)})
