"""Loading a tower of any family: sizes by majority, the position table, and the resulting record."""

import dataclasses
import enum
import math
import pathlib
from collections.abc import Mapping
from typing import Any

from vit_convert.checkpoint.containers import Leaf, Leaves
from vit_convert.checkpoint.match import require_size
from vit_convert.checkpoint.vote import count_numbers, most_common
from vit_convert.core.errors import CheckpointError, UsageError
from vit_convert.core.image_size import check_image_size
from vit_convert.families.family import Asked, Loaded, Size
from vit_convert.families.outputs import settle_outputs
from vit_convert.families.pair import Pair
from vit_convert.families.towers.architecture import (
    BLOCK,
    OF_TEXT,
    Encoder,
    ImageTower,
    PatchTower,
    TextTower,
    Tower,
    leaf_shapes,
    parameter_count,
)
from vit_convert.families.towers.tables import resampled
from vit_convert.families.vit import posemb

_SIDES = (224, 256, 336, 384, 448, 512, 896)  # sizes at which models are trained


def infer_encoder(leaves: Mapping[str, Leaf], file: pathlib.Path, **fixed: Any) -> Encoder:
    """Infers the sizes of the blocks from leaves with canonical names and shapes.

    Args:
        leaves: of one tower.
        file: for messages.
        fixed: what shapes do not reveal: activation, norm_epsilon, post_norm.

    Raises:
        CheckpointError: a size is unknown.
    """
    blocks = {name: leaf for name, leaf in leaves.items() if name.startswith(BLOCK)}
    if any(name.endswith("Dense_2/kernel") for name in blocks):
        fixed["activation"] = "swiglu"
    encoder = Encoder(
        width=most_common(blocks, (r"LayerNorm_\d/scale$", -1), (r"query/kernel$", 0)),
        depth=count_numbers(blocks, rf"{BLOCK}(\d{{1,6}})/"),
        mlp_dim=most_common(blocks, (r"Dense_0/bias$", -1), (r"Dense_0/kernel$", -1)),
        num_heads=most_common(blocks, (r"(query|key|value)/bias$", 0), (r"(query|key|value)/kernel$", 1)),
        **fixed,
    )
    block = f"{BLOCK}0/"
    for what, leaf in (
        ("width", "LayerNorm_0/scale"),
        ("depth", "…"),
        ("mlp_dim", "MlpBlock_0/Dense_0/bias"),
        ("num_heads", "query/bias"),
    ):
        require_size(file, what, getattr(encoder, what), block + leaf)
    return encoder


def image_size_of(grid: tuple[int, int], patch_size: int) -> tuple[int, int]:
    """The size at which a model with this many patches was trained: So400m/14 has 27 x 27 patches for 384 pixels, of
    which it ignores the last 6."""

    def side(patches: int) -> int:
        smallest = patches * patch_size
        return next((pixels for pixels in _SIDES if smallest <= pixels < smallest + patch_size), smallest)

    return side(grid[0]), side(grid[1])


def class_row(leaves: Mapping[str, Leaf]) -> int:
    """1 if an image tower's position table begins with a row for the class token, as before 2022, otherwise 0."""
    rows = (
        leaves["pos_embedding"].shape[1] if "pos_embedding" in leaves and len(leaves["pos_embedding"].shape) == 3 else 0
    )
    return int("cls" in leaves and math.isqrt(rows) ** 2 != rows)


def square_grid(leaf: Leaf, rows: int, given: Size | None, file: pathlib.Path) -> Size:
    """The grid that this many rows of a position table represent: as given by the user, or else a square.

    Raises:
        CheckpointError: the rows do not fit it.
    """
    side = math.isqrt(max(rows, 0))
    grid = given or (side, side)
    if rows < 1 or math.prod(grid) != rows:
        raise CheckpointError(
            f"{file}: {leaf.name}: {rows} rows for patches, no {'x'.join(map(str, grid)) if given else 'square'} grid",
            fix="Set posemb_grid to its (rows, columns).",
        )
    return grid


