"""CLIP as a family: from leaves to a tower, and random ones."""

import os
from collections.abc import Collection, Mapping

from vit_convert.checkpoint.containers import Leaf
from vit_convert.core.model import Model
from vit_convert.families.clip.layouts import Layout, detect, tower_of
from vit_convert.families.clip.load import load_clip
from vit_convert.families.clip.random import write_random_clip
from vit_convert.families.clip.variants import PUBLISHED, parse_variant
from vit_convert.families.family import Asked, Loaded, RandomOptions
from vit_convert.families.options import is_variant


class CLIPFamily:
    """Image and text towers whose pairs are scored by a softmax (arXiv:2103.00020): OpenAI's, and LAION's from
    open_clip."""

    name = "clip"
    layouts = tuple(layout.value for layout in Layout)
    variants = PUBLISHED

    def match(self, names: Collection[str]) -> Layout | None:
        """See `Family`; takes the names of both towers."""
        return detect(names)

    def towers(self, names: Collection[str], layout: Layout) -> tuple[str, ...]:
        """See `TowerFamily`."""
        found = {tower_of(name) for name in names}
        return tuple(tower for tower in ("image", "text") if tower in found)

    def load(self, leaves: Mapping[str, Leaf], layout: Layout, asked: Asked) -> Loaded:
        """See `load_clip`."""
        return load_clip(leaves, layout, asked)

    def model(self, loaded: Loaded) -> Model:
        """See `tower_model`."""
        from vit_convert.families.towers.model import tower_model

        return tower_model(loaded.architecture, loaded.params)

    def has_variant(self, variant: str) -> bool:
        """See `Family`."""
        return is_variant(parse_variant, variant)

    def write_random(self, path: str | os.PathLike[str], variant: str, options: RandomOptions) -> str:
        """See `write_random_clip`."""
        return write_random_clip(path, variant, options)


CLIP = CLIPFamily()
