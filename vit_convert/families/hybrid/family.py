"""R+ViT hybrids as a family: from leaves to a model, and random ones."""

import dataclasses
import math
import os
from collections.abc import Collection, Mapping

from vit_convert.checkpoint.containers import Leaf, Leaves
from vit_convert.checkpoint.match import Expected, require_match
from vit_convert.core.model import Model
from vit_convert.families.family import Asked, Loaded, RandomOptions
from vit_convert.families.head import settle_head
from vit_convert.families.hybrid import layouts
from vit_convert.families.hybrid.architecture import (
    PUBLISHED,
    Hybrid,
    feature_size,
    leaf_shapes,
    num_tokens,
    parameter_count,
)
from vit_convert.families.hybrid.infer import check_image_size, infer_architecture, parse_variant
from vit_convert.families.options import is_variant
from vit_convert.families.vit import layouts as trunk_layouts
from vit_convert.families.vit.infer import find_position_table
from vit_convert.families.vit.layouts import Layout
from vit_convert.families.vit.posemb import resampled, resampling_warning


class HybridFamily:
    """The R+ViT hybrids of vit_jax."""

    name = "hybrid"
    layouts = (Layout.VIT_JAX.value, Layout.VIT_JAX_LINEN.value)
    variants = PUBLISHED

    def match(self, names: Collection[str]) -> Layout | None:
        """See `Family`."""
        return layouts.detect(names)

    def load(self, leaves: Mapping[str, Leaf], layout: Layout, asked: Asked) -> Loaded:
        """See `Family`."""
        file = asked.file
        renamed = layouts.canonicalize(leaves, str(file))
        stored, found = infer_architecture(renamed, asked.variant, file)
        stored, rows, class_row = _at_stored_size(stored, renamed, layout, asked)

        def on_disk(name: str) -> str:
            return asked.prefix + layouts.stored_name(name, layout)

        shapes = leaf_shapes(stored) | {"pos_embedding": (1, rows, stored.trunk.width)}
        found = asked.instead_of(found)
        require_match(renamed, Expected(file, stored.variant, shapes, parameter_count(stored, rows), on_disk, found))
        if class_row:
            renamed = trunk_layouts.fold_class_row(renamed)
        head = settle_head(renamed, stored.trunk.num_classes, asked.outputs, file, ("tokens", "grid"))
        trunk = dataclasses.replace(stored.trunk, num_classes=head.num_classes, outputs=head.outputs)
        stored = dataclasses.replace(stored, trunk=trunk)
        architecture, warnings = _at_asked_size(stored, head.leaves, asked)
        trunk = architecture.trunk
        return Loaded(
            title="hybrid",
            variant=architecture.variant,
            layout=layout,
            architecture=architecture,
            params=Leaves({name: head.leaves[name].as_float32() for name in leaf_shapes(architecture)}),
            num_params=parameter_count(stored, rows),
            image_size=architecture.image_size,
            source_image_size=stored.image_size,
            num_classes=head.num_classes,
            preprocess="vit_jax",
            patch_size=trunk.patch_size * architecture.stride,
            attentions=((trunk.width // trunk.num_heads, num_tokens(architecture)),),
            group_norms=architecture.group_norms,
            zero_head=head.is_zero,
            warnings=(*head.warnings, *warnings),
            output=head.output,
        )

    def model(self, loaded: Loaded) -> Model:
        """See `Family`."""
        from vit_convert.families.hybrid.module import hybrid_model

        return hybrid_model(loaded.architecture, loaded.params)

    def has_variant(self, variant: str) -> bool:
        """See `Family`."""
        return is_variant(parse_variant, variant)

    def write_random(self, path: str | os.PathLike[str], variant: str, options: RandomOptions) -> str:
        """See `Family`."""
        from vit_convert.families.hybrid.random import write_random_hybrid

        return write_random_hybrid(path, variant, options).variant


def _at_stored_size(found: Hybrid, leaves: Mapping[str, Leaf], layout: Layout, asked: Asked) -> tuple[Hybrid, int, int]:
    """The model at the size of its position table, the number of the table's rows, and how many of them belong to the
    class token."""
    patch, stages, size = found.trunk.patch_size, found.stages, asked.image_size
    if size is not None:
        check_image_size(size, stages, patch)
    features = None if size is None else feature_size(size, stages)
    grid, class_row = find_position_table(leaves, layout, patch, features, asked.posemb_grid, asked.file)
    trunk = dataclasses.replace(found.trunk, image_size=(grid[0] * patch, grid[1] * patch))
    pixels = (trunk.image_size[0] * found.stride, trunk.image_size[1] * found.stride)
    return dataclasses.replace(found, image_size=pixels, trunk=trunk), math.prod(grid) + class_row, class_row


def _at_asked_size(stored: Hybrid, leaves: dict[str, Leaf], asked: Asked) -> tuple[Hybrid, list[str]]:
    """The model at the requested size, with its position table resampled in `leaves`, and warnings about that."""
    if asked.image_size is None or asked.image_size == stored.image_size:
        return stored, []
    trunk = dataclasses.replace(stored.trunk, image_size=feature_size(asked.image_size, stored.stages))
    architecture = dataclasses.replace(stored, image_size=asked.image_size, trunk=trunk)
    old, new = stored.trunk.grid, trunk.grid
    if old == new:
        return architecture, []
    leaves["pos_embedding"] = resampled(leaves["pos_embedding"], old, new)
    return architecture, [resampling_warning(asked.file.name, stored.image_size, asked.image_size)]


HYBRID = HybridFamily()
