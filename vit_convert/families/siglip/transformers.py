"""SigLIP and SigLIP 2 as saved by transformers: PyTorch's names and shapes, and matrices without an axis for the
heads."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from vit_convert.checkpoint.containers import Leaf
from vit_convert.checkpoint.match import Expected, require_match, require_size
from vit_convert.checkpoint.vote import most_common, patch_side
from vit_convert.core.errors import CheckpointError
from vit_convert.families.family import Asked, Loaded
from vit_convert.families.pair import Pair
from vit_convert.families.siglip.variants import (
    NAFLEX_LENGTH,
    encoder_of,
    kind_of,
    naflex_tower,
    name_of,
    parse_variant,
    special_tokens,
)
from vit_convert.families.towers.architecture import (
    ImageTower,
    PatchTower,
    Shape,
    TextTower,
    Tower,
    leaf_shapes,
    parameter_count,
)
from vit_convert.families.towers.draw import draw
from vit_convert.families.towers.hub_config import read_hub_config
from vit_convert.families.towers.infer import stored_encoder
from vit_convert.families.towers.load import image_size_of, loaded_tower, square_grid
from vit_convert.families.towers.naming import TORCH, Names, attention_names, places_of
from vit_convert.families.towers.places import Place, stored_shapes, taken, written
from vit_convert.families.vit.variants import WIDTHS

MODELS = {"image": "vision_model.", "text": "text_model."}
_FOLDERS = {"image": "img/", "text": "txt/"}
_OF_THE_PAIR = ("logit_scale", "logit_bias")
_HEADS = {row.width: row.num_heads for row in WIDTHS.values()}
_PATCHES = "vision_model.embeddings.patch_embedding.weight"
_GRID = "vision_model.embeddings.position_embedding.weight"
_WORDS = "text_model.embeddings.token_embedding.weight"
_PLACES = "text_model.embeddings.position_embedding.weight"
_POOLED = "vision_model.head.attention.in_proj"
_LAYERS = {
    **attention_names("", *(f"self_attn.{part}_proj" for part in ("q", "k", "v", "out"))),
    "LayerNorm_0": "layer_norm1",
    "LayerNorm_1": "layer_norm2",
    "MlpBlock_0/Dense_0": "mlp.fc1",
    "MlpBlock_0/Dense_1": "mlp.fc2",
}
_IMAGE = {
    "embedding": "vision_model.embeddings.patch_embedding",
    "pos_embedding": _GRID,
    "Transformer/encoder_norm": "vision_model.post_layernorm",
    "MAPHead_0/probe": "vision_model.head.probe",
    **attention_names(
        "MAPHead_0/", *("vision_model.head.attention.in_proj",) * 3, "vision_model.head.attention.out_proj"
    ),
    "MAPHead_0/LayerNorm_0": "vision_model.head.layernorm",
    "MAPHead_0/MlpBlock_0/Dense_0": "vision_model.head.mlp.fc1",
    "MAPHead_0/MlpBlock_0/Dense_1": "vision_model.head.mlp.fc2",
}
_TEXT = {
    "Embed_0": "text_model.embeddings.token_embedding",
    "pos_embedding": _PLACES,
    "Transformer/encoder_norm": "text_model.final_layer_norm",
    "head": "text_model.head",
}


def places(tower: Tower) -> dict[str, Place]:
    """Where each canonical parameter of a tower is stored."""
    shapes = leaf_shapes(tower)
    arrays: dict[str, Shape] = {"pos_embedding": shapes["pos_embedding"][1:]}
    image = not isinstance(tower, TextTower)
    if image:
        arrays["MAPHead_0/probe"] = shapes["MAPHead_0/probe"]
    model = MODELS["image" if image else "text"]
    return places_of(shapes, Names(TORCH, f"{model}encoder.layers.{{}}", _LAYERS, _IMAGE if image else _TEXT, arrays))


def load_transformers(stored: Mapping[str, Leaf], layout: Any, asked: Asked) -> Loaded:
    """See `load_siglip`."""
    kept = MODELS[asked.tower]
    leaves = {
        name: leaf for name, leaf in stored.items() if name.startswith(kept) and not name.endswith("position_ids")
    }
    config = read_hub_config(asked.file, asked.tower)
    encoder = stored_encoder(leaves, asked.file, config, heads=_HEADS, activation="tanh", epsilon=1e-6)
    vocabulary = most_common(stored, (rf"^{_WORDS}$", 0))
    tower = _image(leaves, asked, encoder) if asked.tower == "image" else _text(leaves, asked, encoder, vocabulary)
    patch = 0 if isinstance(tower, TextTower) else tower.patch_size
    found = name_of(encoder, kind_of(vocabulary), patch, naflex=isinstance(tower, PatchTower))
    tower = dataclasses.replace(tower, variant=found)
    if asked.variant != "auto":
        given = parse_variant(asked.variant)
        sizes = encoder_of(given.image if asked.tower == "image" else given.text)
        tower = dataclasses.replace(tower, variant=given.name, encoder=sizes)
    where = places(tower)
    hint = asked.instead_of(found)
    shapes, count = stored_shapes(where.values()), parameter_count(tower)
    expected = Expected(asked.file, tower.variant, shapes, count, lambda name: asked.prefix + name, hint)
    require_match(leaves, expected)
    return loaded_tower(
        tower,
        taken(leaves, where),
        asked,
        title="SigLIP",
        layout=layout,
        preprocess="siglip",
        pair=_pair(stored, tower, asked, found, vocabulary),
        unused=frozenset(name for name in stored if name not in leaves and not name.startswith("logit_")),
    )


def _image(leaves: Mapping[str, Leaf], asked: Asked, encoder: Any) -> ImageTower | PatchTower:
    patch, table = patch_side(leaves, _PATCHES, encoder.width), leaves.get(_GRID)
    if table is None or len(table.shape) != 2:
        raise CheckpointError(f"{asked.file}: no position table [patches, width]", fix="Save the tower whole.")
    grid = square_grid(table, table.shape[0], asked.posemb_grid, asked.file)
    if _PATCHES in leaves and len(leaves[_PATCHES].shape) == 2:
        return naflex_tower("", encoder, math.isqrt(leaves[_PATCHES].shape[1] // 3), grid, NAFLEX_LENGTH)
    return ImageTower("siglip", "", encoder, "map", patch_size=patch, image_size=image_size_of(grid, patch))


def _text(leaves: Mapping[str, Leaf], asked: Asked, encoder: Any, vocabulary: int) -> TextTower:
    length = most_common(leaves, (rf"^{_PLACES}$", 0))
    require_size(asked.file, "vocabulary", vocabulary, _WORDS)
    require_size(asked.file, "number of tokens", length, _PLACES)
    head = most_common(leaves, (r"^text_model\.head\.bias$", 0), (r"^text_model\.head\.weight$", 0))
    special = special_tokens(vocabulary)
    return TextTower("siglip", "", encoder, "last", head=head, vocabulary=vocabulary, length=length, **special)


def _pair(stored: Mapping[str, Leaf], tower: Tower, asked: Asked, variant: str, vocabulary: int) -> Pair | None:
    missing = [name for name in _OF_THE_PAIR if name not in stored]
    if len(missing) == len(_OF_THE_PAIR):
        return None  # of a tower that was saved alone
    if missing:
        raise CheckpointError(
            f"{asked.file}: {asked.prefix}{missing[0]}: missing; without it, it is unknown how texts are compared "
            "with images",
            fix="Save the whole model.",
        )
    scale, bias = (float(stored[name].as_float32().read().reshape(-1)[0]) for name in _OF_THE_PAIR)
    return Pair(
        family="siglip",
        variant=variant,
        logit_scale=math.exp(scale),
        logit_bias=bias,
        similarity="sigmoid",
        embedding=tower.features,
        tokenizer="sentencepiece",
        length=most_common(stored, (rf"^{_PLACES}$", 0)),
        vocabulary=vocabulary,
        lower=True,
        sticky_end=True,
        towers=tuple(kind for kind, model in MODELS.items() if any(name.startswith(model) for name in stored)),
        **special_tokens(vocabulary),
    )


def random_members(
    towers: Mapping[str, Tower], seed: int, pair: Mapping[str, float]
) -> list[tuple[str, Shape, Callable[[], np.ndarray]]]:
    """The content of a random file in this layout: name, shape and computation of each array."""
    arrays: dict[str, tuple[Shape, Callable[[], np.ndarray]]] = {}
    for kind, tower in towers.items():
        arrays |= written(functools.partial(_drawn, seed, _FOLDERS[kind]), places(tower))
    for name, value in pair.items():
        arrays[name] = ((1,), functools.partial(np.full, 1, value, np.float32))
    return [(name, shape, compute) for name, (shape, compute) in arrays.items()]


def _drawn(seed: int, folder: str, name: str, shape: Shape) -> np.ndarray:
    return draw(seed, folder + name, shape)
