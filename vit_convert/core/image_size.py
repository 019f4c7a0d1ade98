"""Image sizes as people write them: one size, or the range of a dynamic graph."""

import contextlib
import dataclasses
import operator
import re
from collections.abc import Sequence
from typing import Any

from vit_convert.core.errors import UsageError
from vit_convert.core.record import Record

Size = tuple[int, int]  # (height, width) in pixels
NoSize = tuple[()]  # of a model that takes no images
LARGEST_SIDE = 16_384  # pixels; the attention of a million patches fits no GPU


@dataclasses.dataclass(frozen=True)
class ImageRange(Record):
    """The image sizes that a dynamic graph takes: multiples of the patch size from `smallest` to `largest`,
    independently for each side.

    Attributes:
        smallest: (height, width) in pixels.
        optimal: (height, width) that engines are tuned for and that images are decoded to.
        largest: (height, width) in pixels.
    """

    smallest: Size
    optimal: Size
    largest: Size

    def sizes(self) -> list[Size]:
        """Three sizes to check: the optimal, the smallest, and one that is not square if the range has one."""
        tall = (self.largest[0], self.optimal[1] if self.optimal[1] != self.largest[0] else self.smallest[1])
        return list(dict.fromkeys((self.optimal, self.smallest, tall)))

    def __str__(self) -> str:
        smallest, optimal, largest = (f"{size[0]}x{size[1]}" for size in (self.smallest, self.optimal, self.largest))
        return f"{smallest} to {largest}, tuned for {optimal}"


def parse_size(value: Any) -> Size | None:
    """Reads one size.

    Args:
        value: 224, (224, 384), "224" or "224x384"; None or "" for no size.

    Returns:
        (height, width), or None for no size.

    Raises:
        UsageError: it cannot be read as one or two positive numbers.
    """
    if value is None or (isinstance(value, str) and not value):
        return None
    numbers: Any = (
        re.findall(r"\d+", value)
        if isinstance(value, str) and re.fullmatch(r"\s*\d+(\s*[x,]\s*\d+)?\s*", value)
        else value
    )
    with contextlib.suppress(TypeError):  # not one whole number, but perhaps two
        numbers = numbers if isinstance(numbers, bool) else [operator.index(numbers)]
    try:
        # 223.9 is not a size, and must not become 223
        sizes = [operator.index(n) if not isinstance(n, str) else int(n) for n in numbers]
    except (TypeError, ValueError):
        sizes = []
    _require_bounded(value, sizes)
    if len(sizes) not in (1, 2) or min(sizes) < 1:
        raise UsageError(f"config.image_size={value!r}: expected 224, (224, 384), '224x384' or 'dynamic:160..448'")
    return (sizes[0], sizes[-1])


def _require_bounded(value: Any, sides: Sequence[int]) -> None:
    if any(side > LARGEST_SIDE for side in sides):
        raise UsageError(f"config.image_size={value!r}: a side has at most {LARGEST_SIDE} pixels")


def is_range(value: Any) -> bool:
    """Whether a range of sizes is asked for."""
    return isinstance(value, str) and value.strip().startswith("dynamic")


def parse_range(value: str, default: Size | None = None) -> ImageRange:
    """Reads a range of sizes.

    Args:
        value: "dynamic:160..448", with "160x128" for sides that differ, and perhaps "@224" for the optimal size.
        default: the optimal size if the value names none; None takes the smallest.

    Returns:
        The range.

    Raises:
        UsageError: it cannot be read, the sizes do not rise, or the optimal one lies outside.
    """
    side = r"\s*(\d+)(?:x(\d+))?\s*"
    match = re.fullmatch(rf"dynamic:{side}\.\.{side}(?:@{side})?", value.strip())
    if match is None:
        raise UsageError(
            f"config.image_size={value!r}: expected 'dynamic:160..448', 'dynamic:160x128..448x640' or "
            "'dynamic:160..448@224'"
        )
    groups = match.groups()
    given = [(int(height), int(width or height)) for height, width in zip(groups[::2], groups[1::2]) if height]
    _require_bounded(value, [side for size in given for side in size])
    smallest, largest = given[:2]
    optimal = given[2] if len(given) == 3 else default or smallest
    if smallest == largest or min(smallest) < 1 or any(low > high for low, high in zip(smallest, largest)):
        raise UsageError(f"config.image_size={value!r}: the second size must lie above the first")
    if any(not low <= best <= high for low, best, high in zip(smallest, optimal, largest)):
        whose = "the size after @" if len(given) == 3 else "the checkpoint's own size"
        raise UsageError(
            f"config.image_size={value!r}: {whose}, {optimal[0]}x{optimal[1]}, lies outside the range",
            fix="Name the size that the engine is tuned for inside it: 'dynamic:160..448@224'.",
        )
    return ImageRange(smallest, optimal, largest)


def check_image_size(image_size: tuple[int, int], patch_size: int) -> None:
    """Refuses an image size that the patches do not tile.

    Args:
        image_size: (height, width) in pixels.
        patch_size: side of a patch in pixels.

    Raises:
        UsageError: a side is not a positive multiple of the patch size.
    """
    if any(side < patch_size or side % patch_size for side in image_size):
        tiled = tuple(max(1, round(side / patch_size)) * patch_size for side in image_size)
        raise UsageError(
            f"image_size {image_size[0]}x{image_size[1]}: not a multiple of the patch size {patch_size}",
            fix=f"The nearest that is: {tiled[0]}x{tiled[1]}.",
        )
