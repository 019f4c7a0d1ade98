"""Infers a ViT from the shapes of a checkpoint's leaves."""

import dataclasses
import math
import pathlib
from collections.abc import Mapping

from vit_convert.checkpoint.containers import Leaf
from vit_convert.checkpoint.vote import count_numbers, most_common, patch_side
from vit_convert.core.errors import CheckpointError, UsageError
from vit_convert.core.image_size import check_image_size
from vit_convert.families.vit.architecture import Architecture
from vit_convert.families.vit.layouts import Layout, stored_name
from vit_convert.families.vit.shapes import BLOCK
from vit_convert.families.vit.variants import Width, name_variant, parse_variant

Grid = tuple[int, int]


def infer_architecture(leaves: Mapping[str, Leaf], variant: str) -> tuple[Architecture, str]:
    """Reads the sizes from the shapes, then lets a given variant overrule them.

    Args:
        leaves: canonical leaves.
        variant: a variant's name, or "auto".

    Returns:
        The architecture to compare the file with, its image size still open; and the variant named by the file's own
        shapes.
    """
    width = most_common(leaves, (r"(LayerNorm_\d|encoder_norm)/scale$", -1), (r"^embedding/kernel$", -1))
    mlp_dim = most_common(leaves, (r"Dense_0/bias$", -1), (r"Dense_0/kernel$", -1))
    num_heads = most_common(leaves, (r"(query|key|value)/bias$", 0), (r"(query|key|value)/kernel$", 1))
    sizes = Width(width, count_numbers(leaves, rf"{BLOCK}(\d{{1,6}})/"), mlp_dim, num_heads)
    patch = patch_side(leaves, "embedding/kernel", width)
    found = name = name_variant(sizes, patch)
    pool = "tok" if "cls" in leaves else "map" if any(leaf.startswith("MAPHead_0/") for leaf in leaves) else "gap"
    representation_size = most_common(leaves, (r"^pre_logits/bias$", -1), (r"^pre_logits/kernel$", -1))
    if variant != "auto":
        given = parse_variant(variant)
        sizes, patch, name = given.sizes, given.patch_size, given.name
        if given.pool:  # "gap-norep": also no representation layer
            pool, representation_size = given.pool, 0
    return Architecture(
        family="vit",
        variant=name,
        **dataclasses.asdict(sizes),
        patch_size=patch,
        image_size=(0, 0),
        num_classes=most_common(leaves, (r"^head/bias$", -1), (r"^head/kernel$", -1)),
        pool=pool,
        representation_size=representation_size,
    ), found


def find_position_table(
    leaves: Mapping[str, Leaf],
    layout: Layout,
    patch: int,
    image_size: tuple[int, int] | None,
    given: Grid | None,
    file: pathlib.Path,
) -> tuple[Grid, int]:
    """Finds out what the rows of the position table represent.

    Args:
        leaves: canonical leaves, the table as stored.
        layout: of the file.
        patch: side of a patch in pixels.
        image_size: requested (height, width) in pixels; determines a grid that is not square if the rows fit it.
        given: (rows, columns) of the stored grid, if the user gave it.
        file: for messages.

    Returns:
        (rows, columns) of the grid, and 1 if the table has a row for the class token, otherwise 0.

    Raises:
        CheckpointError: the rows fit no grid, or a required table is missing.
        UsageError: the patches do not tile `image_size`, or no table is stored and no `image_size` given, or the rows
            fit two grids.
    """
    asked = None
    if image_size is not None:
        check_image_size(image_size, patch)
        asked = (image_size[0] // patch, image_size[1] // patch)
    if "pos_embedding" not in leaves:
        if layout is Layout.VIT_JAX:  # sincos2d was introduced by big_vision, which never used this numbering
            raise CheckpointError(
                f"{file}: {stored_name('pos_embedding', layout)}: missing.", fix="Save the model's parameters whole."
            )
        if asked is None:
            raise UsageError(
                f"{file}: stores no position table (sincos2d), so it does not tell its image size",
                fix="Set image_size, such as 224x224.",
            )
        return asked, 0
    leaf = leaves["pos_embedding"]
    if len(leaf.shape) != 3:
        raise CheckpointError(
            f"{file}: {leaf.name}: checkpoint {leaf.shape}, needed is (1, rows, width)",
            fix="Save the table as the model has it.",
        )
    rows = leaf.shape[1]
    # The class token shows whether there is such a row; a top-level table had one only before 2022, where the grid
    # decides.
    in_module = layout in (Layout.VIT_JAX, Layout.VIT_JAX_LINEN)
    class_rows = (0,) if "cls" not in leaves else (1,) if in_module else (0, 1)
    for class_row in class_rows:
        patches = rows - class_row
        side = math.isqrt(max(patches, 0))
        possible = (given,) if given else ((side, side), asked)
        found = [grid for grid in possible if grid is not None and min(grid) > 0 and math.prod(grid) == patches]
        if len(set(found)) > 1:
            _refuse_two_grids(file, leaf.name, rows, *found)
        if found:
            return found[0], class_row
    wanted = f"posemb_grid {given[0]}x{given[1]}" if given else "a square grid"
    extra = " and a class token's row" if class_rows == (1,) else ""
    if class_rows == (1,) and (side := math.isqrt(rows)) ** 2 == rows:
        fix = f"It is {side}x{side} patches: the row of the class token, which the model has, was lost. Save it whole."
    else:
        fix = "Set posemb_grid to its (rows, columns)."
    raise CheckpointError(f"{file}: {leaf.name}: checkpoint {leaf.shape}, which is not {wanted}{extra}", fix=fix)


def _refuse_two_grids(file: pathlib.Path, name: str, rows: int, square: Grid, asked: Grid) -> None:
    """A table may have been trained on a square grid, or at the requested size: if both have as many rows, this cannot
    be known."""
    raise UsageError(
        f"{file}: {name}: {rows} rows may be {square[0]}x{square[1]} patches, resampled for the image size asked for, "
        f"or {asked[0]}x{asked[1]} as that has",
        fix=f"Set posemb_grid to what the model was trained with: {square} or {asked}.",
    )
