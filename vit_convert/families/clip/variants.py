"""CLIP: its named variants and their sizes."""

import dataclasses
import re

from vit_convert.core.errors import UsageError, nearest
from vit_convert.families.towers.architecture import Encoder, ImageTower, TextTower
from vit_convert.families.vit.variants import Width

VOCABULARY, LENGTH = 49_408, 77
_TINY_VOCABULARY, _TINY_LENGTH = 96, 12
EPSILON = 1e-5
ACTIVATIONS = {"CLIP": "quick", "OpenCLIP": "erf"}  # OpenAI's; LAION trained its own with GELU


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes that the letters of a variant's name stand for."""

    image: Width
    text: Width
    embedding: int


SIZES = {
    "mu": Sizes(Width(32, 2, 64, 2), Width(24, 2, 48, 2), 20),
    "B": Sizes(Width(768, 12, 3072, 12), Width(512, 12, 2048, 8), 512),
    "L": Sizes(Width(1024, 24, 4096, 16), Width(768, 12, 3072, 12), 768),
    "H": Sizes(Width(1280, 32, 5120, 16), Width(1024, 24, 4096, 16), 1024),
    "g": Sizes(Width(1408, 40, 6144, 16), Width(1024, 24, 4096, 16), 1024),
    "bigG": Sizes(Width(1664, 48, 8192, 16), Width(1280, 32, 5120, 20), 1280),
}
PUBLISHED = (
    *(f"CLIP-{name}" for name in ("B/32", "B/16", "L/14")),
    *(f"OpenCLIP-{name}" for name in ("B/32", "B/16", "L/14", "H/14", "g/14", "bigG/14")),
)
# By kind of tower and width, where the head size is not 64.
HEADS = {
    "image": {row.image.width: row.image.num_heads for row in SIZES.values()},
    "text": {row.text.width: row.text.num_heads for row in SIZES.values()},
}
_SPELLING = re.compile(r"(?P<kind>CLIP|OpenCLIP)-(?P<letters>[A-Za-z]+)[/_](?P<patch>[1-9]\d*)")


@dataclasses.dataclass(frozen=True)
class Variant:
    """A parsed variant name.

    Attributes:
        name: such as "CLIP-B/32".
        kind: "CLIP" or "OpenCLIP".
        sizes: its row in the table.
        patch_size: side of a patch in pixels.
        vocabulary: number of different tokens.
        length: tokens of a text.
    """

    name: str
    kind: str
    sizes: Sizes
    patch_size: int
    vocabulary: int = VOCABULARY
    length: int = LENGTH


def parse_variant(text: str) -> Variant:
    """Reads a variant's name.

    Args:
        text: "CLIP-B/32" (QuickGELU) or "OpenCLIP-B_32" (GELU).

    Raises:
        UsageError: no such variant.
    """
    match = _SPELLING.fullmatch(text)
    if match is None or match["letters"] not in SIZES:
        raise UsageError(
            f"variant {text!r}: no CLIP.{nearest(text.replace('_', '/'), PUBLISHED)}",
            fix=f"Use CLIP- or OpenCLIP-, one of {', '.join(SIZES)}, a slash and the patch size, such as CLIP-B/32.",
        )
    letters, patch = match["letters"], int(match["patch"])
    more = (_TINY_VOCABULARY, _TINY_LENGTH) if letters == "mu" else (VOCABULARY, LENGTH)
    return Variant(f"{match['kind']}-{letters}/{patch}", match["kind"], SIZES[letters], patch, *more)


def name_of(encoder: Encoder, tower: str, patch_size: int = 0) -> str:
    """The name of the row with these sizes, without slash and patch if the patch is unknown; "custom" if there is
    none."""
    sizes = Width(encoder.width, encoder.depth, encoder.mlp_dim, encoder.num_heads)
    rows = ((letters, row.image if tower == "image" else row.text) for letters, row in SIZES.items())
    letters = next((letters for letters, row in rows if row == sizes), None)
    kind = next((kind for kind, activation in ACTIVATIONS.items() if activation == encoder.activation), None)
    if letters is None or kind is None:
        return "custom"
    return f"{kind}-{letters}/{patch_size}" if patch_size else f"{kind}-{letters}"


def encoder_of(variant: Variant, tower: str) -> Encoder:
    """The blocks of one tower of a variant."""
    row = variant.sizes.image if tower == "image" else variant.sizes.text
    return Encoder(row.width, row.depth, row.mlp_dim, row.num_heads, ACTIVATIONS[variant.kind], EPSILON)


def image_tower(
    name: str, encoder: Encoder, embedding: int, patch_size: int, image_size: tuple[int, int]
) -> ImageTower:
    """The image tower: a norm before the blocks, a class token, and a product without bias."""
    return ImageTower(
        "clip",
        name,
        encoder,
        "tok",
        head=embedding,
        head_bias=False,
        pre_norm=True,
        epsilon=0.0,
        patch_size=patch_size,
        image_size=image_size,
        patch_bias=False,
        class_tokens=1,
    )


def text_tower(name: str, encoder: Encoder, embedding: int, vocabulary: int, length: int) -> TextTower:
    """The text tower: a causal mask, pooling at the end token, and a product without bias."""
    return TextTower(
        "clip",
        name,
        encoder,
        "end",
        head=embedding,
        head_bias=False,
        epsilon=0.0,
        vocabulary=vocabulary,
        length=length,
        mask="causal",
        start=vocabulary - 2,
        end=vocabulary - 1,
        pad=0,
    )
