"""Distinguishes the layouts in which SigLIPs were saved, and renames them to a single one. No array is read."""

import enum
import re
from collections.abc import Collection, Mapping

from vit_convert.checkpoint.containers import Leaf
from vit_convert.families.towers import big_vision
from vit_convert.families.towers.big_vision import image_leaves, text_leaves
from vit_convert.families.vit import layouts as vit

FOLDERS = {"image": "img/", "text": "txt/"}
_TRANSFORMERS = ("vision_model.head.", "text_model.head.", "logit_bias")
_SCAN = re.compile(r"(img/Transformer|txt/Encoder_0)/encoderblock/")


class Layout(enum.Enum):
    """How a SigLIP's parameters are named on disk."""

    SIGLIP = "siglip"
    """big_vision (2023): `img/Transformer/encoderblock_3/…`, `txt/Encoder_0/encoderblock_3/…`, temperature `t`, bias
    `b`."""

    SIGLIP_SCAN = "siglip_scan"
    """big_vision with `scan=True`, SigLIP 2 (2025): one `encoderblock` whose leaves have a leading layer axis, in
    either tower."""

    TRANSFORMERS = "siglip_transformers"
    """transformers: `vision_model.encoder.layers.3.self_attn.q_proj.weight`, `text_model.…`, `logit_bias`."""

    CLIPPO = "clippo"
    """big_vision's CLIPPO (2023): `img/` with a head, and the temperature `t`; it reads texts as pictures of them."""


def detect(names: Collection[str]) -> Layout | None:
    """Recognises the layout by the names of all leaves; None if they are not a SigLIP's.

    Its loss has a bias besides the temperature; CLIPPO has neither the bias nor a text tower.
    """
    if any(name.startswith(_TRANSFORMERS) for name in names):
        return Layout.TRANSFORMERS
    folders = {name.partition("/")[0] for name in names}
    if not folders & {"img", "txt"} or "t" not in names:
        return None
    if "b" not in names:
        return Layout.CLIPPO if folders == {"img", "t"} else None
    return Layout.SIGLIP_SCAN if any(_SCAN.match(name) for name in names) else Layout.SIGLIP


def canonicalize(leaves: Mapping[str, Leaf], tower: str, path: str) -> dict[str, Leaf]:
    """Picks one tower's leaves from those of the file and gives them canonical names; see `towers.big_vision`."""
    if tower == "text":
        return text_leaves(leaves, FOLDERS[tower], path)
    kernel = "img/embedding/kernel"
    if not is_naflex(leaves):
        return image_leaves(leaves, FOLDERS[tower], path)
    rest = {name: leaf for name, leaf in leaves.items() if name != kernel}
    return {**image_leaves(rest, FOLDERS[tower], path), "embedding/kernel": leaves[kernel]}


def is_naflex(leaves: Mapping[str, Leaf]) -> bool:
    """Whether the image tower takes patches of images of any aspect, in which case its patch embedding is a matrix."""
    return "img/embedding/kernel" in leaves and len(leaves["img/embedding/kernel"].shape) == 2


def stored_name(canonical: str, tower: str, layout: Layout) -> str:
    """The name of a canonical parameter on disk, without prefix; for a stacked layout that of the whole stack."""
    form = vit.Layout.BIG_VISION_SCAN if layout is Layout.SIGLIP_SCAN else vit.Layout.BIG_VISION
    return big_vision.stored_name(canonical, tower, FOLDERS[tower], form)
