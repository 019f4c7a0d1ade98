"""Random LiTs, in either numbering."""

import functools
import os
from collections.abc import Callable

import numpy as np

from vit_convert.checkpoint.draw import write_npz
from vit_convert.families.family import RandomOptions
from vit_convert.families.lit.layouts import FOLDERS, FORMS, Layout, bert_places
from vit_convert.families.lit.variants import LENGTH, Variant, image_tower, parse_variant, text_tower
from vit_convert.families.options import refuse_options
from vit_convert.families.towers.architecture import Shape, TextTower, Tower
from vit_convert.families.towers.big_vision import stored_name
from vit_convert.families.towers.draw import draw
from vit_convert.families.towers.naming import stored_tower
from vit_convert.families.towers.places import written
from vit_convert.families.towers.random import sized, wanted

TEMPERATURE = 4.6  # about the final value in the published models

Arrays = dict[str, tuple[Shape, Callable[[], np.ndarray]]]


def write_random_lit(path: str | os.PathLike[str], variant: str, options: RandomOptions) -> str:
    """Writes an `.npz` whose values depend only on the seed and the canonical names.

    Args:
        path: the file; appears whole or not at all.
        variant: such as "LiT-B16B".
        options: `num_classes` is ignored: there are none.

    Returns:
        The variant's name.

    Raises:
        UsageError: unknown variant, or an option without meaning.
    """
    refuse_options("lit", options, ("pool", "posemb", "pre_logits", "outlier_channels", "length", "text_head"))
    name, parsed = parse_variant(variant)
    layout = Layout(options.layout or Layout.LIT)
    image, text = image_tower(name, parsed, options.image_size or (224, 224)), text_tower(name, parsed, LENGTH)
    both: dict[str, Tower] = {"image": image, "text": text}
    arrays: Arrays = {}
    for kind, tower in wanted(both, options.towers).items():
        arrays |= _stored(kind, sized(tower, options.depth), parsed, layout, options.seed)
    arrays["t"] = ((1,), lambda: np.full(1, TEMPERATURE, np.float32))
    members = ((options.prefix + name, shape, (compute(),)) for name, (shape, compute) in arrays.items())
    write_npz(path, members, options.dtype)
    return name


def _stored(kind: str, tower: Tower, variant: Variant, layout: Layout, seed: int) -> Arrays:
    shapes = stored_tower(tower, class_row=kind == "image")
    values = functools.partial(_drawn, seed, FOLDERS[kind])
    if isinstance(tower, TextTower) and variant.text.bert:
        width = tower.encoder.width
        shapes |= {"pos_embedding": (1, variant.text.positions, width), "segments": (1, 2, width)}
        return written(values, bert_places(shapes))
    names = {name: stored_name(name, kind, FOLDERS[kind], FORMS[layout]) for name in shapes}
    return {names[name]: (shape, functools.partial(values, name, shape)) for name, shape in shapes.items()}


def _drawn(seed: int, folder: str, name: str, shape: Shape) -> np.ndarray:
    return draw(seed, folder + name, shape)
