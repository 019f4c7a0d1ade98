"""TIPS and TIPSv2 as a family: from leaves to a tower, and random ones."""

import functools
import os
from collections.abc import Collection, Iterator, Mapping

import numpy as np

from vit_convert.checkpoint.containers import Leaf
from vit_convert.checkpoint.draw import Member, normal, write_npz
from vit_convert.core.model import Model
from vit_convert.families.family import Asked, Loaded, RandomOptions
from vit_convert.families.options import is_variant, refuse_options
from vit_convert.families.tips import layouts, variants
from vit_convert.families.tips.layouts import Layout, detect, tower_of
from vit_convert.families.tips.load import load_tips
from vit_convert.families.tips.variants import PUBLISHED, parse_variant
from vit_convert.families.towers.architecture import ImageTower, Shape, Tower, leaf_shapes
from vit_convert.families.towers.draw import draw
from vit_convert.families.towers.random import sized

_TEMPERATURE = 0.01


class TIPSFamily:
    """Text-image pretraining with spatial awareness (arXiv:2410.16512); its two towers lie in two files."""

    name = "tips"
    layouts = tuple(layout.value for layout in Layout)
    variants = PUBLISHED

    def match(self, names: Collection[str]) -> Layout | None:
        """See `Family`."""
        return detect(names)

    def towers(self, names: Collection[str], layout: Layout) -> tuple[str, ...]:
        """See `TowerFamily`."""
        return (tower_of(names),)

    def load(self, leaves: Mapping[str, Leaf], layout: Layout, asked: Asked) -> Loaded:
        """See `load_tips`."""
        return load_tips(leaves, layout, asked)

    def model(self, loaded: Loaded) -> Model:
        """See `tower_model`."""
        from vit_convert.families.towers.model import tower_model

        return tower_model(loaded.architecture, loaded.params)

    def has_variant(self, variant: str) -> bool:
        """See `Family`."""
        return is_variant(parse_variant, variant)

    def write_random(self, path: str | os.PathLike[str], variant: str, options: RandomOptions) -> str:
        """See `Family`: writes the image tower's file, or the text tower's if `towers` says so."""
        refuse_options("tips", options, ("pool", "posemb", "pre_logits", "outlier_channels", "length", "text_head"))
        parsed = parse_variant(variant)
        tower: Tower
        if options.towers == "text":
            tower = variants.text_tower(variant, parsed.text, parsed.vocabulary, variants.LENGTH)
        else:
            side = variants.GRIDS[parsed.kind] * parsed.patch_size
            tower = variants.image_tower(variant, parsed.image, parsed.patch_size, options.image_size or (side, side))
        write_npz(path, _members(sized(tower, options.depth), options), options.dtype)
        return parsed.name


def _members(tower: Tower, options: RandomOptions) -> Iterator[Member]:
    kind = "image" if isinstance(tower, ImageTower) else "text"
    gated, value = tower.encoder.activation == "swiglu", functools.partial(_drawn, options.seed, kind)
    for name, shape in leaf_shapes(tower).items():
        place = options.prefix + layouts.stored_name(name, kind, gated)
        if name == "pos_embedding":
            if isinstance(tower, ImageTower):  # a text's is computed
                yield place, (1, *tower.grid, shape[-1]), (value(name, shape),)
        else:
            yield place, shape, (value(name, shape),)
    if kind == "text":
        yield options.prefix + layouts.TEMPERATURE, (), (np.array(_TEMPERATURE, np.float32),)


def _drawn(seed: int, kind: str, name: str, shape: Shape) -> np.ndarray:
    if name == "Embed_0/embedding":  # which the model multiplies by the root of the width
        return normal(seed, name, shape) / np.float32(np.sqrt(shape[-1]))
    return draw(seed, f"{kind}/{name}", shape)


TIPS = TIPSFamily()
