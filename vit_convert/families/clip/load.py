"""From the leaves of a CLIP's checkpoint to one tower, strictly."""

import math
import re
from collections.abc import Mapping

from vit_convert.checkpoint.containers import Leaf
from vit_convert.checkpoint.match import Expected, require_match, require_size
from vit_convert.checkpoint.vote import most_common, patch_side
from vit_convert.core.errors import CheckpointError
from vit_convert.families.clip import variants
from vit_convert.families.clip.layouts import BUFFERS, Layout, names_of, tower_of
from vit_convert.families.family import Asked, Loaded
from vit_convert.families.pair import Pair
from vit_convert.families.towers.architecture import ImageTower, Tower, parameter_count
from vit_convert.families.towers.hub_config import HubConfig, read_hub_config
from vit_convert.families.towers.infer import stored_encoder
from vit_convert.families.towers.load import image_size_of, loaded_tower, square_grid
from vit_convert.families.towers.naming import places_of, stored_tower
from vit_convert.families.towers.places import stored_shapes, taken
from vit_convert.families.vit.layouts import fold_class_row

_TABLES = {
    "image": r"(vision_model[./].*position_embedding[./]\w+|visual[./]positional_embedding)$",
    "text": r"(text_model[./].*position_embedding[./]\w+|text/positional_embedding|^positional_embedding)$",
}
_PATCHES = r"(patch_embedding|conv1)[./](weight|kernel)$"
_WORDS = r"token_embedding[./](weight|embedding)$"


def load_clip(stored: Mapping[str, Leaf], layout: Layout, asked: Asked) -> Loaded:
    """Compares one tower's leaves with the model inferred from their shapes; see `Family.load`, also for its errors."""
    named = {re.sub(r"resblocks_(\d)", r"resblocks.\1", name): leaf for name, leaf in stored.items()}
    leaves = {name: leaf for name, leaf in named.items() if tower_of(name) == asked.tower and not BUFFERS.search(name)}
    config = read_hub_config(asked.file, asked.tower) if layout in (Layout.TRANSFORMERS, Layout.FLAX) else HubConfig()
    tower, found, warnings = _tower(leaves, layout, asked, config)
    image = isinstance(tower, ImageTower)
    shapes = stored_tower(tower, class_row=image)
    places = places_of(shapes, names_of(layout, tower, shapes))
    rows = shapes["pos_embedding"][1] if image else None
    expected = Expected(
        asked.file,
        tower.variant,
        stored_shapes(places.values()),
        parameter_count(tower, rows),
        lambda name: asked.prefix + name,
        asked.instead_of(found),
    )
    require_match(leaves, expected)
    canonical = taken(leaves, places)
    if image:
        canonical = fold_class_row(canonical)
    unused = frozenset(name for name in stored if tower_of(name) != asked.tower or BUFFERS.search(name))
    unused -= {"logit_scale"}
    return loaded_tower(
        tower,
        canonical,
        asked,
        title="CLIP",
        layout=layout,
        preprocess="clip",
        pair=_pair(named, tower, found),
        table_rows=rows,
        warnings=warnings,
        unused=unused,
    )


def towers_in(names: Mapping[str, Leaf]) -> tuple[str, ...]:
    """Which towers a file has."""
    found = {tower_of(name) for name in names}
    return tuple(tower for tower in ("image", "text") if tower in found)


def _tower(leaves: Mapping[str, Leaf], layout: Layout, asked: Asked, config: HubConfig) -> tuple[Tower, str, list[str]]:
    """The tower to compare the file with, the variant named by the file's own shapes, and warnings."""
    given = None if asked.variant == "auto" else variants.parse_variant(asked.variant)
    activation = variants.ACTIVATIONS[given.kind if given else "CLIP"]
    heads, epsilon = variants.HEADS[asked.tower], variants.EPSILON
    encoder = stored_encoder(leaves, asked.file, config, heads, activation, epsilon)
    warnings = []
    if given is None and not config.activation and layout is not Layout.SCENIC:  # this has only OpenAI's
        warnings.append(
            f"{asked.file.name}: the activation is unknown (no config.json beside it tells): assuming QuickGELU, "
            "as in OpenAI's models; variant='OpenCLIP-…' selects GELU, as in LAION's."
        )
    embedding = _embedding(leaves, asked.tower)
    require_size(asked.file, "embedding", embedding, "the last product")
    if asked.tower == "image":
        patch = patch_side(leaves, _only(leaves, _PATCHES), encoder.width)
        found = variants.name_of(encoder, "image", patch)
        patch = given.patch_size if given else patch
        table = leaves.get(_only(leaves, _TABLES["image"]))
        if table is None or len(table.shape) != 2:
            raise CheckpointError(f"{asked.file}: no position table [patches + 1, width]", fix="Save the tower whole.")
        grid = square_grid(table, table.shape[0] - 1, asked.posemb_grid, asked.file)
        name = given.name if given else found
        encoder = variants.encoder_of(given, "image") if given else encoder
        return variants.image_tower(name, encoder, embedding, patch, image_size_of(grid, patch)), found, warnings
    found = variants.name_of(encoder, "text")
    encoder = variants.encoder_of(given, "text") if given else encoder
    vocabulary, length = most_common(leaves, (_WORDS, 0)), most_common(leaves, (_TABLES["text"], 0))
    require_size(asked.file, "vocabulary", vocabulary, "token_embedding")
    require_size(asked.file, "number of tokens", length, "position_embedding")
    name = given.name if given else found
    return variants.text_tower(name, encoder, embedding, vocabulary, length), found, warnings


def _only(leaves: Mapping[str, Leaf], pattern: str) -> str:
    return next((name for name in leaves if re.search(pattern, name)), "")


def _embedding(leaves: Mapping[str, Leaf], tower: str) -> int:
    """Length of an embedding, from the last product, which is [outputs, inputs] only in PyTorch's linear layers."""
    last = "visual_projection" if tower == "image" else "text_projection"
    torch = most_common(leaves, (rf"^{last}\.weight$", 0))
    return torch or most_common(leaves, (rf"({last}|visual\.proj|visual/proj)(/kernel)?$", -1))


def _pair(stored: Mapping[str, Leaf], tower: Tower, variant: str) -> Pair:
    scale = stored["logit_scale"].as_float32().read().reshape(-1)[0] if "logit_scale" in stored else math.log(1 / 0.07)
    text = {name: leaf for name, leaf in stored.items() if tower_of(name) == "text"}
    vocabulary, length = most_common(text, (_WORDS, 0)), most_common(text, (_TABLES["text"], 0))
    return Pair(
        family="clip",
        variant=variant,
        logit_scale=math.exp(float(scale)),
        logit_bias=None,
        similarity="softmax",
        embedding=tower.features,
        tokenizer="clip",
        length=length,
        vocabulary=vocabulary,
        start=vocabulary - 2 if vocabulary else -1,
        end=vocabulary - 1 if vocabulary else -1,
        pad=0,
        lower=True,
        sticky_end=True,
        towers=towers_in(stored),
    )
