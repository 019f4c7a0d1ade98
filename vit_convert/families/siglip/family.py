"""SigLIP and SigLIP 2 as a family: from leaves to a tower, and random ones."""

import os
from collections.abc import Collection, Mapping

from vit_convert.checkpoint.containers import Leaf
from vit_convert.core.model import Model
from vit_convert.families.family import Asked, Loaded, RandomOptions
from vit_convert.families.options import is_variant
from vit_convert.families.pair import towers_under
from vit_convert.families.siglip.layouts import FOLDERS, Layout, detect
from vit_convert.families.siglip.load import load_siglip
from vit_convert.families.siglip.random import write_random_siglip
from vit_convert.families.siglip.transformers import MODELS
from vit_convert.families.siglip.variants import PUBLISHED, parse_variant


class SigLIPFamily:
    """Image and text towers whose pairs are scored by a sigmoid each (arXiv:2303.15343, arXiv:2502.14786)."""

    name = "siglip"
    layouts = tuple(layout.value for layout in Layout)
    variants = PUBLISHED

    def match(self, names: Collection[str]) -> Layout | None:
        """See `Family`; of the names of both towers."""
        return detect(names)

    def towers(self, names: Collection[str], layout: Layout) -> tuple[str, ...]:
        """See `TowerFamily`."""
        return towers_under(MODELS if layout is Layout.TRANSFORMERS else FOLDERS, names)

    def load(self, leaves: Mapping[str, Leaf], layout: Layout, asked: Asked) -> Loaded:
        """See `load_siglip`."""
        return load_siglip(leaves, layout, asked)

    def model(self, loaded: Loaded) -> Model:
        """See `tower_model`."""
        from vit_convert.families.towers.model import tower_model

        return tower_model(loaded.architecture, loaded.params)

    def has_variant(self, variant: str) -> bool:
        """See `Family`."""
        return is_variant(parse_variant, variant)

    def write_random(self, path: str | os.PathLike[str], variant: str, options: RandomOptions) -> str:
        """See `write_random_siglip`."""
        return write_random_siglip(path, variant, options)


SIGLIP = SigLIPFamily()
