"""LiT as a family: from leaves to a tower, and random ones."""

import os
from collections.abc import Collection, Mapping

from vit_convert.checkpoint.containers import Leaf
from vit_convert.core.model import Model
from vit_convert.families.family import Asked, Loaded, RandomOptions
from vit_convert.families.lit.layouts import FOLDERS, Layout, detect
from vit_convert.families.lit.load import load_lit
from vit_convert.families.lit.random import write_random_lit
from vit_convert.families.lit.variants import PUBLISHED, parse_variant
from vit_convert.families.options import is_variant
from vit_convert.families.pair import towers_under


class LiTFamily:
    """Locked-image text tuning of vision_transformer (arXiv:2111.07991): a ViT, and BERT or a ViT's blocks over
    text."""

    name = "lit"
    layouts = tuple(layout.value for layout in Layout)
    variants = PUBLISHED

    def match(self, names: Collection[str]) -> Layout | None:
        """See `Family`; of the names of both towers."""
        return detect(names)

    def towers(self, names: Collection[str], layout: Layout) -> tuple[str, ...]:
        """See `TowerFamily`."""
        return towers_under(FOLDERS, names)

    def load(self, leaves: Mapping[str, Leaf], layout: Layout, asked: Asked) -> Loaded:
        """See `load_lit`."""
        return load_lit(leaves, layout, asked)

    def model(self, loaded: Loaded) -> Model:
        """See `tower_model`."""
        from vit_convert.families.towers.model import tower_model

        return tower_model(loaded.architecture, loaded.params)

    def has_variant(self, variant: str) -> bool:
        """See `Family`."""
        return is_variant(parse_variant, variant)

    def write_random(self, path: str | os.PathLike[str], variant: str, options: RandomOptions) -> str:
        """See `write_random_lit`."""
        return write_random_lit(path, variant, options)


LIT = LiTFamily()
