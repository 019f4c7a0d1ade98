"""MLP-Mixer as a family: from leaves to a model, and random ones."""

import dataclasses
import os
from collections.abc import Collection, Mapping

from vit_convert.checkpoint.containers import Leaf, Leaves
from vit_convert.checkpoint.match import Expected, require_match
from vit_convert.core.errors import UsageError
from vit_convert.core.model import Model
from vit_convert.families.family import Asked, Loaded, RandomOptions
from vit_convert.families.head import settle_head
from vit_convert.families.mixer import layouts
from vit_convert.families.mixer.architecture import PUBLISHED, leaf_shapes, parameter_count
from vit_convert.families.mixer.infer import infer_architecture, parse_variant
from vit_convert.families.mixer.layouts import Layout
from vit_convert.families.mixer.random import write_random_mixer
from vit_convert.families.options import OF_TOWERS, is_variant, refuse_options


class MixerFamily:
    """MLP-Mixer of vit_jax and big_vision."""

    name = "mixer"
    layouts = tuple(layout.value for layout in Layout)
    variants = PUBLISHED

    def match(self, names: Collection[str]) -> Layout | None:
        """See `Family`."""
        return layouts.detect(names)

    def load(self, leaves: Mapping[str, Leaf], layout: Layout, asked: Asked) -> Loaded:
        """See `Family`."""
        if asked.posemb_grid is not None:
            raise UsageError(f"posemb_grid {asked.posemb_grid}: a Mixer has no position table", fix="Leave it out.")
        renamed = layouts.canonicalize(leaves, layout, str(asked.file))
        stored, found = infer_architecture(renamed, asked.variant, asked.image_size, asked.file)

        def on_disk(name: str) -> str:
            return asked.prefix + layouts.stored_name(name, layout)

        found = asked.instead_of(found)
        require_match(
            renamed, Expected(asked.file, stored.variant, leaf_shapes(stored), parameter_count(stored), on_disk, found)
        )
        head = settle_head(renamed, stored.num_classes, asked.outputs, asked.file, ("tokens", "grid"))
        architecture = dataclasses.replace(stored, num_classes=head.num_classes, outputs=head.outputs)
        return Loaded(
            title="Mixer",
            variant=architecture.variant,
            layout=layout,
            architecture=architecture,
            params=Leaves({name: head.leaves[name].as_float32() for name in leaf_shapes(architecture)}),
            num_params=parameter_count(architecture),
            image_size=architecture.image_size,
            source_image_size=architecture.image_size,
            num_classes=architecture.num_classes,
            preprocess="vit_jax",
            patch_size=architecture.patch_size,
            zero_head=head.is_zero,
            warnings=head.warnings,
            output=head.output,
        )

    def model(self, loaded: Loaded) -> Model:
        """See `Family`."""
        from vit_convert.families.mixer.module import mixer_model

        return mixer_model(loaded.architecture, loaded.params)

    def has_variant(self, variant: str) -> bool:
        """See `Family`."""
        return is_variant(parse_variant, variant) and variant.startswith("Mixer-")

    def write_random(self, path: str | os.PathLike[str], variant: str, options: RandomOptions) -> str:
        """See `Family`."""
        refuse_options("mixer", options, ("pool", "posemb", "pre_logits", "outlier_channels", *OF_TOWERS))
        return write_random_mixer(
            path,
            variant,
            seed=options.seed,
            image_size=options.image_size or (224, 224),
            num_classes=options.num_classes,
            depth=options.depth,
            layout=options.layout or Layout.MIXER.value,
            prefix=options.prefix,
            dtype=options.dtype,
        ).variant


MIXER = MixerFamily()
