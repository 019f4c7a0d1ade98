"""Infers a Mixer from the shapes of its leaves."""

import dataclasses
import math
import pathlib
import re
from collections.abc import Mapping

from vit_convert.checkpoint.containers import Leaf
from vit_convert.checkpoint.match import require_size
from vit_convert.checkpoint.vote import count_numbers, most_common, patch_side
from vit_convert.core.errors import CheckpointError, UsageError, nearest
from vit_convert.families.mixer.architecture import BLOCK, PUBLISHED, SIZES, Mixer, Sizes, name_variant

_SPELLING = re.compile(r"(?:Mixer-)?(?P<letters>[A-Za-z]+)[/_](?P<patch>[1-9]\d*)")


def parse_variant(text: str) -> tuple[Sizes, int]:
    """Reads any spelling of a variant.

    Args:
        text: "Mixer-B/16", "Mixer-B_16" or "B/16".

    Returns:
        Its row, and the side of a patch in pixels.

    Raises:
        UsageError: no such variant.
    """
    match = _SPELLING.fullmatch(text)
    if match is None or match["letters"] not in SIZES:
        raise UsageError(
            f"variant {text!r}: no Mixer.{nearest(text.replace('_', '/'), PUBLISHED)}",
            fix=f"Use Mixer-, one of {', '.join(SIZES)}, a slash and the patch size, such as Mixer-B/16.",
        )
    return SIZES[match["letters"]], int(match["patch"])


def infer_architecture(
    leaves: Mapping[str, Leaf], variant: str, image_size: tuple[int, int] | None, file: pathlib.Path
) -> tuple[Mixer, str]:
    """Reads the sizes from the shapes, then lets a given variant overrule them.

    Args:
        leaves: by canonical name.
        variant: a variant's name, or "auto".
        image_size: requested (height, width) in pixels; None for the size that fits the weights.
        file: for messages.

    Returns:
        The architecture to compare the file with, and the variant named by the file's own shapes.

    Raises:
        CheckpointError: a size is unknown, or the number of tokens does not fit a square image and no size is
            requested.
        UsageError: unknown variant, or an image size that does not fit the weights.
    """
    width = most_common(leaves, (r"(LayerNorm_\d|layer_norm)/scale$", -1), (r"^stem/kernel$", -1))
    sizes = Sizes(
        width,
        count_numbers(leaves, rf"{BLOCK}(\d{{1,6}})/"),
        most_common(leaves, (r"token_mixing/Dense_0/bias$", -1), (r"token_mixing/Dense_0/kernel$", -1)),
        most_common(leaves, (r"channel_mixing/Dense_0/bias$", -1), (r"channel_mixing/Dense_0/kernel$", -1)),
    )
    tokens = most_common(leaves, (r"token_mixing/Dense_1/bias$", -1), (r"token_mixing/Dense_1/kernel$", -1))
    patch = patch_side(leaves, "stem/kernel", width)
    for what, value, leaf in (
        ("width", width, "stem/kernel"),
        ("depth", sizes.depth, f"{BLOCK}0/…"),
        ("number of tokens", tokens, f"{BLOCK}0/token_mixing/Dense_1/bias"),
    ):
        require_size(file, what, value, leaf)
    found = name = name_variant(sizes, patch)
    if variant != "auto":
        sizes, patch = parse_variant(variant)
        name = name_variant(sizes, patch)
    num_classes = most_common(leaves, (r"^head/bias$", -1), (r"^head/kernel$", -1))
    size = _image_size(tokens, patch, image_size, file)
    return Mixer(
        variant=name, **dataclasses.asdict(sizes), patch_size=patch, image_size=size, num_classes=num_classes
    ), found


def _image_size(tokens: int, patch: int, asked: tuple[int, int] | None, file: pathlib.Path) -> tuple[int, int]:
    """The one size that fits the weights of token mixing: the requested one if it has as many patches, otherwise a
    square."""
    side = math.isqrt(tokens)
    if asked is not None:
        tiled = not any(pixels % patch for pixels in asked)
        if tiled and asked[0] // patch * (asked[1] // patch) == tokens:
            return asked
        own = f"{side * patch}x{side * patch}" if side * side == tokens else f"any of {tokens} patches"
        raise UsageError(
            f"{file}: image_size {asked[0]}x{asked[1]}: a Mixer takes one size, its token mixing has weights for "
            f"{tokens} patches of {patch}x{patch} pixels",
            fix=f"Leave image_size open, or set it to {own}.",
        )
    if side * side != tokens:
        raise CheckpointError(
            f"{file}: token mixing over {tokens} patches, which is not a square grid",
            fix="Set image_size to the (height, width) that the model was trained with.",
        )
    return side * patch, side * patch
