"""Swins with seeded random weights, in the form of the published files."""

import dataclasses
import functools
import os

import numpy as np

from vit_convert.checkpoint.draw import draw, normal, write_safetensors
from vit_convert.core.errors import UsageError
from vit_convert.families.family import RandomOptions
from vit_convert.families.options import OF_TOWERS, refuse_options
from vit_convert.families.swin.architecture import SIZE_OF_WINDOW, Shape, Swin, leaf_shapes, name_variant, tiles
from vit_convert.families.swin.infer import parse_variant
from vit_convert.families.swin.layouts import Layout, stored_name, stored_shapes


def write_random_swin(path: str | os.PathLike[str], variant: str, options: RandomOptions) -> Swin:
    """Writes a `.safetensors` file whose values depend only on the seed and the canonical names.

    Args:
        path: the file; appears whole or not at all.
        variant: such as "Swin-T/7".
        options: `depth` is that of the second-last stage, in which the variants differ.

    Returns:
        The architecture that was written.

    Raises:
        UsageError: unknown variant, an option without meaning, or an image size that the windows do not tile.
    """
    refuse_options("swin", options, ("pool", "posemb", "pre_logits", "outlier_channels", *OF_TOWERS))
    sizes, window = parse_variant(variant)
    name = name_variant(sizes, window)
    if options.depth is not None:
        depths = (*sizes.depths[:-2], options.depth, sizes.depths[-1])
        sizes = dataclasses.replace(sizes, depths=depths)
    side = SIZE_OF_WINDOW.get(window, 32 * window)
    size = options.image_size or (side, side)
    if not tiles(size, window, len(sizes.depths)):
        raise UsageError(f"image_size {size[0]}x{size[1]}: windows of {window} tokens do not tile it")
    model = Swin(name, sizes.width, sizes.depths, sizes.num_heads, window, size, options.num_classes)
    layout = Layout(options.layout or Layout.TRANSFORMERS.value)
    parts: dict[str, list[tuple[str, Shape]]] = {}
    for canonical, shape in leaf_shapes(model).items():
        parts.setdefault(stored_name(canonical, layout), []).append((canonical, shape))
    members = [
        (f"{options.prefix}{_outer(stored, layout)}", shape, functools.partial(_stored, options.seed, parts[stored]))
        for stored, shape in stored_shapes(model, layout).items()
    ]
    write_safetensors(path, members, options.dtype)
    return model


def _outer(stored: str, layout: Layout) -> str:
    return f"swin.{stored}" if layout is Layout.TRANSFORMERS and not stored.startswith("classifier.") else stored


def _stored(seed: int, parts: list[tuple[str, Shape]]) -> np.ndarray:
    """One array on disk: one parameter, or query, key and value stacked."""
    return np.concatenate([_turned(seed, name, shape) for name, shape in parts])


def _turned(seed: int, name: str, shape: Shape) -> np.ndarray:
    if name.endswith("/table"):
        return normal(seed, name, shape)
    array = draw(seed, name, shape)
    return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T
