"""Where vision-language models store their image tower, and what each does with its tokens. No array is read."""

import dataclasses
import enum
from collections.abc import Collection, Mapping

from vit_convert.checkpoint.containers import Leaf


class Layout(enum.Enum):
    """Which project saved the model."""

    PALIGEMMA = "paligemma"
    """big_vision's PaliGemma (2024): `img/` beside `llm/`."""

    OPENPI = "openpi"
    """Physical Intelligence's pi0 and pi0.5 (2024): `PaliGemma/img/` beside the heads of its actions; where the
    released
    tree was a Flax NNX state, every name ends in `/value`."""

    GEMMA3 = "gemma3"
    """Google DeepMind's Gemma 3 (2025), flat: `SigLiPFromPatches_0/siglip_encoder/`."""

    GEMMA3_NESTED = "gemma3_nested"
    """The same, nested: `vision_encoder/siglip_encoder/`."""


@dataclasses.dataclass(frozen=True)
class Form:
    """What a layout says about its image tower.

    Attributes:
        folder: of the tower.
        beside: distinguishes the layout from a tower saved by itself; "" if the folder is enough.
        pool: "none" for a vector per patch, "avg4" for the mean of each 4 x 4.
        stacked: whether its blocks are usually one stack.
    """

    folder: str
    beside: str
    pool: str
    stacked: bool


FORMS = {
    Layout.PALIGEMMA: Form("img/", "llm/", "none", True),
    Layout.OPENPI: Form("PaliGemma/img/", "", "none", True),
    Layout.GEMMA3: Form("SigLiPFromPatches_0/siglip_encoder/", "", "avg4", False),
    Layout.GEMMA3_NESTED: Form("vision_encoder/siglip_encoder/", "", "avg4", False),
}


def detect(names: Collection[str]) -> Layout | None:
    """Recognises the layout by the names of all leaves; None if it is none of these."""
    for layout, form in FORMS.items():
        starts = (form.folder, form.beside) if form.beside else (form.folder,)
        if all(any(name.startswith(start) for name in names) for start in starts):
            return layout
    return None


def without_value(leaves: Mapping[str, Leaf]) -> dict[str, Leaf]:
    """Leaves without the `/value` at the end of every name in an NNX state; other names are unchanged."""
    ended = all(name.endswith("/value") for name in leaves)
    return {name.removesuffix("/value") if ended else name: leaf for name, leaf in leaves.items()}
