"""Mixers with seeded random weights, in either layout."""

import dataclasses
import os
from collections.abc import Iterator

import numpy as np

from vit_convert.checkpoint.draw import Member, draw, write_npz
from vit_convert.core.errors import UsageError
from vit_convert.families.mixer.architecture import Mixer, leaf_shapes, name_variant
from vit_convert.families.mixer.infer import parse_variant
from vit_convert.families.mixer.layouts import Layout, stored_name


def write_random_mixer(
    path: str | os.PathLike[str],
    variant: str,
    *,
    seed: int = 0,
    image_size: tuple[int, int] = (224, 224),
    num_classes: int = 1000,
    depth: int | None = None,
    layout: str = "mixer",
    prefix: str = "",
    dtype: str = "float32",
) -> Mixer:
    """Writes an uncompressed `.npz` whose values depend only on the seed and the canonical names.

    Args:
        path: the file; appears whole or not at all.
        variant: such as "Mixer-B/16".
        seed: of the weights.
        image_size: (height, width) in pixels, multiples of the patch size.
        num_classes: outputs of the head; 0 leaves it out.
        depth: blocks; None takes the variant's.
        layout: "mixer" or "mixer_old".
        prefix: put in front of every name, such as "params/".
        dtype: one of `draw.DTYPES`.

    Returns:
        The architecture that was written.

    Raises:
        UsageError: unknown variant, or an image size that its patches do not tile.
    """
    sizes, patch = parse_variant(variant)
    if any(side % patch or not side for side in image_size):
        raise UsageError(f"image_size {image_size[0]}x{image_size[1]}: not a multiple of the patch size {patch}")
    name = name_variant(sizes, patch)
    if depth is not None:
        sizes = dataclasses.replace(sizes, depth=depth)
    model = Mixer(
        variant=name, **dataclasses.asdict(sizes), patch_size=patch, image_size=image_size, num_classes=num_classes
    )
    write_npz(path, _members(model, Layout(layout), seed, prefix), dtype)
    return model


def _members(model: Mixer, layout: Layout, seed: int, prefix: str) -> Iterator[Member]:
    for name, shape in leaf_shapes(model).items():
        array = draw(seed, name, shape)
        if layout is Layout.MIXER_OLD and "_mixing/" in name:
            array = _old_axes(name, array)
        yield prefix + stored_name(name, layout), array.shape, (array,)


def _old_axes(name: str, array: np.ndarray) -> np.ndarray:
    """Adds axes of length one that broadcast it over the channels or tokens that share it."""
    if array.ndim == 2:
        return array[None]
    return array[:, None] if "token_mixing" in name else array[None, None]
