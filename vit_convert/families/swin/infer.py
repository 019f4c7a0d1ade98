"""Infers a Swin from the shapes of its leaves and a config.json beside them."""

import dataclasses
import json
import math
import operator
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from vit_convert.checkpoint.containers import Leaf
from vit_convert.checkpoint.match import require_blocks
from vit_convert.checkpoint.vote import count_numbers, most_common
from vit_convert.core.errors import CheckpointError, UsageError, nearest
from vit_convert.families.swin.architecture import (
    PATCH,
    PUBLISHED,
    SIZE_OF_WINDOW,
    SIZES,
    Sizes,
    Swin,
    name_variant,
    tiles,
)

_SPELLING = re.compile(r"(?:Swin-)?(?P<letter>[A-Za-z]+)(?:[/_](?P<window>[1-9]\d*))?")
_LONG = re.compile(r"(?:swin_)?(?P<word>tiny|small|base|large)_patch4_window(?P<window>\d+)(?:_\d+)?")
_LAYER = r"(?:encoder\.)?layers\."


@dataclasses.dataclass(frozen=True)
class Beside:
    """The content of a config.json of transformers or timm in the file's folder; empty without one.

    Attributes:
        image_size: (height, width) in pixels.
        norm_epsilon: of every LayerNorm.
        activation: of the MLPs.
    """

    image_size: tuple[int, int] | None = None
    norm_epsilon: float | None = None
    activation: str = "gelu"


def read_beside(file: pathlib.Path) -> Beside:
    """Reads the config.json beside a checkpoint; one that is not a Swin's belongs to another file, and is ignored.

    Raises:
        CheckpointError: it cannot be read, or contradicts this definition of Swin.
    """
    path = file.with_name("config.json")
    if not path.is_file():
        return Beside()
    try:
        record: dict[str, Any] = dict(json.loads(path.read_text(encoding="utf-8")))
        if not str(record.get("model_type", record.get("architecture"))).startswith("swin"):
            return Beside()
        size = record.get("image_size", record.get("pretrained_cfg", {}).get("input_size"))
        epsilon = record.get("layer_norm_eps")
        return Beside(_sides(size), None if epsilon is None else _epsilon(epsilon), _activation(record, path))
    except (OSError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RecursionError) as e:
        raise CheckpointError(
            f"{path}: cannot be read ({e})", fix="Repair it or move it away: it is read whenever it exists."
        ) from e


def _sides(size: Any) -> tuple[int, int] | None:
    """224, [224, 224] or timm's [3, 224, 224] as (height, width)."""
    if size is None:
        return None
    sides = [size, size] if isinstance(size, int) else list(size)[-2:]
    height, width = (operator.index(side) for side in sides)
    if min(height, width) < 1:
        raise ValueError(f"image_size {size!r}")
    return height, width


def _epsilon(value: Any) -> float:
    """With an epsilon of 1 or more, nothing would remain of the normalised values."""
    if not 0 <= float(value) < 1:
        raise ValueError(f"layer_norm_eps {value!r}")
    return float(value)


def _activation(record: Mapping[str, Any], path: pathlib.Path) -> str:
    activation = record.get("hidden_act", "gelu")
    if activation != "gelu":
        raise CheckpointError(f"{path}: hidden_act {activation!r}, but this Swin uses the erf GELU, 'gelu'")
    return str(activation)


def parse_variant(text: str) -> tuple[Sizes, int]:
    """Reads any spelling of a variant.

    Args:
        text: "Swin-T/7", "Swin-T" or "swin_tiny_patch4_window7_224".

    Returns:
        Its row, and the side of a window in tokens (7 if the name does not say).

    Raises:
        UsageError: no such variant.
    """
    if long := _LONG.fullmatch(text):
        return SIZES[long["word"][0].upper()], int(long["window"])
    match = _SPELLING.fullmatch(text)
    if match is None or match["letter"] not in SIZES:
        raise UsageError(
            f"variant {text!r}: no Swin.{nearest(text, PUBLISHED)}",
            fix=f"Use Swin-, one of {', '.join(SIZES)}, a slash and the window, such as Swin-T/7.",
        )
    return SIZES[match["letter"]], int(match["window"] or 7)


