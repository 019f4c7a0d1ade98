"""SigLIP and SigLIP 2: their named variants and their sizes."""

import dataclasses
import re
from typing import Any

from vit_convert.core.errors import UsageError, nearest
from vit_convert.families.towers.architecture import Encoder, ImageTower, PatchTower, TextTower
from vit_convert.families.vit.variants import WIDTHS, Width

# Published at gs://big_vision/siglip and gs://big_vision/siglip2; any width of `vit.variants`, a slash and a patch is
# a variant.
PUBLISHED = (
    *(f"SigLIP-{name}" for name in ("B/16", "L/16", "So400m/14")),
    *(f"SigLIP2-{name}" for name in ("B/16", "B/32", "L/16", "So400m/14", "So400m/16", "g-opt/16")),
    *(f"SigLIP2-{name}-naflex" for name in ("B/16", "So400m/16")),
)
NAFLEX = "-naflex"
NAFLEX_GRID, NAFLEX_LENGTH = (16, 16), 256
VOCABULARIES = {"SigLIP": 32_000, "SigLIP2": 256_000}  # c4_en; Gemma's. The multilingual SigLIP has mc4's 250,000.
_TEXT_OF = {"g-opt": "So400m"}  # its text tower is narrower, and ends in a product to the image tower's width
_TINY_VOCABULARY = 96  # of "mu", for tests
_SPELLING = re.compile(
    r"(?P<kind>SigLIP2?)-(?P<letters>[A-Za-z0-9]+(?:-opt)?)[/_](?P<patch>[1-9]\d*)(?P<naflex>-naflex)?"
)


@dataclasses.dataclass(frozen=True)
class Variant:
    """A parsed variant name.

    Attributes:
        name: such as "SigLIP2-B/16".
        kind: "SigLIP" or "SigLIP2".
        image: sizes of the image tower's blocks.
        text: sizes of the text tower's blocks.
        patch_size: side of a patch in pixels.
        vocabulary: number of different tokens.
        naflex: whether its images are patches of any aspect.
    """

    name: str
    kind: str
    image: Width
    text: Width
    patch_size: int
    vocabulary: int
    naflex: bool = False


def parse_variant(text: str) -> Variant:
    """Reads a variant's name.

    Args:
        text: "SigLIP-B/16" or "SigLIP2-So400m_14".

    Returns:
        The variant.

    Raises:
        UsageError: no such variant.
    """
    match = _SPELLING.fullmatch(text)
    if match is None or match["letters"] not in WIDTHS:
        raise UsageError(
            f"variant {text!r}: no SigLIP.{nearest(text.replace('_', '/'), PUBLISHED)}",
            fix=f"Use SigLIP- or SigLIP2-, one of {', '.join(WIDTHS)}, a slash and the patch size: SigLIP-B/16.",
        )
    letters, patch = match["letters"], int(match["patch"])
    vocabulary = _TINY_VOCABULARY if letters == "mu" else VOCABULARIES[match["kind"]]
    text_width = WIDTHS[_TEXT_OF.get(letters, letters)]
    name, naflex = f"{match['kind']}-{letters}/{patch}", match["naflex"] is not None
    if naflex:
        name += NAFLEX
    return Variant(name, match["kind"], WIDTHS[letters], text_width, patch, vocabulary, naflex)


def kind_of(vocabulary: int) -> str:
    """ "SigLIP2" for Gemma's vocabulary, "SigLIP" for any other."""
    return "SigLIP2" if vocabulary == VOCABULARIES["SigLIP2"] else "SigLIP"


def name_of(encoder: Encoder, kind: str, patch_size: int = 0, *, naflex: bool = False) -> str:
    """The name of the row with these sizes, without slash and patch if the patch is unknown; "custom" if there is
    none."""
    sizes = Width(encoder.width, encoder.depth, encoder.mlp_dim, encoder.num_heads)
    letters = next((letters for letters, row in WIDTHS.items() if row == sizes), None)
    if letters is None:
        return "custom"
    return f"{kind}-{letters}/{patch_size}{NAFLEX if naflex else ''}" if patch_size else f"{kind}-{letters}"


def naflex_tower(name: str, encoder: Encoder, patch_size: int, grid: tuple[int, int], length: int) -> PatchTower:
    """SigLIP 2's image tower for images of any aspect: attention pooling over everything but padding."""
    tower = PatchTower("siglip", name, encoder, "map", patch_size=patch_size, grid=grid)
    return dataclasses.replace(tower, length=length)


def encoder_of(width: Width) -> Encoder:
    """The blocks of a row of `vit.variants.WIDTHS`."""
    return Encoder(width.width, width.depth, width.mlp_dim, width.num_heads)


def image_tower(variant: Variant, image_size: tuple[int, int]) -> ImageTower:
    """The image tower of a variant: attention pooling, with nothing after it."""
    return ImageTower(
        "siglip", variant.name, encoder_of(variant.image), "map", patch_size=variant.patch_size, image_size=image_size
    )


def text_tower(variant: Variant, length: int, *, head: bool) -> TextTower:
    """The text tower of a variant: no mask, pooling by the last token."""
    size = variant.image.width if head else 0
    return TextTower(
        "siglip",
        variant.name,
        encoder_of(variant.text),
        "last",
        head=size,
        vocabulary=variant.vocabulary,
        length=length,
        **special_tokens(variant.vocabulary),
    )


def special_tokens(vocabulary: int) -> dict[str, Any]:
    """The end and padding tokens of a text: token 1 for both, except that Gemma's vocabulary pads with 0."""
    return {"start": -1, "end": 1, "pad": 0 if kind_of(vocabulary) == "SigLIP2" else 1}
