"""Hybrids with seeded random weights, in the form of the published files: GroupNorm leaves of [1, 1, 1, C], kernels not
standardised."""

import dataclasses
import os
from collections.abc import Iterator

import numpy as np

from vit_convert.checkpoint.draw import Member, draw, normal, write_npz
from vit_convert.families.family import RandomOptions
from vit_convert.families.hybrid.architecture import Hybrid, feature_size, leaf_shapes
from vit_convert.families.hybrid.infer import check_image_size, parse_variant
from vit_convert.families.hybrid.layouts import stored_name
from vit_convert.families.options import OF_TOWERS, refuse_options
from vit_convert.families.vit.layouts import Layout
from vit_convert.families.vit.variants import architecture_of


def write_random_hybrid(path: str | os.PathLike[str], variant: str, options: RandomOptions) -> Hybrid:
    """Writes an uncompressed `.npz` whose values depend only on the seed and the canonical names.

    Args:
        path: the file; appears whole or not at all.
        variant: such as "R26+ViT-S/32".
        options: pooling and representation layer are as in vit_jax; `depth` is the encoder's.

    Returns:
        The architecture that was written.

    Raises:
        UsageError: unknown variant, an option without meaning, or an image size that the patches do not tile.
    """
    refuse_options("hybrid", options, ("pool", "posemb", "outlier_channels", *OF_TOWERS))
    name, row = parse_variant(variant)
    size = options.image_size or (224, 224)
    check_image_size(size, row.stages, row.patch_size)
    trunk = architecture_of(f"{row.letters}/{row.patch_size}", feature_size(size, row.stages), options.num_classes)
    if options.depth is not None:
        trunk = dataclasses.replace(trunk, depth=options.depth)
    if options.pre_logits:
        trunk = dataclasses.replace(trunk, representation_size=trunk.width)
    model = Hybrid(name, row.stages, size, trunk)
    layout = Layout(options.layout or Layout.VIT_JAX.value)
    write_npz(path, _members(model, layout, options.seed, options.prefix), options.dtype)
    return model


def _members(model: Hybrid, layout: Layout, seed: int, prefix: str) -> Iterator[Member]:
    for name, shape in leaf_shapes(model).items():
        if name == "pos_embedding":
            shape = (1, shape[1] + 1, shape[2])  # the first row is the class token's
        yield prefix + stored_name(name, layout), *_stored(seed, name, shape, layout)


def _stored(
    seed: int, name: str, shape: tuple[int, ...], layout: Layout
) -> tuple[tuple[int, ...], tuple[np.ndarray, ...]]:
    array = np.float32(0.1) * normal(seed, name, shape) if name in ("pos_embedding", "cls") else draw(seed, name, shape)
    if name.endswith(("query/kernel", "key/kernel", "value/kernel")):
        array *= np.float32(shape[1] ** 0.5)  # only its first axis is inputs
    if "gn" in name and layout is Layout.VIT_JAX:
        array = array.reshape(1, 1, 1, -1)
    return array.shape, (array,)
