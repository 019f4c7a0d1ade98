"""Random CLIPs, in any of their layouts."""

import functools
import json
import math
import os
import pathlib
from collections.abc import Callable

import numpy as np

from vit_convert.checkpoint.draw import write_msgpack, write_safetensors
from vit_convert.core.bundle import atomic
from vit_convert.families.clip.layouts import Layout, names_of
from vit_convert.families.clip.variants import Variant, encoder_of, image_tower, parse_variant, text_tower
from vit_convert.families.family import RandomOptions
from vit_convert.families.options import refuse_options
from vit_convert.families.towers.architecture import Shape, Tower
from vit_convert.families.towers.draw import draw
from vit_convert.families.towers.naming import places_of, stored_tower
from vit_convert.families.towers.places import written
from vit_convert.families.towers.random import sized, wanted

_SCALE = math.log(100.0)  # the final value in OpenAI's models
_ACTIVATIONS = {"quick": "quick_gelu", "erf": "gelu"}


def write_random_clip(path: str | os.PathLike[str], variant: str, options: RandomOptions) -> str:
    """Writes a file whose values depend only on the seed and the canonical names: `.safetensors`, or `.msgpack` where
    it is called so.

    Args:
        path: the file; appears whole or not at all. In the layout of transformers a `config.json` is written beside it.
        variant: such as "CLIP-B/32".
        options: `num_classes` is ignored: there are none.

    Returns:
        The variant's name.

    Raises:
        UsageError: unknown variant, or an option without meaning.
    """
    refuse_options("clip", options, ("pool", "posemb", "pre_logits", "outlier_channels", "text_head"))
    parsed, layout = parse_variant(variant), Layout(options.layout or Layout.TRANSFORMERS)
    towers = towers_of(parsed, options)
    arrays: dict[str, tuple[Shape, Callable[[], np.ndarray]]] = {}
    for kind, tower in towers.items():
        shapes = stored_tower(tower, class_row=kind == "image")
        values = functools.partial(_drawn, options.seed, kind)
        arrays |= written(values, places_of(shapes, names_of(layout, tower, shapes)))
    arrays["logit_scale"] = ((), lambda: np.array(_SCALE, np.float32))
    members = [(options.prefix + name, shape, compute) for name, (shape, compute) in arrays.items()]
    write = write_msgpack if os.fspath(path).endswith(".msgpack") else write_safetensors
    write(path, members, options.dtype)
    if layout is Layout.TRANSFORMERS:
        _write_config(pathlib.Path(path).with_name("config.json"), towers)
    return parsed.name


def towers_of(variant: Variant, options: RandomOptions) -> dict[str, Tower]:
    """The towers that a random checkpoint has."""
    size, length = options.image_size or (224, 224), options.length or variant.length
    image, text = encoder_of(variant, "image"), encoder_of(variant, "text")
    both: dict[str, Tower] = {
        "image": image_tower(variant.name, image, variant.sizes.embedding, variant.patch_size, size),
        "text": text_tower(variant.name, text, variant.sizes.embedding, variant.vocabulary, length),
    }
    return {kind: sized(tower, options.depth) for kind, tower in wanted(both, options.towers).items()}


def _drawn(seed: int, kind: str, name: str, shape: Shape) -> np.ndarray:
    return draw(seed, f"{kind}/{name}", shape)


def _write_config(path: pathlib.Path, towers: dict[str, Tower]) -> None:
    """Writes the part of transformers' `config.json` that cannot be inferred from shapes."""
    record = {
        {"image": "vision_config", "text": "text_config"}[kind]: {
            "num_attention_heads": tower.encoder.num_heads,
            "hidden_act": _ACTIVATIONS[tower.encoder.activation],
            "layer_norm_eps": tower.encoder.norm_epsilon,
        }
        for kind, tower in towers.items()
    }
    with atomic(path) as temporary:
        pathlib.Path(temporary).write_text(json.dumps({"model_type": "clip", **record}, indent=2), encoding="utf-8")
