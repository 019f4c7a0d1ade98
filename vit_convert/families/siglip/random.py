"""Random SigLIPs, in any of their layouts."""

import dataclasses
import os
from collections.abc import Iterable, Iterator

import numpy as np

from vit_convert.checkpoint.draw import Member, write_npz, write_safetensors
from vit_convert.families.family import RandomOptions
from vit_convert.families.options import refuse_options
from vit_convert.families.siglip.layouts import FOLDERS, Layout, stored_name
from vit_convert.families.siglip.transformers import random_members
from vit_convert.families.siglip.variants import (
    NAFLEX_GRID,
    NAFLEX_LENGTH,
    Variant,
    image_tower,
    naflex_tower,
    parse_variant,
    text_tower,
)
from vit_convert.families.towers.architecture import BLOCK, PatchTower, Tower, leaf_shapes
from vit_convert.families.towers.draw import draw
from vit_convert.families.towers.random import sized, wanted

LENGTH = 64
TEMPERATURE, BIAS = 4.75, -16.5  # about the final value in the published models: exp(t) = 116


def write_random_siglip(path: str | os.PathLike[str], variant: str, options: RandomOptions) -> str:
    """Writes a checkpoint whose values depend only on the seed and the canonical names: every layout of one seed is
    the same model.

    Args:
        path: the file; appears whole or not at all.
        variant: such as "SigLIP-B/16".
        options: `num_classes` is ignored: there are none.

    Returns:
        The variant's name.

    Raises:
        UsageError: unknown variant, or an option without meaning.
    """
    refuse_options("siglip", options, ("pool", "posemb", "pre_logits", "outlier_channels"))
    parsed, layout = parse_variant(variant), Layout(options.layout or Layout.SIGLIP)
    towers = towers_of(parsed, layout, options)
    if layout is Layout.TRANSFORMERS:
        pair = {"logit_scale": TEMPERATURE, "logit_bias": BIAS}
        write_safetensors(path, random_members(towers, options.seed, pair), options.dtype)
    else:
        write_npz(path, _members(towers, layout, options), options.dtype)
    return parsed.name


def towers_of(variant: Variant, layout: Layout, options: RandomOptions) -> dict[str, Tower]:
    """The towers that a random checkpoint has."""
    image: Tower = image_tower(variant, options.image_size or (224, 224))
    if variant.naflex:
        image = naflex_tower(variant.name, image.encoder, variant.patch_size, NAFLEX_GRID, NAFLEX_LENGTH)
    text = text_tower(variant, options.length or LENGTH, head=options.text_head)
    both: dict[str, Tower] = {"image": image, "text": text}
    if layout is Layout.CLIPPO:
        both = {"image": dataclasses.replace(image, head=image.encoder.width)}
    return {name: sized(tower, options.depth) for name, tower in wanted(both, options.towers).items()}


def _members(towers: dict[str, Tower], layout: Layout, options: RandomOptions) -> Iterator[Member]:
    for kind, tower in towers.items():
        for name, shape in leaf_shapes(tower).items():
            place = options.prefix + stored_name(name, kind, layout)
            if layout is Layout.SIGLIP_SCAN and name.startswith(BLOCK):
                if name.startswith(f"{BLOCK}0/"):
                    blocks = range(tower.encoder.depth)
                    names = (name.replace(f"{BLOCK}0/", f"{BLOCK}{i}/") for i in blocks)
                    yield place, (len(blocks), *shape), _drawn(options.seed, kind, names, shape)
            elif isinstance(tower, PatchTower) and name == "pos_embedding":
                yield place, (*tower.grid, shape[-1]), _drawn(options.seed, kind, [name], shape)
            else:
                yield place, shape, _drawn(options.seed, kind, [name], shape)
    numbers = {"t": TEMPERATURE} if layout is Layout.CLIPPO else {"t": TEMPERATURE, "b": BIAS}
    for name, value in numbers.items():
        yield options.prefix + name, (1,), (np.full(1, value, np.float32),)


def _drawn(seed: int, kind: str, names: Iterable[str], shape: tuple[int, ...]) -> Iterable[np.ndarray]:
    return (draw(seed, FOLDERS[kind] + name, shape) for name in names)
