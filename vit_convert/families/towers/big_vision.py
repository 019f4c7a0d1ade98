"""Towers whose leaves have big_vision's or vit_jax's names: sizes from their shapes, and strict matching."""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from vit_convert.checkpoint.containers import Leaf
from vit_convert.checkpoint.match import Expected, require_match, require_size
from vit_convert.checkpoint.vote import most_common, patch_side
from vit_convert.core.errors import CheckpointError
from vit_convert.families.family import Asked
from vit_convert.families.towers.architecture import ImageTower, TextTower, Tower, leaf_shapes, parameter_count
from vit_convert.families.towers.load import class_row, image_size_of, infer_encoder, square_grid
from vit_convert.families.vit import layouts as vit

_ADDED_TABLE = "Encoder_0/pos_embedding"


def image_leaves(leaves: Mapping[str, Leaf], folder: str, path: str) -> dict[str, Leaf]:
    """The leaves below a folder by canonical name; those that belong to nothing keep their own.

    Raises:
        CheckpointError: blocks are missing, stacked leaves disagree about the depth, or two leaves claim one name.
    """
    inner = {name.removeprefix(folder): leaf for name, leaf in leaves.items() if name.startswith(folder)}
    return vit.canonicalize(inner, path)


def text_leaves(leaves: Mapping[str, Leaf], folder: str, path: str) -> dict[str, Leaf]:
    """The same for a text tower, whose blocks are in `Encoder_0` on disk.

    Raises:
        CheckpointError: as above, or there are two encoders.
    """
    inner = {name.removeprefix(folder): leaf for name, leaf in leaves.items() if name.startswith(folder)}
    added = inner.pop(_ADDED_TABLE, None)
    renamed = {re.sub(r"^Encoder_\d+/", "Transformer/", name): leaf for name, leaf in inner.items()}
    if len(renamed) != len(inner):
        raise CheckpointError(f"{path}: {folder} has two encoders", fix="Save the parameters of one model.")
    found = vit.canonicalize(renamed, path)
    if added is not None and "pos_embedding" in found:
        # Text towers from before 2022 had a second table inside the encoder.
        second, table = added.as_float32(), found["pos_embedding"].as_float32()
        found["pos_embedding"] = table.derive(table.shape, lambda value: value + second.read())
    return found


def stored_name(canonical: str, tower: str, folder: str, layout: vit.Layout) -> str:
    """The name of a canonical parameter on disk, without prefix; for a stacked layout that of the whole stack.

    Args:
        canonical: such as "Transformer/encoderblock_3/LayerNorm_1/scale".
        tower: "image" or "text".
        folder: of the tower.
        layout: how a ViT of that era names its parts.
    """
    if tower == "text" and canonical == "pos_embedding":
        return f"{folder}pos_embedding"
    name = vit.stored_name(canonical, layout)
    return folder + (name if tower == "image" else name.replace("Transformer/", "Encoder_0/"))


def image_tower_of(leaves: Mapping[str, Leaf], asked: Asked, family: str, pool: str = "") -> ImageTower:
    """Infers an image tower from the shapes of its leaves.

    Args:
        leaves: from `image_leaves`.
        asked: for its file and grid.
        family: name of the family.
        pool: how it pools; "" to infer it from the leaves.

    Raises:
        CheckpointError: a size is unknown, or the position table does not fit a grid.
    """
    encoder = infer_encoder(leaves, asked.file)
    patch = patch_side(leaves, "embedding/kernel", encoder.width)
    table = leaves.get("pos_embedding")
    if table is None or len(table.shape) != 3:
        shape = "missing" if table is None else f"checkpoint {table.shape}"
        where = asked.prefix + (table.name if table is not None else "img/pos_embedding")
        raise CheckpointError(f"{asked.file}: {where}: {shape}, needed is (1, patches, width)")
    grid = square_grid(table, table.shape[1] - class_row(leaves), asked.posemb_grid, asked.file)
    told = "map" if any(name.startswith("MAPHead_0/") for name in leaves) else "tok" if "cls" in leaves else "gap"
    head = most_common(leaves, (r"^head/bias$", -1), (r"^head/kernel$", -1))
    size = image_size_of(grid, patch)
    tower = ImageTower(family, "", encoder, pool or told, head=head, patch_size=patch, image_size=size)
    return dataclasses.replace(tower, class_tokens=int("cls" in leaves))


def text_tower_of(leaves: Mapping[str, Leaf], asked: Asked, family: str, special: Mapping[str, Any]) -> TextTower:
    """Infers a ViT-style text tower (no mask, pooling by the last token) from the shapes of its leaves.

    Args:
        leaves: from `text_leaves`.
        asked: for its file.
        family: name of the family.
        special: its start, end and padding tokens.

    Raises:
        CheckpointError: a size is unknown.
    """
    encoder = infer_encoder(leaves, asked.file)
    vocabulary = most_common(leaves, (r"^Embed_0/embedding$", 0))
    length = most_common(leaves, (r"^pos_embedding$", 1))
    require_size(asked.file, "vocabulary", vocabulary, f"{asked.prefix}txt/Embed_0/embedding")
    require_size(asked.file, "number of tokens", length, f"{asked.prefix}txt/pos_embedding")
    head = most_common(leaves, (r"^head/bias$", -1), (r"^head/kernel$", -1))
    tower = TextTower(family, "", encoder, "last", head=head, vocabulary=vocabulary, length=length)
    return dataclasses.replace(tower, **special)


def held_against(
    leaves: dict[str, Leaf], tower: Tower, asked: Asked, on_disk: Callable[[str], str], found: str
) -> tuple[dict[str, Leaf], int]:
    """Compares leaves with a tower, and moves the class token's row of the position table into the token.

    Args:
        leaves: by canonical name.
        tower: what they should be.
        asked: for the file and its variant.
        on_disk: maps a canonical name to the one on disk, for messages.
        found: the variant implied by the file's own shapes.

    Returns:
        The leaves, and the number of rows in the stored position table.

    Raises:
        CheckpointError: they are not exactly the tower's parameters.
    """
    shapes, row = leaf_shapes(tower), 0
    if isinstance(tower, ImageTower):
        row = class_row(leaves)
        shapes["pos_embedding"] = (1, math.prod(tower.grid) + row, tower.encoder.width)
    rows = shapes["pos_embedding"][1]
    hint = asked.instead_of(found)
    require_match(leaves, Expected(asked.file, tower.variant, shapes, parameter_count(tower, rows), on_disk, hint))
    return (vit.fold_class_row(leaves) if row else leaves), rows
