"""Lengths of texts as people write them: one length, or the range of a dynamic graph; and the sides that vary in any
graph."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from vit_convert.core.errors import UsageError
from vit_convert.core.image_size import ImageRange, NoSize, Size
from vit_convert.core.record import Record
from vit_convert.core.signature import Tensor

LONGEST = 65_536  # tokens; more is a typing error
Length = tuple[int]


@dataclasses.dataclass(frozen=True)
class TextRange(Record):
    """The lengths of texts that a dynamic graph takes.

    Attributes:
        smallest: (tokens,).
        optimal: (tokens,) that engines are tuned for.
        largest: (tokens,); texts are padded to it.
    """

    smallest: Length
    optimal: Length
    largest: Length

    def sizes(self) -> list[Length]:
        """Three lengths to check: the optimal, the smallest, the largest."""
        return list(dict.fromkeys((self.optimal, self.smallest, self.largest)))

    def __str__(self) -> str:
        return f"{self.smallest[0]} to {self.largest[0]} tokens, tuned for {self.optimal[0]}"


Sizes = Size | NoSize | ImageRange | TextRange


def parse_text_length(value: Any) -> int | TextRange | None:
    """Reads `config.text_length`.

    Args:
        value: 32, "32", "dynamic:8..77" or "dynamic:8..77@16"; None or "" for the checkpoint's own length.

    Returns:
        The length, the range (tuned for its largest if there is no @), or None.

    Raises:
        UsageError: it cannot be read, or the lengths are not in ascending order.

    Example:
        >>> str(parse_text_length("dynamic:8..77@16"))
        '8 to 77 tokens, tuned for 16'
    """
    if value is None or value == "":
        return None
    wrong = UsageError(
        f"config.text_length={value!r}: expected 32 or 'dynamic:8..77@16'", fix=f"Lengths are 2 to {LONGEST} tokens."
    )
    text = str(value).strip() if isinstance(value, int | str) and not isinstance(value, bool) else ""
    match = re.fullmatch(r"(?:dynamic:\s*(\d+)\s*\.\.)?\s*(\d+)\s*(?:@\s*(\d+))?", text)
    if match is None or (match[3] and not match[1]):
        raise wrong
    largest = int(match[2])
    if not match[1]:
        if not 2 <= largest <= LONGEST:
            raise wrong
        return largest
    smallest, optimal = int(match[1]), int(match[3] or largest)
    if not 2 <= smallest < largest <= LONGEST or not smallest <= optimal <= largest:
        raise UsageError(
            f"config.text_length={value!r}: the second length must be larger than the first, and the one after @ "
            "between them",
            fix="Write it like 'dynamic:8..77@16'; a text has at least 2 tokens.",
        )
    return TextRange((smallest,), (optimal,), (largest,))


def varies(sizes: Sizes) -> bool:
    """Whether a graph takes a range of sizes."""
    return isinstance(sizes, ImageRange | TextRange)


def optimal_of(sizes: Sizes) -> tuple[int, ...]:
    """The size that engines are tuned for: the optimal one of a range, or the only one."""
    return sizes.optimal if isinstance(sizes, ImageRange | TextRange) else sizes


def sides_of(sizes: Sizes, at: str) -> dict[str, int]:
    """The sides of a graph's input that may vary, by the name that its signature has for them.

    Args:
        sizes: of the graph.
        at: "smallest", "optimal" or "largest".

    Example:
        >>> sides_of(TextRange((8,), (16,), (77,)), "largest")
        {'length': 77}
        >>> sides_of((224, 224), "optimal")
        {'height': 224, 'width': 224}
    """
    size = getattr(sizes, at) if isinstance(sizes, ImageRange | TextRange) else sizes
    return dict(zip(("length",) if isinstance(sizes, TextRange) else ("height", "width"), size))


def wrong_lengths(sizes: Sizes, feeds: Mapping[str, np.ndarray]) -> str:
    """Says which input has texts of a length outside the graph's range; "" if there is none.

    Args:
        sizes: of the graph.
        feeds: {input: array}.

    Example:
        >>> wrong_lengths(TextRange((8,), (16,), (77,)), {"tokens": np.zeros((1, 80), np.int32)})
        'tokens [1, 80]: texts of 80 tokens, the model takes 8 to 77'
    """
    if not isinstance(sizes, TextRange):
        return ""
    low, high = sizes.smallest[0], sizes.largest[0]
    for name, array in feeds.items():
        shape = list(np.shape(array))
        if len(shape) != 2 or not low <= shape[1] <= high:
            what = f"texts of {shape[1]} tokens" if len(shape) == 2 else "no texts"
            return f"{name} {shape}: {what}, the model takes {low} to {high}"
    return ""


def shortened(tensor: Tensor, tokens: np.ndarray, length: int) -> np.ndarray:
    """Cuts texts to fewer tokens as a tokenizer does: if more than padding is cut off, the end token comes last.

    Args:
        tensor: the input that takes them.
        tokens: [texts, at least `length`].
        length: to keep.

    Example:
        >>> taken = Tensor("tokens", "int32", ("batch", 4), below=10, start=8, end=9, pad=0)
        >>> shortened(taken, np.array([[8, 1, 2, 9], [8, 9, 0, 0]]), 3).tolist()
        [[8, 1, 9], [8, 9, 0]]
    """
    kept, cut = tokens[:, :length].copy(), tokens[:, length:]
    if tensor.end >= 0:
        kept[(cut == tensor.end).any(axis=1) & ~(kept == tensor.end).any(axis=1), -1] = tensor.end
    return kept