def finish_image(
    tower: ImageTower, leaves: dict[str, Leaf], asked: Asked
) -> tuple[ImageTower, dict[str, Leaf], list[str]]:
    """Brings an image tower to the requested size.

    Args:
        tower: at its stored size.
        leaves: by canonical name; the position table covers only the patches.
        asked: its image size and outputs.

    Returns:
        The tower, its leaves, and warnings.
    """
    warnings: list[str] = []
    size = asked.image_size
    if size is not None and size != tower.image_size:
        check_image_size(size, tower.patch_size)
        grid = (size[0] // tower.patch_size, size[1] // tower.patch_size)
        if grid != tower.grid:
            leaves = leaves | {"pos_embedding": resampled(leaves["pos_embedding"], tower.grid, grid, tower.table)}
            warnings.append(posemb.resampling_warning(asked.file.name, tower.image_size, size))
        tower = dataclasses.replace(tower, image_size=size)
    return tower, leaves, warnings


def why_one_length(tower: Tower) -> str:
    """Why a text tower's answer changes if a text has less padding; "" if it does not."""
    if not isinstance(tower, TextTower):
        return ""
    if tower.pool == "last":
        return f"its embedding is taken at token {tower.length}, where it was trained to be"
    if tower.mask == "none":
        return "its words attend to the padding"
    return ""


def cut_texts(tower: TextTower, leaves: dict[str, Leaf], asked: Asked) -> tuple[TextTower, dict[str, Leaf]]:
    """A text tower that takes fewer tokens: its position table ends earlier.

    Raises:
        UsageError: it takes texts of one length only, or none so long.
    """
    length = asked.text_length
    assert length is not None
    if length == tower.length:
        return tower, leaves
    if why := why_one_length(tower):
        raise UsageError(f"{asked.file}: text_length={length}: {why}", fix="Leave it out: the graph has one length.")
    if length > tower.length:
        raise UsageError(
            f"{asked.file}: text_length={length}: the position table has {tower.length} places for a text",
            fix=f"Give at most {tower.length}.",
        )
    table = leaves["pos_embedding"].as_float32()
    cut = table.derive((1, length, tower.encoder.width), lambda values: values[:, :length])
    return dataclasses.replace(tower, length=length), leaves | {"pos_embedding": cut}


def as_asked(tower: Tower, leaves: dict[str, Leaf], asked: Asked) -> tuple[Tower, dict[str, Leaf]]:
    """The tower with the requested outputs: layers after them are dropped.

    Raises:
        UsageError: a tower has no output of that name.
    """
    offered = ["embedding", "features", "tokens"] if tower.pools else ["tokens", "features"]
    if isinstance(tower, ImageTower):
        offered += ["grid", *(["class_tokens"] if tower.class_tokens else [])]
    names = settle_outputs(asked.outputs, offered, asked.file, "this tower")
    given = tuple(OF_TEXT.get(name, name) for name in names) if isinstance(tower, TextTower) else names
    changes: dict[str, Any] = {"outputs": given, "normalize": asked.normalize}
    behind_head = {"embedding"} if tower.pools else {"tokens", "grid"}
    if behind_head.isdisjoint(names):
        changes["head"] = 0
    if tower.pools and {"embedding", "features"}.isdisjoint(names):
        changes["pool"] = "none"
    tower = dataclasses.replace(tower, **changes)
    return tower, {name: leaves[name] for name in leaf_shapes(tower)}


def loaded_tower(
    tower: Tower,
    leaves: dict[str, Leaf],
    asked: Asked,
    *,
    title: str,
    layout: enum.Enum,
    preprocess: str,
    pair: Pair | None,
    table_rows: int | None = None,
    **more: Any,
) -> Loaded:
    """The record of a tower with matching leaves.

    Args:
        tower: at its stored size.
        leaves: by canonical name.
        asked: what is requested.
        title: the family's common name.
        layout: of the file.
        preprocess: a key of `images.preprocess`.
        pair: the pair that it belongs to.
        table_rows: of the stored position table, if there is not one for each token.
        more: `warnings` and `unused` of `Loaded`.
    """
    source: Any = tower.image_size if isinstance(tower, ImageTower) else ()
    warnings = [*more.pop("warnings", ())]
    if isinstance(tower, ImageTower):
        tower, leaves, found = finish_image(tower, leaves, asked)
        warnings += found
    elif asked.image_size is not None or asked.posemb_grid is not None:
        raise UsageError(
            f"{asked.file}: image_size or posemb_grid of a tower that takes no images of one size",
            fix="Leave them out.",
        )
    one_length = why_one_length(tower)
    if asked.text_length is not None and isinstance(tower, TextTower):
        tower, leaves = cut_texts(tower, leaves, asked)
        pair = dataclasses.replace(pair, length=tower.length) if pair else None
    tower, leaves = as_asked(tower, leaves, asked)
    image = isinstance(tower, ImageTower)
    head_size = tower.encoder.width // tower.encoder.num_heads
    masked = isinstance(tower, PatchTower) or (isinstance(tower, TextTower) and tower.mask != "none")
    tokens = tower.num_tokens if isinstance(tower, ImageTower) else tower.length  # type: ignore[attr-defined]
    return Loaded(
        title=title,
        variant=tower.variant,
        layout=layout,
        architecture=tower,
        params=Leaves({name: leaf.as_float32() for name, leaf in leaves.items()}),
        num_params=parameter_count(tower, table_rows),
        image_size=tower.image_size if isinstance(tower, ImageTower) else (),
        source_image_size=source,
        num_classes=0,
        preprocess=preprocess,
        patch_size=tower.patch_size if isinstance(tower, ImageTower | PatchTower) else 0,
        patches=tower.length if isinstance(tower, PatchTower) else 0,
        resizable=isinstance(tower, ImageTower) and tower.pool != "avg4" and tower.table == "aligned",
        attentions=() if masked else ((head_size, tokens),),  # only those not limited by a mask
        warnings=tuple(warnings),
        output=tower.outputs[0],
        judge="embedding" if tower.outputs[0] == "embedding" else "cosine",
        pair=pair,
        text=isinstance(tower, TextTower),
        one_length=one_length,
        takes="" if image else f"{tokens} {'patches' if isinstance(tower, PatchTower) else 'tokens'}",
        **more,
    )
