"""From the leaves of a LiT's checkpoint to one tower, strictly."""

import dataclasses
import math
import re
from collections.abc import Mapping

from vit_convert.checkpoint.containers import Leaf
from vit_convert.checkpoint.match import Expected, require_blocks, require_match, require_size
from vit_convert.checkpoint.vote import count_numbers, most_common
from vit_convert.families.family import Asked, Loaded
from vit_convert.families.lit import layouts, variants
from vit_convert.families.lit.layouts import FOLDERS, FORMS, Layout
from vit_convert.families.pair import Pair, towers_under
from vit_convert.families.towers.architecture import Encoder, ImageTower, TextTower, Tower, leaf_shapes, parameter_count
from vit_convert.families.towers.big_vision import (
    held_against,
    image_leaves,
    image_tower_of,
    stored_name,
    text_leaves,
    text_tower_of,
)
from vit_convert.families.towers.load import loaded_tower
from vit_convert.families.towers.places import stored_shapes, taken


def load_lit(stored: Mapping[str, Leaf], layout: Layout, asked: Asked) -> Loaded:
    """Compares one tower's leaves with the model inferred from their shapes; see `Family.load`, also for its errors."""
    given = None if asked.variant == "auto" else variants.parse_variant(asked.variant)
    file, rows = str(asked.file), None

    def on_disk(name: str) -> str:
        return asked.prefix + stored_name(name, asked.tower, FOLDERS[asked.tower], FORMS[layout])

    if asked.tower == "image":
        leaves = image_leaves(stored, "img/", file)
        tower: Tower = image_tower_of(leaves, asked, "lit")
        found = _name_of(stored, tower, tower.patch_size)  # type: ignore[attr-defined]
        tower = _named(tower, found, given)
        leaves, rows = held_against(leaves, tower, asked, on_disk, found)
    elif layouts.is_bert(stored):
        leaves, tower, rows = _bert(stored, asked, given)
    else:
        leaves = text_leaves(stored, "txt/", file)
        tower = text_tower_of(leaves, asked, "lit", {"end": 1, "pad": 1})
        found = _name_of(stored, tower)
        tower = _named(tower, found, given)
        leaves, rows = held_against(leaves, tower, asked, on_disk, found)
    unused = frozenset(name for name in stored if not name.startswith(FOLDERS[asked.tower]) and name != "t")
    return loaded_tower(
        tower,
        leaves,
        asked,
        title="LiT",
        layout=layout,
        preprocess="lit",
        pair=_pair(stored, tower),
        table_rows=rows,
        unused=unused,
    )


def _name_of(stored: Mapping[str, Leaf], tower: Tower, patch_size: int = 0) -> str:
    """The model that has this tower, and the other one of its file."""
    kind, other = ("image", "txt/") if isinstance(tower, ImageTower) else ("text", "img/")
    has_image = any(name.startswith("img/") for name in stored)
    image_head = any(name.startswith("img/head/") for name in stored) if has_image else None
    width = most_common(stored, (rf"^{other}.*/scale$", -1))
    return variants.name_of(kind, tower.encoder, patch_size, image_head=image_head, other=width)


def _named(tower: Tower, found: str, given: tuple[str, variants.Variant] | None) -> Tower:
    """The tower given by its own shapes, or by the requested variant."""
    if given is None:
        return dataclasses.replace(tower, variant=found)
    name, variant = given
    row = variant.image if isinstance(tower, ImageTower) else variant.text.sizes
    bert = isinstance(tower, TextTower) and tower.encoder.post_norm
    head = variant.image.width if isinstance(tower, TextTower) or variant.image_head else 0
    return dataclasses.replace(tower, variant=name, encoder=variants.encoder_of(row, bert=bert), head=head)


def _bert(
    stored: Mapping[str, Leaf], asked: Asked, given: tuple[str, variants.Variant] | None
) -> tuple[dict[str, Leaf], Tower, int]:
    """BERT's leaves by canonical name with its tables folded, the tower, and the number of rows in the stored
    tables."""
    leaves = {name: leaf for name, leaf in stored.items() if name.startswith("txt/")}
    require_blocks(leaves, layouts.BERT_BLOCK, "layer", str(asked.file))
    blocks = {name: leaf for name, leaf in leaves.items() if re.match(layouts.BERT_BLOCK, name)}
    width = most_common(blocks, (r"layer_norm/scale$", 0))
    hidden = most_common(blocks, (r"mlp_block/mlp/dense_layer/bias$", 0))
    vocabulary = most_common(leaves, (rf"^{layouts.WORDS}$", 0))
    positions = most_common(leaves, (rf"^{layouts.POSITIONS}$", 0))
    head = most_common(leaves, (r"^txt/head/bias$", 0), (r"^txt/head/kernel$", -1))
    for what, size, leaf in (
        ("width", width, "layer_norm/scale"),
        ("mlp_dim", hidden, "mlp_block/mlp/dense_layer/bias"),
        ("vocabulary", vocabulary, layouts.WORDS),
        ("number of positions", positions, layouts.POSITIONS),
    ):
        require_size(asked.file, what, size, leaf)
    sizes = (width, count_numbers(blocks, layouts.BERT_BLOCK), hidden, max(1, width // 64))
    encoder = Encoder(*sizes, norm_epsilon=variants.BERT_EPSILON, post_norm=True)
    length = min(variants.LENGTH, positions)
    bare = variants.bert_tower("", encoder, head, vocabulary, length)
    found = _name_of(stored, bare)
    tower = _named(bare, found, given)
    width = tower.encoder.width
    shapes = leaf_shapes(tower) | {"pos_embedding": (1, positions, width), "segments": (1, 2, width)}
    places = layouts.bert_places(shapes)
    rows = positions + 2  # and two segments
    count = parameter_count(tower, rows)
    hint = asked.instead_of(found)
    on_disk = stored_shapes(places.values())
    require_match(leaves, Expected(asked.file, tower.variant, on_disk, count, lambda name: asked.prefix + name, hint))
    return layouts.fold_tables(taken(leaves, places), length), tower, rows


def _pair(stored: Mapping[str, Leaf], tower: Tower) -> Pair:
    bert = layouts.is_bert(stored)
    words = layouts.WORDS if bert else "txt/Embed_0/embedding"
    vocabulary = most_common(stored, (rf"^{words}$", 0))
    length = min(most_common(stored, (rf"^{layouts.POSITIONS}$", 0), (r"^txt/pos_embedding$", 1)), variants.LENGTH)
    temperature = float(stored["t"].as_float32().read().reshape(-1)[0]) if "t" in stored else 0.0
    return Pair(
        family="lit",
        variant=tower.variant,
        logit_scale=math.exp(temperature),
        logit_bias=None,
        similarity="softmax",
        embedding=tower.features,
        tokenizer="bert" if bert else "sentencepiece",
        length=length,
        vocabulary=vocabulary,
        start=min(101, vocabulary - 1) if bert else -1,
        end=-1 if bert else 1,  # LiT's BERT does not put [SEP] after a text
        pad=0 if bert else 1,
        lower=bert,
        sticky_end=not bert,
        towers=towers_under(FOLDERS, stored),
    )
