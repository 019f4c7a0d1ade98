"""From the leaves of a SigLIP's checkpoint to one tower, strictly."""

import dataclasses
import math
from collections.abc import Mapping

from vit_convert.checkpoint.containers import Leaf
from vit_convert.checkpoint.match import Expected, require_match, require_size
from vit_convert.checkpoint.vote import most_common, patch_side
from vit_convert.core.errors import CheckpointError
from vit_convert.families.family import Asked, Loaded
from vit_convert.families.siglip import layouts
from vit_convert.families.siglip.layouts import Layout
from vit_convert.families.siglip.variants import encoder_of, kind_of, name_of, parse_variant, special_tokens
from vit_convert.families.towers.architecture import ImageTower, TextTower, Tower, leaf_shapes, parameter_count
from vit_convert.families.towers.load import class_row, image_size_of, infer_encoder, loaded_tower, square_grid
from vit_convert.families.towers.pair import Pair
from vit_convert.families.vit import layouts as vit


def load_siglip(stored: Mapping[str, Leaf], layout: Layout, asked: Asked) -> Loaded:
    """Holds one tower's leaves against the model that their shapes tell.

    Args:
        stored: all leaves of the file, without prefix.
        layout: of the file.
        asked: the tower, and what is wanted of it.

    Returns:
        The tower.

    Raises:
        CheckpointError: the leaves are not, one for one, the tower's.
        UsageError: what is asked has no meaning for it.
    """
    leaves = layouts.canonicalize(stored, asked.tower, str(asked.file))
    vocabulary = _vocabulary(stored)
    tower: Tower = _image(leaves, asked) if asked.tower == "image" else _text(leaves, asked, vocabulary)
    found = _variant(stored, vocabulary, tower, asked)
    tower = dataclasses.replace(tower, variant=found)
    if asked.variant != "auto":
        given = parse_variant(asked.variant)
        tower = dataclasses.replace(
            tower, variant=given.name, encoder=encoder_of(given.image if asked.tower == "image" else given.text)
        )
        if isinstance(tower, ImageTower):
            tower = dataclasses.replace(tower, patch_size=given.patch_size)

    def on_disk(name: str) -> str:
        return asked.prefix + layouts.stored_name(name, asked.tower, layout)

    shapes = leaf_shapes(tower)
    if isinstance(tower, ImageTower):
        shapes["pos_embedding"] = (
            leaves["pos_embedding"].shape if "pos_embedding" in leaves else shapes["pos_embedding"]
        )
    expected = Expected(
        asked.file, tower.variant, shapes, _count(tower, shapes), on_disk, "" if asked.variant == "auto" else found
    )
    require_match(leaves, expected)
    if asked.tower == "image" and class_row(leaves):
        leaves = vit.fold_class_row(leaves)
    pair = _pair(stored, leaves, tower, found, vocabulary)
    other = frozenset(
        name for name in stored if not name.startswith(layouts.FOLDERS[asked.tower]) and name not in ("t", "b")
    )
    return loaded_tower(
        tower, leaves, asked, title="SigLIP", layout=layout, preprocess="siglip", pair=pair, unused=other
    )


def _count(tower: Tower, shapes: Mapping[str, tuple[int, ...]]) -> int:
    return parameter_count(tower, shapes["pos_embedding"][1])


def _image(leaves: Mapping[str, Leaf], asked: Asked) -> ImageTower:
    encoder = infer_encoder(leaves, asked.file)
    patch = patch_side(leaves, "embedding/kernel", encoder.width)
    table = leaves.get("pos_embedding")
    if table is None or len(table.shape) != 3:
        shape = "missing" if table is None else f"checkpoint {table.shape}"
        raise CheckpointError(f"{asked.file}: {asked.prefix}img/pos_embedding: {shape}, needed is (1, patches, width)")
    grid = square_grid(table, table.shape[1] - class_row(leaves), asked.posemb_grid, asked.file)
    pool = "map" if any(name.startswith("MAPHead_0/") for name in leaves) else "tok" if "cls" in leaves else "gap"
    head = most_common(leaves, (r"^head/bias$", -1), (r"^head/kernel$", -1))
    tower = ImageTower("siglip", "", encoder, pool, head=head, patch_size=patch, image_size=image_size_of(grid, patch))
    return dataclasses.replace(tower, class_tokens=int(pool == "tok"))


def _text(leaves: Mapping[str, Leaf], asked: Asked, vocabulary: int) -> TextTower:
    encoder = infer_encoder(leaves, asked.file)
    require_size(asked.file, "vocabulary", vocabulary, f"{asked.prefix}txt/Embed_0/embedding")
    length = most_common(leaves, (r"^pos_embedding$", 1))
    require_size(asked.file, "number of tokens", length, f"{asked.prefix}txt/pos_embedding")
    head = most_common(leaves, (r"^head/bias$", -1), (r"^head/kernel$", -1))
    return TextTower(
        "siglip", "", encoder, "last", head=head, vocabulary=vocabulary, length=length, **special_tokens(vocabulary)
    )


def _vocabulary(stored: Mapping[str, Leaf]) -> int:
    return most_common(stored, (r"^txt/Embed_0/embedding$", 0))


def _variant(stored: Mapping[str, Leaf], vocabulary: int, tower: Tower, asked: Asked) -> str:
    """What the file's own shapes are called: by the image tower, where it has one."""
    if isinstance(tower, ImageTower):
        return name_of(tower.encoder, kind_of(vocabulary), tower.patch_size)
    if not any(name.startswith("img/") for name in stored):
        return name_of(tower.encoder, kind_of(vocabulary))
    beside = layouts.canonicalize(stored, "image", str(asked.file))
    encoder = infer_encoder(beside, asked.file)
    return name_of(encoder, kind_of(vocabulary), patch_side(beside, "embedding/kernel", encoder.width))


def _pair(stored: Mapping[str, Leaf], leaves: Mapping[str, Leaf], tower: Tower, variant: str, vocabulary: int) -> Pair:
    scale, bias = (float(stored[name].as_float32().read().reshape(-1)[0]) for name in ("t", "b"))
    has = tuple(name for name, folder in layouts.FOLDERS.items() if any(leaf.startswith(folder) for leaf in stored))
    return Pair(
        family="siglip",
        variant=variant,
        logit_scale=math.exp(scale),
        logit_bias=bias,
        similarity="sigmoid",
        embedding=tower.features,
        tokenizer="sentencepiece",
        length=most_common(stored, (r"^txt/pos_embedding$", 1)),
        vocabulary=vocabulary,
        lower=True,
        sticky_end=True,
        towers=has,
        **special_tokens(vocabulary),
    )
