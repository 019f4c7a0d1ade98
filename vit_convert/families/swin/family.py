"""Swin (v1) as a family: from PyTorch's leaves to a Flax model, and random ones."""

import dataclasses
import os
from collections.abc import Collection, Mapping

from vit_convert.checkpoint.containers import Leaf, Leaves
from vit_convert.checkpoint.match import Expected, require_match
from vit_convert.core.errors import CheckpointError, UsageError
from vit_convert.core.model import Model
from vit_convert.families.family import Asked, Loaded, RandomOptions
from vit_convert.families.head import settle_head
from vit_convert.families.options import is_variant
from vit_convert.families.swin import layouts
from vit_convert.families.swin.architecture import PATCH, PUBLISHED, Swin, parameter_count
from vit_convert.families.swin.infer import infer_architecture, parse_variant
from vit_convert.families.swin.layouts import Layout


class SwinFamily:
    """Swin of microsoft/Swin-Transformer, timm and transformers."""

    name = "swin"
    layouts = (Layout.TRANSFORMERS.value, Layout.TIMM.value, Layout.MICROSOFT.value)
    variants = PUBLISHED

    def match(self, names: Collection[str]) -> Layout | None:
        """See `Family`."""
        return layouts.detect(names)

    def load(self, leaves: Mapping[str, Leaf], layout: Layout, asked: Asked) -> Loaded:
        """See `Family`."""
        if asked.posemb_grid is not None:
            raise UsageError(f"posemb_grid {asked.posemb_grid}: a Swin has no position table", fix="Leave it out.")
        inner = layouts.inner_leaves(leaves)
        if unlike := next(
            (leaf.name for name, leaf in inner.items() if name.endswith(("logit_scale", "absolute_pos_embed"))), None
        ):
            raise CheckpointError(
                f"{asked.file}: {unlike}: a Swin V2 or one with absolute positions, which is not supported"
            )
        stored, found = infer_architecture(inner, asked.variant, asked.image_size, asked.file)

        def on_disk(name: str) -> str:
            return asked.prefix + layouts.outer_name(name, leaves)

        found = asked.instead_of(found)
        shapes = layouts.stored_shapes(stored, layout)
        require_match(inner, Expected(asked.file, stored.variant, shapes, parameter_count(stored), on_disk, found))
        head = settle_head(
            layouts.prepare(inner, stored, layout), stored.num_classes, asked.outputs, asked.file, ("tokens", "grid")
        )
        architecture = dataclasses.replace(stored, num_classes=head.num_classes, outputs=head.outputs)
        return Loaded(
            title="Swin",
            variant=architecture.variant,
            layout=layout,
            architecture=architecture,
            params=Leaves(head.leaves),
            num_params=parameter_count(architecture),
            image_size=architecture.image_size,
            source_image_size=architecture.image_size,
            num_classes=architecture.num_classes,
            preprocess="imagenet",
            patch_size=PATCH,
            attentions=tuple(_attentions(architecture)),
            zero_head=head.is_zero,
            warnings=head.warnings,
            output=head.output,
            unused=frozenset(leaves) - {leaf.name.removeprefix(asked.prefix) for leaf in inner.values()},
        )

    def model(self, loaded: Loaded) -> Model:
        """See `Family`."""
        from vit_convert.families.swin.module import swin_model

        return swin_model(loaded.architecture, loaded.params)

    def has_variant(self, variant: str) -> bool:
        """See `Family`."""
        return is_variant(parse_variant, variant) and variant.lower().startswith("swin")

    def write_random(self, path: str | os.PathLike[str], variant: str, options: RandomOptions) -> str:
        """See `Family`."""
        from vit_convert.families.swin.random import write_random_swin

        return write_random_swin(path, variant, options).variant


def _attentions(architecture: Swin) -> list[tuple[int, int]]:
    """(head size, tokens of a window) of every stage; each once."""
    sizes = {architecture.stage_width(stage) // heads for stage, heads in enumerate(architecture.num_heads)}
    return [(size, architecture.window**2) for size in sorted(sizes)]


SWIN = SwinFamily()
