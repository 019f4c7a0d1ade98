"""The layout of TIPS: an image tower in one file, a text tower in another. No array is read."""

import enum
import math
import re
from collections.abc import Collection, Mapping

import numpy as np

from vit_convert.checkpoint.containers import Leaf
from vit_convert.checkpoint.match import require_blocks

_IMAGE = "encoder/"
_TOKENS = f"{_IMAGE}ToTokenSequence_0/"
TABLE = f"{_TOKENS}posembed_input"
WORDS = "token_emb/emb_var"
TEMPERATURE = "temperature_contrastive"
_GATED, _MLP = "FFNSwiGluFused_0/", "MlpBlock_0/"


class Layout(enum.Enum):
    """How a TIPS's parameters are named on disk."""

    TIPS = "tips"
    """google-deepmind/tips, scenic (2024): `encoder/transformer/encoderblock_3/…`, or `transformer/…` of the text."""


def detect(names: Collection[str]) -> Layout | None:
    """Recognises the layout by the names of all leaves; None if they are not a TIPS's."""
    return Layout.TIPS if TABLE in names or WORDS in names else None


def tower_of(names: Collection[str]) -> str:
    """Which tower a file has."""
    return "image" if TABLE in names else "text"


def stored_name(canonical: str, tower: str, gated: bool) -> str:
    """The name of a canonical parameter on disk, without prefix."""
    name = canonical.replace("Transformer/encoderblock_", "transformer/encoderblock_")
    name = name.replace(_MLP, _GATED) if gated else name
    if tower == "text":
        return {"Embed_0/embedding": WORDS}.get(name, name.replace("Transformer/encoder_norm", "text_encoder_norm"))
    if canonical == "pos_embedding":
        return TABLE
    inner = canonical.startswith(("embedding/", "cls"))
    return f"{_TOKENS}{name}" if inner else _IMAGE + name.replace("Transformer/encoder_norm", "encoder_norm")


def canonicalize(leaves: Mapping[str, Leaf], tower: str, path: str) -> dict[str, Leaf]:
    """Renames leaves to the canonical names; those that belong to nothing keep their own.

    A position table [1, rows, columns, width] becomes one of patches; token embeddings are scaled by the root of their
    width, as in the model.

    Raises:
        CheckpointError: blocks are missing.
    """
    found: dict[str, Leaf] = {}
    for name, leaf in leaves.items():
        inner = name.removeprefix(_TOKENS).removeprefix(_IMAGE) if tower == "image" else name
        inner = re.sub(r"^(transformer/encoderblock_)", "Transformer/encoderblock_", inner).replace(_GATED, _MLP)
        inner = re.sub(r"^(text_)?encoder_norm/", "Transformer/encoder_norm/", inner)
        found[{"posembed_input": "pos_embedding", WORDS: "Embed_0/embedding"}.get(inner, inner)] = leaf
    require_blocks(found, r"Transformer/encoderblock_(\d{1,6})/", "encoder block", path)
    return found


def flat_table(table: Leaf) -> Leaf:
    """[1, rows, columns, width] -> [1, patches, width]."""
    _, rows, columns, width = table.shape
    return table.derive((1, rows * columns, width), lambda value: value.reshape(1, rows * columns, width))


def scaled_words(table: Leaf) -> Leaf:
    """Token embeddings times the root of their width."""
    root = np.float32(math.sqrt(table.shape[-1]))
    return table.as_float32().derive(table.shape, lambda value: value * root)


def sinusoids(length: int, width: int) -> np.ndarray:
    """The positions of a text, which no file stores: [sin(i ω), cos(i ω)], ω_k = 10000^(−k/(width/2 − 1)).

    Returns:
        float32 [1, length, width].
    """
    half = width // 2
    omega = 10_000.0 ** -(np.arange(half) / max(half - 1, 1))
    angles = np.outer(np.arange(length), omega)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)[None].astype(np.float32)
