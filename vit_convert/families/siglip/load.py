"""From the leaves of a SigLIP's checkpoint to one tower, strictly."""

import dataclasses
import math
from collections.abc import Mapping

from vit_convert.checkpoint.containers import Leaf
from vit_convert.checkpoint.match import Expected, require_match
from vit_convert.checkpoint.vote import most_common, patch_side
from vit_convert.core.errors import CheckpointError
from vit_convert.families.family import Asked, Loaded
from vit_convert.families.pair import Pair, towers_under
from vit_convert.families.siglip import layouts
from vit_convert.families.siglip.layouts import Layout
from vit_convert.families.siglip.transformers import load_transformers
from vit_convert.families.siglip.variants import (
    NAFLEX_LENGTH,
    encoder_of,
    kind_of,
    naflex_tower,
    name_of,
    parse_variant,
    special_tokens,
)
from vit_convert.families.towers.architecture import ImageTower, Tower, leaf_shapes, parameter_count
from vit_convert.families.towers.big_vision import held_against, image_tower_of, text_tower_of
from vit_convert.families.towers.load import infer_encoder, loaded_tower


def load_siglip(stored: Mapping[str, Leaf], layout: Layout, asked: Asked) -> Loaded:
    """Compares one tower's leaves with the model inferred from their shapes; see `Family.load`, also for its errors."""
    if layout is Layout.TRANSFORMERS:
        return load_transformers(stored, layout, asked)
    leaves = layouts.canonicalize(stored, asked.tower, str(asked.file))
    vocabulary = _vocabulary(stored)
    if asked.tower == "image" and layouts.is_naflex(stored):
        return _naflex(stored, leaves, layout, asked)
    tower: Tower = (
        image_tower_of(leaves, asked, "siglip")
        if asked.tower == "image"
        else text_tower_of(leaves, asked, "siglip", special_tokens(vocabulary))
    )
    found = _variant(stored, vocabulary, tower, asked)
    tower = dataclasses.replace(tower, variant=found)
    if asked.variant != "auto":
        given = parse_variant(asked.variant)
        sizes = encoder_of(given.image if asked.tower == "image" else given.text)
        tower = dataclasses.replace(tower, variant=given.name, encoder=sizes)
        if isinstance(tower, ImageTower):
            tower = dataclasses.replace(tower, patch_size=given.patch_size)

    def on_disk(name: str) -> str:
        return asked.prefix + layouts.stored_name(name, asked.tower, layout)

    leaves, rows = held_against(leaves, tower, asked, on_disk, found)
    folder = layouts.FOLDERS[asked.tower]
    return loaded_tower(
        tower,
        leaves,
        asked,
        title="SigLIP" if layout is not Layout.CLIPPO else "CLIPPO",
        layout=layout,
        preprocess="siglip",
        pair=_pair(stored, tower, found, vocabulary),
        table_rows=rows,
        unused=frozenset(name for name in stored if not name.startswith(folder) and name not in ("t", "b")),
    )


def _naflex(stored: Mapping[str, Leaf], leaves: dict[str, Leaf], layout: Layout, asked: Asked) -> Loaded:
    vocabulary = _vocabulary(stored)
    table, kernel = leaves.get("pos_embedding"), leaves["embedding/kernel"]
    if table is None or len(table.shape) != 3:
        raise CheckpointError(f"{asked.file}: {asked.prefix}img/pos_embedding: needed is (rows, columns, width)")
    encoder, patch = infer_encoder(leaves, asked.file), math.isqrt(kernel.shape[0] // 3)
    grid = (table.shape[0], table.shape[1])
    found = name_of(encoder, kind_of(vocabulary), patch, naflex=True)
    tower = naflex_tower(found, encoder, patch, grid, NAFLEX_LENGTH)
    if asked.variant != "auto":
        given = parse_variant(asked.variant)
        tower = naflex_tower(given.name, encoder_of(given.image), given.patch_size, grid, NAFLEX_LENGTH)
    width = tower.encoder.width
    shapes = leaf_shapes(tower) | {"pos_embedding": (*grid, width)}

    def on_disk(name: str) -> str:
        return asked.prefix + layouts.stored_name(name, "image", layout)

    hint = asked.instead_of(found)
    require_match(leaves, Expected(asked.file, tower.variant, shapes, parameter_count(tower), on_disk, hint))
    flat = table.derive((1, grid[0] * grid[1], width), lambda value: value.reshape(1, -1, width))
    return loaded_tower(
        tower,
        leaves | {"pos_embedding": flat},
        asked,
        title="SigLIP",
        layout=layout,
        preprocess="siglip",
        pair=_pair(stored, tower, found, vocabulary),
        unused=frozenset(name for name in stored if not name.startswith("img/") and name not in ("t", "b")),
    )


def _vocabulary(stored: Mapping[str, Leaf]) -> int:
    return most_common(stored, (r"^txt/Embed_0/embedding$", 0))


def _variant(stored: Mapping[str, Leaf], vocabulary: int, tower: Tower, asked: Asked) -> str:
    """The variant named by the file's own shapes: by those of the image tower, if it has one."""
    if isinstance(tower, ImageTower):
        return name_of(tower.encoder, kind_of(vocabulary), tower.patch_size)
    if not any(name.startswith("img/") for name in stored):
        return name_of(tower.encoder, kind_of(vocabulary))
    beside = layouts.canonicalize(stored, "image", str(asked.file))
    encoder = infer_encoder(beside, asked.file)
    if layouts.is_naflex(stored):
        patch = math.isqrt(beside["embedding/kernel"].shape[0] // 3)
        return name_of(encoder, kind_of(vocabulary), patch, naflex=True)
    return name_of(encoder, kind_of(vocabulary), patch_side(beside, "embedding/kernel", encoder.width))


def _pair(stored: Mapping[str, Leaf], tower: Tower, variant: str, vocabulary: int) -> Pair:
    numbers = {name: float(stored[name].as_float32().read().reshape(-1)[0]) for name in ("t", "b") if name in stored}
    return Pair(
        family="siglip",
        variant=variant,
        logit_scale=math.exp(numbers["t"]),
        logit_bias=numbers.get("b"),
        similarity="sigmoid" if "b" in numbers else "softmax",
        embedding=tower.features,
        tokenizer="sentencepiece",
        length=most_common(stored, (r"^txt/pos_embedding$", 1)),
        vocabulary=vocabulary,
        lower=True,
        sticky_end=True,
        towers=towers_under(layouts.FOLDERS, stored),
        **special_tokens(vocabulary),
    )
