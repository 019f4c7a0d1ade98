"""The named variants: one row for each width, times any patch size."""

import dataclasses
import re

from vit_convert.core.errors import UsageError, nearest
from vit_convert.core.image_size import check_image_size
from vit_convert.families.vit.architecture import Architecture


@dataclasses.dataclass(frozen=True)
class Width:
    """Sizes that the letters of a variant's name stand for."""

    width: int
    depth: int
    mlp_dim: int
    num_heads: int


WIDTHS = {
    "mu": Width(32, 1, 128, 2),
    "Ti": Width(192, 12, 768, 3),
    "S": Width(384, 12, 1536, 6),
    "M": Width(512, 12, 2048, 8),
    "B": Width(768, 12, 3072, 12),
    "L": Width(1024, 24, 4096, 16),
    "So400m": Width(1152, 27, 4304, 16),
    "H": Width(1280, 32, 5120, 16),
    "g": Width(1408, 40, 6144, 16),
    "g-opt": Width(1536, 40, 6144, 16),
    "G": Width(1664, 48, 8192, 16),
    "G-opt": Width(1536, 48, 8192, 16),
    "e": Width(1792, 56, 15360, 16),
}

TOKEN_VARIANTS = ("Ti/16", "S/16", "S/32", "B/8", "B/16", "B/32", "L/16", "L/32", "H/14")
GAP_VARIANTS = ("S/16-gap-norep", "S/32-gap-norep", "B/16-gap-norep", "B/32-gap-norep")
PUBLISHED = TOKEN_VARIANTS + GAP_VARIANTS  # the ViTs of vit_jax/configs/models.py

_SPELLING = re.compile(r"(?:ViT-)?(?P<letters>[A-Za-z0-9]+(?:-opt)?)[/_](?P<patch>[1-9]\d*)(?P<gap>-gap-norep)?")


@dataclasses.dataclass(frozen=True)
class Variant:
    """A parsed variant name.

    Attributes:
        name: big_vision's spelling, such as "B/16".
        sizes: its row in the table.
        patch_size: side of a patch in pixels.
        pool: "gap" if the name says `-gap-norep`; None if the name leaves it open.
    """

    name: str
    sizes: Width
    patch_size: int
    pool: str | None


def parse_variant(text: str) -> Variant:
    """Reads any spelling of a variant.

    Args:
        text: "B/16", "B_16", "ViT-B_16" or "ViT-B_16-gap-norep".

    Returns:
        The variant.

    Raises:
        UsageError: no such variant.
    """
    match = _SPELLING.fullmatch(text)
    if match is None or match["letters"] not in WIDTHS:
        known = [*PUBLISHED, *(f"{letters}/16" for letters in WIDTHS)]
        spelt = text.removeprefix("ViT-").replace("_", "/")
        raise UsageError(
            f"variant {text!r}: unknown.{nearest(spelt, known)}",
            fix=f"Use one of {', '.join(WIDTHS)}, a slash and the patch size, such as B/16.",
        )
    letters, patch = match["letters"], int(match["patch"])
    return Variant(f"{letters}/{patch}", WIDTHS[letters], patch, "gap" if match["gap"] else None)


def name_variant(sizes: Width, patch_size: int) -> str:
    """The name of the row with these sizes, or "custom"."""
    for letters, row in WIDTHS.items():
        if row == sizes:
            return f"{letters}/{patch_size}"
    return "custom"


def architecture_of(
    variant: str,
    image_size: tuple[int, int] = (224, 224),
    num_classes: int = 1000,
    *,
    pool: str | None = None,
    representation_size: int = 0,
) -> Architecture:
    """Describes a named variant.

    Args:
        variant: any spelling that `parse_variant` reads.
        image_size: (height, width) in pixels, multiples of the patch size.
        num_classes: outputs of the head; 0 for none.
        pool: "tok", "gap" or "map"; None for what the name says, or "tok" if it says nothing.
        representation_size: width of the tanh layer before the head; 0 for none.

    Returns:
        The architecture.

    Raises:
        UsageError: unknown variant, or an image size that the patches do not tile.
    """
    parsed = parse_variant(variant)
    check_image_size(image_size, parsed.patch_size)
    return Architecture(
        family="vit",
        variant=parsed.name,
        **dataclasses.asdict(parsed.sizes),
        patch_size=parsed.patch_size,
        image_size=image_size,
        num_classes=num_classes,
        pool=pool or parsed.pool or "tok",
        representation_size=representation_size,
    )
