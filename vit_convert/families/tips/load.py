"""From the leaves of a TIPS's checkpoint to its tower, strictly."""

import dataclasses
from collections.abc import Mapping

from vit_convert.checkpoint.containers import Leaf
from vit_convert.checkpoint.match import Expected, require_match, require_size
from vit_convert.checkpoint.vote import most_common, patch_side
from vit_convert.core.errors import CheckpointError
from vit_convert.families.family import Asked, Loaded
from vit_convert.families.pair import Pair
from vit_convert.families.tips import layouts, variants
from vit_convert.families.tips.layouts import Layout
from vit_convert.families.towers.architecture import ImageTower, Tower, leaf_shapes, parameter_count
from vit_convert.families.towers.load import image_size_of, infer_encoder, loaded_tower


def load_tips(stored: Mapping[str, Leaf], layout: Layout, asked: Asked) -> Loaded:
    """Compares the leaves with the model inferred from their shapes; see `Family.load`, also for its errors."""
    leaves = layouts.canonicalize(stored, asked.tower, str(asked.file))
    temperature = leaves.pop(layouts.TEMPERATURE, None)
    image = asked.tower == "image"
    if temperature is None and not image:
        name = asked.prefix + layouts.TEMPERATURE
        raise CheckpointError(
            f"{asked.file}: {name}: missing; without it, it is unknown how texts are compared with images",
            fix="Save the text tower whole.",
        )
    tower, found = _image(leaves, asked) if image else _text(leaves, asked)
    if asked.variant != "auto":
        given = variants.parse_variant(asked.variant)
        tower = dataclasses.replace(tower, variant=given.name, encoder=given.image if image else given.text)
    gated = tower.encoder.activation == "swiglu"

    def on_disk(name: str) -> str:
        return asked.prefix + layouts.stored_name(name, asked.tower, gated)

    shapes, rows = leaf_shapes(tower), 0
    if isinstance(tower, ImageTower):
        rows = tower.grid[0] * tower.grid[1]
        shapes["pos_embedding"] = (1, *tower.grid, tower.encoder.width)
    else:
        del shapes["pos_embedding"]
    hint = asked.instead_of(found)
    count = parameter_count(tower, rows)
    require_match(leaves, Expected(asked.file, tower.variant, shapes, count, on_disk, hint))
    if image:
        leaves["pos_embedding"] = layouts.flat_table(leaves["pos_embedding"])
    else:
        table = layouts.sinusoids(variants.LENGTH, tower.encoder.width)
        leaves["pos_embedding"] = Leaf("pos_embedding", table.shape, table.dtype, lambda: table)
        leaves["Embed_0/embedding"] = layouts.scaled_words(leaves["Embed_0/embedding"])
    return loaded_tower(
        tower,
        leaves,
        asked,
        title="TIPS",
        layout=layout,
        preprocess="tips",
        pair=None if temperature is None else _pair(tower, leaves, temperature),
        table_rows=rows,
    )


def _image(leaves: Mapping[str, Leaf], asked: Asked) -> tuple[Tower, str]:
    encoder = infer_encoder(leaves, asked.file)
    table = leaves["pos_embedding"]
    if len(table.shape) != 4:
        raise CheckpointError(
            f"{asked.file}: {table.name}: checkpoint {table.shape}, needed is (1, rows, columns, width)",
            fix="Save the table as the model has it.",
        )
    patch, grid = patch_side(leaves, "embedding/kernel", encoder.width), (table.shape[1], table.shape[2])
    kind = "TIPSv2" if grid[0] == variants.GRIDS["TIPSv2"] else "TIPS"
    found = variants.name_of("image", encoder, kind, patch)
    return variants.image_tower(found, encoder, patch, image_size_of(grid, patch)), found


def _text(leaves: Mapping[str, Leaf], asked: Asked) -> tuple[Tower, str]:
    encoder = infer_encoder(leaves, asked.file, activation="relu")
    vocabulary = most_common(leaves, (r"^Embed_0/embedding$", 0))
    require_size(asked.file, "vocabulary", vocabulary, layouts.WORDS)
    found = variants.name_of("text", encoder)
    return variants.text_tower(found, encoder, vocabulary, variants.LENGTH), found


def _pair(tower: Tower, leaves: Mapping[str, Leaf], temperature: Leaf) -> Pair:
    vocabulary = leaves["Embed_0/embedding"].shape[0]
    return Pair(
        family="tips",
        variant=tower.variant,
        logit_scale=1 / float(temperature.as_float32().read().reshape(-1)[0]),
        logit_bias=None,
        similarity="softmax",
        embedding=tower.features,
        tokenizer="sentencepiece",
        length=variants.LENGTH,
        vocabulary=vocabulary,
        start=-1,
        end=-1,
        pad=0,
        lower=True,
        sticky_end=False,
        towers=("text",),
    )
