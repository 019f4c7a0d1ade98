"""Distinguishes the layouts in which Mixers were saved, and renames them to a single one. No array is read."""

import enum
import re
from collections.abc import Collection, Mapping

from vit_convert.checkpoint.containers import Leaf
from vit_convert.checkpoint.match import require_blocks
from vit_convert.core.errors import CheckpointError
from vit_convert.families.mixer.architecture import BLOCK

_OLD_BLOCK = "Mixer/encoderblock_"
_OLD_OUTER = {"Mixer/encoder_norm/": "pre_head_layer_norm/", "embedding/": "stem/"}
_DENSE = {"kernel1": "Dense_0/kernel", "bias1": "Dense_0/bias", "kernel2": "Dense_1/kernel", "bias2": "Dense_1/bias"}
_PHASE = re.compile(r"(?P<mixing>token_mixing|channel_mixing)_phase_\d+/(?P<leaf>kernel1|bias1|kernel2|bias2)")
_NORM = re.compile(r"(?P<block>.*encoderblock_\d{1,6}/)LayerNorm_(?P<number>\d{1,6})/(?P<leaf>.+)")


class Layout(enum.Enum):
    """How a Mixer's parameters are named on disk."""

    MIXER = "mixer"
    """vit_jax and big_vision since 2021: `MixerBlock_3/token_mixing/Dense_0/kernel`."""

    MIXER_OLD = "mixer_old"
    """Before Linen: everything in `Mixer/encoderblock_3`, an MLP's four arrays in `token_mixing_phase_0` with axes of
    one beside their own, the patch embedding called `embedding`; one counter numbers the LayerNorms with what stands
    between them. big_vision/models/mlp_mixer.py still reads it."""


def detect(names: Collection[str]) -> Layout | None:
    """Recognises the layout by the names of the leaves; None if they are not a Mixer's."""
    if any(name.startswith("Mixer/") for name in names):
        return Layout.MIXER_OLD
    return Layout.MIXER if any(re.match(rf"{BLOCK}\d+/", name) for name in names) else None


def canonicalize(leaves: Mapping[str, Leaf], layout: Layout, path: str) -> dict[str, Leaf]:
    """Renames leaves to the canonical names.

    Args:
        leaves: by their names on disk, without prefix.
        layout: of the file.
        path: the file, for messages.

    Returns:
        Leaves by canonical name; those that belong to nothing keep their own.

    Raises:
        CheckpointError: blocks are missing, or two leaves claim one name.
    """
    norms = sorted({int(match["number"]) for name in leaves if (match := _NORM.fullmatch(name))})
    renamed: dict[str, Leaf] = {}
    for name, leaf in leaves.items():
        canonical = _new_name(name, norms) if layout is Layout.MIXER_OLD else name
        if canonical in renamed:
            raise CheckpointError(f"{path}: {leaf.name} and {renamed[canonical].name} are the same parameter")
        renamed[canonical] = _squeezed(leaf) if _PHASE.search(name) else leaf
    require_blocks(renamed, rf"{BLOCK}(\d{{1,6}})/", "Mixer block", path)
    return renamed


def stored_name(canonical: str, layout: Layout) -> str:
    """The name of a canonical parameter on disk, without prefix: the inverse of `canonicalize`.

    Args:
        canonical: such as "MixerBlock_3/token_mixing/Dense_0/kernel".
        layout: of the file.

    Returns:
        Such as "Mixer/encoderblock_3/token_mixing_phase_0/kernel1".
    """
    if layout is Layout.MIXER:
        return canonical
    for old, new in _OLD_OUTER.items():
        if canonical.startswith(new):
            return old + canonical.removeprefix(new)
    name = re.sub(rf"^{BLOCK}", _OLD_BLOCK, canonical).replace("LayerNorm_1/", "LayerNorm_2/")
    for old, new in _DENSE.items():
        name = name.replace(f"_mixing/{new}", f"_mixing_phase_0/{old}")
    return name


def _new_name(name: str, norms: list[int]) -> str:
    for old, new in _OLD_OUTER.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    if match := _NORM.fullmatch(name):  # LayerNorm_0 and _1, or _0 and _2: by position, not by their literal numbers
        name = f"{match['block']}LayerNorm_{norms.index(int(match['number']))}/{match['leaf']}"
    name = _PHASE.sub(lambda match: f"{match['mixing']}/{_DENSE[match['leaf']]}", name)
    return re.sub(rf"^{_OLD_BLOCK}", BLOCK, name)


def _squeezed(leaf: Leaf) -> Leaf:
    shape = tuple(side for side in leaf.shape if side != 1)
    return leaf if shape == leaf.shape else leaf.derive(shape, lambda array: array.reshape(shape))
