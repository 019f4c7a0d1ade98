"""The vision transformer of google-research/vision_transformer and big_vision."""

import os
from collections.abc import Collection, Mapping

from vit_convert.checkpoint.containers import Leaf
from vit_convert.core.model import Model
from vit_convert.families.family import Asked, Loaded, RandomOptions
from vit_convert.families.options import OF_TOWERS, is_variant, refuse_options
from vit_convert.families.vit.layouts import Layout, detect
from vit_convert.families.vit.load import load_vit
from vit_convert.families.vit.variants import PUBLISHED, parse_variant


class ViTFamily:
    """See `families.family.Family`."""

    name = "vit"
    layouts = tuple(layout.value for layout in Layout)
    variants = PUBLISHED

    def match(self, names: Collection[str]) -> Layout | None:
        """Recognises the layout by the names of the leaves."""
        return detect(names)

    def load(self, leaves: Mapping[str, Leaf], layout: Layout, asked: Asked) -> Loaded:
        """See `load_vit`."""
        return load_vit(leaves, layout, asked)

    def model(self, loaded: Loaded) -> Model:
        """See `vit_model`."""
        from vit_convert.families.vit.model import vit_model

        return vit_model(loaded.architecture, loaded.params)

    def has_variant(self, variant: str) -> bool:
        """Whether it is a width of ours, a slash and a patch size."""
        return is_variant(parse_variant, variant)

    def write_random(self, path: str | os.PathLike[str], variant: str, options: RandomOptions) -> str:
        """See `write_random_vit`."""
        from vit_convert.families.vit.random import write_random_vit

        refuse_options("vit", options, OF_TOWERS)
        return write_random_vit(path, variant, options).variant


VIT = ViTFamily()
