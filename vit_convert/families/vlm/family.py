"""Image towers of vision-language models as a family: SigLIP's, with each model's treatment of their tokens."""

import dataclasses
import os
import re
from collections.abc import Collection, Iterator, Mapping

import numpy as np

from vit_convert.checkpoint.containers import Leaf
from vit_convert.checkpoint.draw import Member, write_npz
from vit_convert.core.errors import UsageError, nearest
from vit_convert.core.model import Model
from vit_convert.families.family import Asked, Loaded, RandomOptions
from vit_convert.families.options import refuse_options
from vit_convert.families.towers.architecture import BLOCK, Encoder, ImageTower, leaf_shapes
from vit_convert.families.towers.big_vision import held_against, image_leaves, image_tower_of, stored_name
from vit_convert.families.towers.draw import draw
from vit_convert.families.towers.load import loaded_tower
from vit_convert.families.towers.random import sized
from vit_convert.families.vit import layouts as vit
from vit_convert.families.vit.variants import WIDTHS
from vit_convert.families.vlm.layouts import FORMS, Layout, detect, without_value

_TITLES = {"PaliGemma": Layout.PALIGEMMA, "openpi": Layout.OPENPI, "Gemma3": Layout.GEMMA3}
_SIDES = {"PaliGemma": 224, "openpi": 224, "Gemma3": 896}
_HEADS = {"PaliGemma": 2048, "openpi": 2048}  # the width of Gemma 2B; Gemma 3 has its product in the language model
_SPELLING = re.compile(r"(?P<model>PaliGemma|openpi|Gemma3)-(?P<letters>mu|So400m)/(?P<patch>[1-9]\d*)")
PUBLISHED = tuple(f"{name}-So400m/14" for name in _TITLES)


class VLMFamily:
    """See `families.family.TowerFamily`; their language models are not converted."""

    name = "vlm"
    layouts = tuple(layout.value for layout in Layout)
    variants = PUBLISHED

    def match(self, names: Collection[str]) -> Layout | None:
        """See `Family`."""
        return detect(names)

    def towers(self, names: Collection[str], layout: Layout) -> tuple[str, ...]:
        """See `TowerFamily`."""
        return ("image",)

    def load(self, leaves: Mapping[str, Leaf], layout: Layout, asked: Asked) -> Loaded:
        """See `Family`."""
        form = FORMS[layout]
        named = without_value(leaves)
        inner = image_leaves(named, form.folder, str(asked.file))
        tower = image_tower_of(inner, asked, "vlm", form.pool)
        found = _name_of(tower, layout)
        tower = dataclasses.replace(tower, variant=found, outputs=("tokens",), normalize=False)
        if asked.variant != "auto":
            name, encoder, patch = _parsed(asked.variant)
            tower = dataclasses.replace(tower, variant=name, encoder=encoder, patch_size=patch)
        stacked = any(name.startswith(f"{form.folder}Transformer/encoderblock/") for name in named)

        def on_disk(name: str) -> str:
            return asked.prefix + stored_name(name, "image", form.folder, _form(stacked))

        held, rows = held_against(inner, tower, asked, on_disk, found)
        return loaded_tower(
            tower,
            held,
            asked,
            title=found.partition("-")[0] if found != "custom" else "image tower",
            layout=layout,
            preprocess="paligemma",
            pair=None,
            table_rows=rows,
            unused=frozenset(name for name in leaves if not name.startswith(form.folder)),
        )

    def model(self, loaded: Loaded) -> Model:
        """See `Family`."""
        from vit_convert.families.towers.model import tower_model

        return tower_model(loaded.architecture, loaded.params)

    def has_variant(self, variant: str) -> bool:
        """See `Family`."""
        return _SPELLING.fullmatch(variant) is not None

    def write_random(self, path: str | os.PathLike[str], variant: str, options: RandomOptions) -> str:
        """See `Family`: writes an `.npz` with the image tower and one leaf of another part of the model."""
        refuse_options(
            "vlm", options, ("pool", "posemb", "pre_logits", "outlier_channels", "towers", "length", "text_head")
        )
        name, encoder, patch = _parsed(variant)
        model = name.partition("-")[0]
        layout = Layout(options.layout or _TITLES[model])
        side = _SIDES[model]
        tower = ImageTower(
            "vlm",
            name,
            encoder,
            FORMS[layout].pool,
            head=_HEADS.get(model, 0),
            outputs=("tokens",),
            patch_size=patch,
            image_size=options.image_size or (side, side),
        )
        write_npz(path, _members(sized(tower, options.depth), layout, options), options.dtype)
        return name


def _form(stacked: bool) -> vit.Layout:
    return vit.Layout.BIG_VISION_SCAN if stacked else vit.Layout.BIG_VISION


def _parsed(text: str) -> tuple[str, Encoder, int]:
    """Name, blocks and patch size of a variant such as "PaliGemma-So400m/14"."""
    match = _SPELLING.fullmatch(text)
    if match is None:
        raise UsageError(f"variant {text!r}: unknown.{nearest(text, PUBLISHED)}", fix=f"Use {', '.join(PUBLISHED)}.")
    return text, Encoder(*dataclasses.astuple(WIDTHS[match["letters"]])), int(match["patch"])


def _name_of(tower: ImageTower, layout: Layout) -> str:
    model = next((name for name, known in _TITLES.items() if layout.value.startswith(known.value)), "")
    for letters in ("So400m", "mu"):
        if Encoder(*dataclasses.astuple(WIDTHS[letters])) == tower.encoder:
            return f"{model}-{letters}/{tower.patch_size}"
    return "custom"


def _members(tower: ImageTower, layout: Layout, options: RandomOptions) -> Iterator[Member]:
    form, depth = FORMS[layout], range(tower.encoder.depth)
    for name, shape in leaf_shapes(tower).items():
        place = options.prefix + stored_name(name, "image", form.folder, _form(form.stacked))
        if not form.stacked or not name.startswith(BLOCK):
            yield place, shape, (draw(options.seed, name, shape),)
        elif name.startswith(f"{BLOCK}0/"):
            names = (name.replace(f"{BLOCK}0/", f"{BLOCK}{i}/") for i in depth)
            yield place, (len(depth), *shape), (draw(options.seed, each, shape) for each in names)
    beside = form.beside or "transformer/"
    yield f"{options.prefix}{beside}final_norm/scale", (2,), (np.ones(2, np.float32),)


VLM = VLMFamily()