def infer_architecture(
    leaves: Mapping[str, Leaf], variant: str, image_size: tuple[int, int] | None, file: pathlib.Path
) -> tuple[Swin, str]:
    """Reads the sizes from the shapes, then lets a given variant overrule them.

    Args:
        leaves: by name on disk, from `layouts.inner_leaves`.
        variant: a variant's name, or "auto".
        image_size: requested (height, width) in pixels; None for what config.json says, or else follows from the
            window.
        file: for messages, and to find config.json.

    Returns:
        The architecture to compare the file with, and the variant named by the file's own shapes.

    Raises:
        CheckpointError: nothing tells a size, or blocks are missing.
        UsageError: unknown variant, or an image size that the windows do not tile.
    """
    numbered = rf"{_LAYER}(\d{{1,3}})\.blocks\."
    require_blocks(leaves, numbered, "stage", str(file))
    stages = [rf"{_LAYER}{stage}\.blocks\." for stage in range(count_numbers(leaves, numbered))]
    for number, stage in enumerate(stages):
        require_blocks(leaves, rf"{stage}(\d{{1,4}})\.", f"stage {number}'s block", str(file))
    depths = tuple(count_numbers(leaves, rf"{stage}(\d{{1,4}})\.") for stage in stages)
    table = r".*relative_position_bias_table$"
    heads = tuple(most_common(leaves, (f"^{stage}{table}", 1)) for stage in stages)
    rows = most_common(leaves, (f"^{_LAYER}{table}", 0))
    width = most_common(leaves, (r"^(patch_embed\.(norm|proj)|embeddings\.(norm|.*projection))\.", 0))
    side = math.isqrt(rows)
    # splits each stage's width into its heads
    splits = all(number and (width << stage) % number == 0 for stage, number in enumerate(heads))
    if not depths or 0 in depths or not splits or width < 1 or side * side != rows or side % 2 == 0:
        raise CheckpointError(
            f"{file}: stages of {depths} blocks and {heads} heads, width {width}, bias tables of {rows} rows: no Swin",
            fix="Save the model's parameters whole, under the names its project uses.",
        )
    sizes, window = Sizes(width, depths, heads), (side + 1) // 2
    found = name = name_variant(sizes, window)
    if variant != "auto":
        sizes, window = parse_variant(variant)
        name = name_variant(sizes, window)
    beside = read_beside(file)
    size = _image_size(image_size or beside.image_size, window, len(sizes.depths), file)
    num_classes = most_common(
        leaves, (r"^(head|head\.fc|classifier)\.bias$", 0), (r"^(head|head\.fc|classifier)\.weight$", 0)
    )
    epsilon = 1e-5 if beside.norm_epsilon is None else beside.norm_epsilon
    return Swin(name, sizes.width, sizes.depths, sizes.num_heads, window, size, num_classes, epsilon), found


def _image_size(asked: tuple[int, int] | None, window: int, num_stages: int, file: pathlib.Path) -> tuple[int, int]:
    if asked is None and window not in SIZE_OF_WINDOW:
        raise UsageError(
            f"{file}: windows of {window} do not tell the image size", fix="Set image_size, such as 224x224."
        )
    size = asked or (SIZE_OF_WINDOW[window], SIZE_OF_WINDOW[window])
    if not tiles(size, window, num_stages):
        step = PATCH * 2 ** (num_stages - 1) * window
        raise UsageError(
            f"{file}: image_size {size[0]}x{size[1]}: a Swin takes one size, its windows of {window} tokens tile "
            f"multiples of {step}",
            fix=f"Leave image_size open, or set it to a multiple of {step} pixels.",
        )
    return size
