"""Two towers as a pair: how their embeddings are compared, and what the text tower takes."""

import dataclasses
from collections.abc import Collection, Mapping


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two towers of one checkpoint.

    Attributes:
        family: name of the family.
        variant: such as "SigLIP-B/16".
        logit_scale: factor of the product of two embeddings, exponentiated.
        logit_bias: added to it; None for none.
        similarity: "softmax" over the texts of an image, or "sigmoid" of each product.
        embedding: length of an embedding; 0 if the file has no image tower.
        tokenizer: kind of its tokenizer: "sentencepiece", "bert" (WordPiece) or "clip" (byte pairs).
        length: tokens of a text.
        vocabulary: number of different tokens.
        start: the token that begins a text; -1 for none.
        end: the token after a text; -1 for none.
        pad: the padding token.
        lower: whether texts are lower-cased first.
        sticky_end: whether a text that is cut still ends with the end token.
        towers: "image", "text", or both.
    """

    family: str
    variant: str
    logit_scale: float
    logit_bias: float | None
    similarity: str
    embedding: int
    tokenizer: str
    length: int
    vocabulary: int
    start: int
    end: int
    pad: int
    lower: bool
    sticky_end: bool
    towers: tuple[str, ...] = ("image", "text")


def towers_under(folders: Mapping[str, str], names: Collection[str]) -> tuple[str, ...]:
    """The towers for which a file has parameters.

    Args:
        folders: by tower, the prefix of its parameters' names.
        names: of all parameters.

    Example:
        >>> towers_under({"image": "img/", "text": "txt/"}, ["txt/head/kernel"])
        ('text',)
    """
    return tuple(tower for tower, folder in folders.items() if any(name.startswith(folder) for name in names))
