"""The layouts that SigLIPs were saved in, told apart and renamed to one. No array is read."""

import enum
import re
from collections.abc import Collection, Mapping

from vit_convert.checkpoint.containers import Leaf
from vit_convert.core.errors import CheckpointError
from vit_convert.families.vit import layouts as vit

FOLDERS = {"image": "img/", "text": "txt/"}
_SCAN = re.compile(r"(img/Transformer|txt/Encoder_0)/encoderblock/")
_ADDED_TABLE = "Encoder_0/pos_embedding"


class Layout(enum.Enum):
    """How a SigLIP's parameters are named on disk."""

    SIGLIP = "siglip"
    """big_vision (2023): `img/Transformer/encoderblock_3/…`, `txt/Encoder_0/encoderblock_3/…`, temperature `t`, bias
    `b`."""

    SIGLIP_SCAN = "siglip_scan"
    """big_vision with `scan=True`, SigLIP 2 (2025): one `encoderblock` whose leaves have a leading layer axis, in
    either tower."""


def detect(names: Collection[str]) -> Layout | None:
    """Tells the layout from the names of all leaves; None where they are no SigLIP's: its loss has a bias beside the
    temperature."""
    if "b" not in names or "t" not in names or not any(name.startswith(("img/", "txt/")) for name in names):
        return None
    return Layout.SIGLIP_SCAN if any(_SCAN.match(name) for name in names) else Layout.SIGLIP


def canonicalize(leaves: Mapping[str, Leaf], tower: str, path: str) -> dict[str, Leaf]:
    """Renames one tower's leaves to the canonical names.

    Args:
        leaves: of the whole file.
        tower: "image" or "text".
        path: the file, for messages.

    Returns:
        Leaves by canonical name; those that belong to nothing keep their own.

    Raises:
        CheckpointError: blocks are missing, stacked leaves disagree about the depth, or two leaves claim one name.
    """
    folder = FOLDERS[tower]
    inner = {name.removeprefix(folder): leaf for name, leaf in leaves.items() if name.startswith(folder)}
    if tower == "image":
        return vit.canonicalize(inner, path)
    added = inner.pop(_ADDED_TABLE, None)
    renamed = {re.sub(r"^Encoder_\d+/", "Transformer/", name): leaf for name, leaf in inner.items()}
    if len(renamed) != len(inner):
        raise CheckpointError(f"{path}: txt/ has two encoders", fix="Save the parameters of one model.")
    found = vit.canonicalize(renamed, path)
    if added is not None:  # text towers from before 2022 had a second table inside the encoder
        second, table = added.as_float32(), found["pos_embedding"].as_float32()
        found["pos_embedding"] = table.derive(table.shape, lambda value: value + second.read())
    return found


def stored_name(canonical: str, tower: str, layout: Layout) -> str:
    """The name of a canonical parameter on disk, without prefix; for a stacked layout that of the whole stack."""
    stacked = layout is Layout.SIGLIP_SCAN
    name = vit.stored_name(canonical, vit.Layout.BIG_VISION_SCAN if stacked else vit.Layout.BIG_VISION)
    return FOLDERS[tower] + (name if tower == "image" else name.replace("Transformer/", "Encoder_0/"))
