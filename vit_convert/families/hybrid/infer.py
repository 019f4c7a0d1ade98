"""Infers a hybrid from the shapes of its leaves, and checks image sizes."""

import dataclasses
import pathlib
import re
from collections.abc import Mapping

from vit_convert.checkpoint.containers import Leaf
from vit_convert.checkpoint.match import require_size
from vit_convert.checkpoint.vote import count_numbers, most_common
from vit_convert.core.errors import CheckpointError, UsageError, nearest
from vit_convert.families.hybrid.architecture import (
    GROUPS,
    HYBRIDS,
    PUBLISHED,
    Hybrid,
    Row,
    feature_size,
    name_variant,
    stride_of,
)
from vit_convert.families.vit.architecture import Architecture
from vit_convert.families.vit.infer import infer_architecture as infer_trunk
from vit_convert.families.vit.variants import WIDTHS, Width

_SPELLING = re.compile(r"(?P<resnet>R\d*)[+_](?:ViT-)?(?P<letters>[A-Za-z]+)[/_](?P<patch>\d+)")


def parse_variant(text: str) -> tuple[str, Row]:
    """Reads any spelling of a variant.

    Args:
        text: "R26+ViT-S/32", "R26+ViT-S_32" or AugReg's "R26_S_32".

    Returns:
        Its name in `HYBRIDS`, and its row.

    Raises:
        UsageError: no such variant.
    """
    match = _SPELLING.fullmatch(text)
    name = f"{match['resnet']}+ViT-{match['letters']}/{match['patch']}" if match else text
    if name not in HYBRIDS:
        raise UsageError(
            f"variant {text!r}: no hybrid.{nearest(name, PUBLISHED)}", fix=f"Use one of {', '.join(PUBLISHED)}."
        )
    return name, HYBRIDS[name]


def infer_architecture(leaves: Mapping[str, Leaf], variant: str, file: pathlib.Path) -> tuple[Hybrid, str]:
    """Reads the sizes from the shapes, then lets a given variant overrule them.

    Args:
        leaves: by canonical name.
        variant: a variant's name, or "auto".
        file: for messages.

    Returns:
        The architecture to compare the file with, its image size still open; and the variant named by the file's own
        shapes.

    Raises:
        CheckpointError: a size is unknown, or the stem's channels do not form whole groups.
        UsageError: unknown variant.
    """
    trunk, _ = infer_trunk(leaves, "auto")
    num_stages = count_numbers(leaves, r"stage_(\d{1,3})/")
    stages = tuple(count_numbers(leaves, rf"stage_{stage + 1}/block_(\d{{1,3}})/") for stage in range(num_stages))
    root_width = most_common(leaves, (r"^gn_root/", -1), (r"^conv_root/kernel$", -1))
    found = name = name_variant(stages, trunk.patch_size, _letters(trunk))
    if variant != "auto":
        name, row = parse_variant(variant)
        stages = row.stages
        trunk = dataclasses.replace(trunk, patch_size=row.patch_size, **dataclasses.asdict(WIDTHS[row.letters]))
    for what, size, leaf in (
        ("width", trunk.width, "embedding/kernel"),
        ("depth", trunk.depth, "Transformer/encoderblock_0/…"),
        ("mlp_dim", trunk.mlp_dim, "Transformer/encoderblock_0/MlpBlock_3/Dense_0/kernel"),
        ("num_heads", trunk.num_heads, "Transformer/encoderblock_0/MultiHeadDotProductAttention_1/query/kernel"),
        ("stem", root_width, "conv_root/kernel"),
        *((f"stage {i}", units, f"block{i}/unit1/…") for i, units in enumerate(stages, 1)),
    ):
        require_size(file, what, size, leaf)
    if root_width % GROUPS:
        raise CheckpointError(f"{file}: a stem of {root_width} channels, which are no {GROUPS} groups")
    trunk = dataclasses.replace(trunk, family="vit", variant=name)
    return Hybrid(name, stages, (0, 0), trunk, root_width), found


def check_image_size(size: tuple[int, int], stages: tuple[int, ...], patch: int) -> None:
    """Refuses an image size whose feature map the patches do not tile.

    Raises:
        UsageError: see above; names the nearest size that works.
    """
    features = feature_size(size, stages)
    if any(side < patch or side % patch for side in features):
        step = patch * stride_of(stages)
        near = tuple(max(1, round(side / step)) * step for side in size)
        raise UsageError(
            f"image_size {size[0]}x{size[1]}: a feature map of {features[0]}x{features[1]}, which patches of {patch} "
            "do not tile",
            fix=f"The nearest that they do: {near[0]}x{near[1]}.",
        )


def _letters(trunk: Architecture) -> str:
    sizes = Width(trunk.width, trunk.depth, trunk.mlp_dim, trunk.num_heads)
    return next((letters for letters, row in WIDTHS.items() if row == sizes), "")
