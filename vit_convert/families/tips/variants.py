"""TIPS and TIPSv2: their named variants and their sizes."""

import dataclasses
import re

from vit_convert.core.errors import UsageError, nearest
from vit_convert.families.towers.architecture import Encoder, ImageTower, TextTower
from vit_convert.families.vit.variants import Width

VOCABULARY, LENGTH = 32_000, 64
_TINY_VOCABULARY = 80
# tips/scenic/models/vit.py; "mu" and "mug" (gated as g) are ours, for tests. A text tower has twelve blocks of these
# sizes, without gates.
SIZES = {
    "mu": Width(32, 2, 64, 2),
    "mug": Width(32, 2, 48, 2),
    "S": Width(384, 12, 1536, 6),
    "B": Width(768, 12, 3072, 12),
    "L": Width(1024, 24, 4096, 16),
    "So400m": Width(1152, 27, 4304, 16),
    "g": Width(1536, 40, 4096, 24),
}
_GATED = ("g", "mug")
_TEXT_MLP = {"g": 6144, "mug": 64}  # where it is not the image tower's
_TEXT_DEPTH = {"mu": 2, "mug": 2, "So400m": 27}
PUBLISHED = tuple(f"{kind}-{letters}/14" for kind in ("TIPS", "TIPSv2") for letters in ("S", "B", "L", "So400m", "g"))
GRIDS = {"TIPS": 16, "TIPSv2": 32}  # rows of the stored position table
_SPELLING = re.compile(r"(?P<kind>TIPS(?:v2)?)-(?P<letters>[A-Za-z0-9]+)/(?P<patch>[1-9]\d*)")


@dataclasses.dataclass(frozen=True)
class Variant:
    """A parsed variant name.

    Attributes:
        name: such as "TIPSv2-B/14".
        kind: "TIPS" or "TIPSv2".
        image: the image tower's blocks.
        text: the text tower's blocks.
        patch_size: side of a patch in pixels.
        vocabulary: number of different tokens.
    """

    name: str
    kind: str
    image: Encoder
    text: Encoder
    patch_size: int
    vocabulary: int


def parse_variant(text: str) -> Variant:
    """Reads a variant's name, such as "TIPS-B/14" or "TIPSv2-g/14".

    Raises:
        UsageError: no such variant.
    """
    match = _SPELLING.fullmatch(text)
    if match is None or match["letters"] not in SIZES:
        raise UsageError(
            f"variant {text!r}: no TIPS.{nearest(text, PUBLISHED)}",
            fix=f"Use TIPS- or TIPSv2-, one of {', '.join(SIZES)}, a slash and the patch size, such as TIPSv2-B/14.",
        )
    letters, row = match["letters"], SIZES[match["letters"]]
    activation = "swiglu" if letters in _GATED else "tanh"
    image = Encoder(row.width, row.depth, row.mlp_dim, row.num_heads, activation)
    hidden, depth = _TEXT_MLP.get(letters, row.mlp_dim), _TEXT_DEPTH.get(letters, 12)
    words = _TINY_VOCABULARY if letters.startswith("mu") else VOCABULARY
    other = Encoder(row.width, depth, hidden, row.num_heads, "relu")
    return Variant(text, match["kind"], image, other, int(match["patch"]), words)


def name_of(tower: str, encoder: Encoder, kind: str = "TIPS", patch_size: int = 14) -> str:
    """The name of the row whose tower has these blocks, or "custom"."""
    for letters in SIZES:
        found = parse_variant(f"{kind}-{letters}/{patch_size}")
        if (found.image if tower == "image" else found.text) == encoder:
            return found.name if tower == "image" else f"{kind}-{letters}"
    return "custom"


def image_tower(name: str, encoder: Encoder, patch_size: int, image_size: tuple[int, int]) -> ImageTower:
    """The image tower: two class tokens, of which the first is the image's embedding."""
    tower = ImageTower("tips", name, encoder, "tok", patch_size=patch_size, image_size=image_size)
    return dataclasses.replace(tower, class_tokens=2, table="half_pixel")


def text_tower(name: str, encoder: Encoder, vocabulary: int, length: int) -> TextTower:
    """The text tower: no token attends to padding; pooling by the mean of the others."""
    return TextTower("tips", name, encoder, "mean", vocabulary=vocabulary, length=length, mask="padding", pad=0)
