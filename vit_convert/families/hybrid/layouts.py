"""The layouts in which hybrids were saved: a ViT's leaves, in any of its layouts, beside those of a ResNet. No array is
read."""

import re
from collections.abc import Collection, Mapping

import numpy as np

from vit_convert.checkpoint.containers import Leaf
from vit_convert.families.hybrid.architecture import STANDARDIZE_EPSILON
from vit_convert.families.vit import layouts as trunk

_RESNET = re.compile(r"(conv_root|gn_root|block\d{1,6}/unit\d{1,6})/")
_UNIT = re.compile(r"block(?P<stage>\d+)/unit(?P<unit>\d+)/")
_OURS = re.compile(r"stage_(?P<stage>\d+)/block_(?P<block>\d+)/")
_NORM = re.compile(r"gn(\d+|_root|_proj)/(scale|bias)$")
_CONV = re.compile(r"conv(\d+|_root|_proj)/kernel$")


def is_hybrid(names: Collection[str]) -> bool:
    """Whether leaves of these names are a hybrid's."""
    return any(_RESNET.match(name) for name in names)


def detect(names: Collection[str]) -> trunk.Layout | None:
    """Recognises the layout of the trunk by the names of the leaves (see there for the eras); None if they are not a
    hybrid's."""
    return trunk.detect([name for name in names if not _RESNET.match(name)]) if is_hybrid(names) else None


def canonicalize(leaves: Mapping[str, Leaf], path: str) -> dict[str, Leaf]:
    """Renames leaves to the canonical names, and folds the weight standardisation into the convolutions.

    `block2/unit1` becomes `stage_2/block_0`, so that no bottleneck has the name of an encoder block.

    GroupNorm's leaves are [1, 1, 1, C] in the published files: Flax stored them in this form before 0.3.6
    (google/flax#1721).

    Args:
        leaves: by their names on disk, without prefix.
        path: the file, for messages.

    Returns:
        Leaves by canonical name; the position table keeps the class token's row.

    Raises:
        CheckpointError: see the ViT's `canonicalize`.
    """
    renamed = trunk.canonicalize({name: leaf for name, leaf in leaves.items() if not _RESNET.match(name)}, path)
    for name, leaf in leaves.items():
        if not _RESNET.match(name):
            continue
        if _NORM.search(name) and leaf.shape[:3] == (1, 1, 1) and len(leaf.shape) == 4:
            leaf = leaf.derive(leaf.shape[3:], np.ravel)
        elif _CONV.search(name) and len(leaf.shape) == 4:
            leaf = leaf.as_float32().derive(leaf.shape, standardize)
        renamed[_UNIT.sub(lambda match: f"stage_{match['stage']}/block_{int(match['unit']) - 1}/", name)] = leaf
    return renamed


def standardize(kernel: np.ndarray) -> np.ndarray:
    """A kernel with mean 0 and standard deviation 1 for each output, as computed by vit_jax's StdConv on every call.

    It does not depend on the input, so it is computed once, in float64, at no cost to the graph and to precision in
    FP16. The epsilon is added to the standard deviation (vit_jax/models_resnet.py, weight_standardize), not to the
    variance.

    Args:
        kernel: [height, width, inputs, outputs].

    Returns:
        float32 of the same shape.
    """
    wide = kernel.astype(np.float64)
    wide = wide - wide.mean((0, 1, 2))
    return (wide / (wide.std((0, 1, 2)) + STANDARDIZE_EPSILON)).astype(np.float32)


def stored_name(canonical: str, layout: trunk.Layout) -> str:
    """The name of a canonical parameter on disk, without prefix."""
    if match := _OURS.match(canonical):
        return f"block{match['stage']}/unit{int(match['block']) + 1}/{canonical[match.end() :]}"
    return canonical if _RESNET.match(canonical) else trunk.stored_name(canonical, layout)
