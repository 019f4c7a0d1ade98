"""The registered families: a checkpoint belongs to the first one that matches."""

import enum
import importlib
import importlib.util
import pathlib
import re
import sys
from collections.abc import Collection, Sequence
from typing import Any

from vit_convert.checkpoint.select import few_of
from vit_convert.core.bundle import hash_file, hash_value
from vit_convert.core.errors import CheckpointError, UsageError, nearest
from vit_convert.core.user_code import user_code
from vit_convert.families.clip.family import CLIP
from vit_convert.families.family import Family, TowerFamily
from vit_convert.families.hybrid.family import HYBRID
from vit_convert.families.lit.family import LIT
from vit_convert.families.mixer.family import MIXER
from vit_convert.families.outside import guarded
from vit_convert.families.siglip.family import SIGLIP
from vit_convert.families.swin.family import SWIN
from vit_convert.families.tips.family import TIPS
from vit_convert.families.vit.family import VIT
from vit_convert.families.vlm.family import VLM

# A hybrid also has a ViT's leaves; towers are recognised before the others.
FAMILIES: tuple[Family, ...] = (HYBRID, MIXER, SWIN, VIT, SIGLIP, CLIP, LIT, VLM, TIPS)

# Recognised only in order to refuse them by name: (patterns that must all match some leaf, what it is, whether it has
# an image tower).
_OTHERS = (
    ((r"img/", r"llm/"), "a vision-language model (PaliGemma)", True),
    ((r"img/", r"txt/"), "an image tower and a text tower (SigLIP, LiT or CLIP)", True),
    ((r"img/",), "an image tower under img/ (CLIPPO)", True),
    ((r"(visual|text)/.*resblocks\.",), "scenic's CLIP", False),
    ((r"vision_model[/.]|(vit|deit|dinov2)[/.](embeddings|encoder)",), "a transformers (Hugging Face) model", False),
    (
        (r"(visual\.)?(blocks|layers|transformer\.resblocks)\.\d+\.|visual\.conv1\.|cls_token$",),
        "a PyTorch state dict",
        False,
    ),
)
_PARTS = ("name", "layouts", "variants", "match", "load", "model", "has_variant", "write_random")


def families(extra: Sequence[str] = ()) -> tuple[Family, ...]:
    """All families, those from outside the package first.

    Args:
        extra: `config.families`: "my_package.my_module:FAMILY", or "/path/to/my_family.py:FAMILY".

    Returns:
        The families. What the code of one from outside raises becomes an ExportError with its line.

    Raises:
        UsageError: there is no such module or object, or it is not a family.
    """
    return (*(_imported(place) for place in extra), *FAMILIES)


def code_of(extra: Sequence[str]) -> list[str]:
    """Identifies the version of the code of families from outside, without running it if it is a file.

    Args:
        extra: see `families`.

    Returns:
        A hash for each: of its file, or, within a package, of all files in the module's folder.

    Raises:
        UsageError: there is no such file or module.
    """
    return [_hashed(place) for place in extra]


def family_named(name: str, known: Sequence[Family]) -> Family:
    """Looks up a family.

    Raises:
        UsageError: no family has that name.
    """
    names = [family.name for family in known]
    if name not in names:
        raise UsageError(f"family {name!r}: unknown.{nearest(name, names)}", fix=f"Use auto or {', '.join(names)}.")
    return known[names.index(name)]


def family_of(
    names: Collection[str], path: str, *, asked: str = "auto", known: Sequence[Family] = FAMILIES
) -> tuple[Family, enum.Enum]:
    """Recognises the family of a checkpoint by the names of its leaves.

    Args:
        names: of its leaves, as `select` returned them.
        path: the file, for messages.
        asked: name of the family to which it must belong; "auto" for any.
        known: from `families`.

    Returns:
        The family, and the layout.

    Raises:
        CheckpointError: it belongs to no family, or to an unsupported one, which the message names.
        UsageError: there is no family of the name asked for.
    """
    wanted = known if asked == "auto" else (family_named(asked, known),)
    outside = len(known) - len(FAMILIES)
    for family in wanted:
        if family in known[:outside] and (layout := family.match(names)) is not None:
            return family, layout
    _refuse_others(names, path, known, towers=True)
    for family in wanted:
        if not isinstance(family, TowerFamily) and (layout := family.match(names)) is not None:
            return family, layout
    _refuse_others(names, path, known, towers=False)
    supported = f"Supported: {', '.join(family.name for family in known)}."
    what = "no known layout" if asked == "auto" else f"no layout of family {asked}"
    raise CheckpointError(f"{path}: {what}; it holds {few_of(names)}", fix=supported)


def tower_family_of(
    names: Collection[str], *, asked: str = "auto", known: Sequence[Family] = FAMILIES
) -> tuple[Family, enum.Enum, tuple[str, ...]] | None:
    """Recognises the family of a checkpoint with image and text towers; None if it is something else.

    Args:
        names: of all its leaves, without "params/".
        asked: name of the family to which it must belong; "auto" for any.
        known: from `families`.

    Returns:
        The family, the layout, and which of "image" and "text" the file has.

    Raises:
        UsageError: there is no family of the name asked for.
    """
    for family in known if asked == "auto" else (family_named(asked, known),):
        if isinstance(family, TowerFamily) and (layout := family.match(names)) is not None:
            return family, layout, family.towers(names, layout)
    return None


def _refuse_others(names: Collection[str], path: str, known: Sequence[Family], *, towers: bool) -> None:
    for patterns, found, tower in _OTHERS:
        if tower is towers and all(any(re.match(pattern, name) for name in names) for pattern in patterns):
            supported = f"Supported: {', '.join(family.name for family in known)}."
            fix = f"Append ':img' to convert only the image tower: {path}:img." if tower else supported
            raise CheckpointError(f"{path}: {found}, which is not supported", fix=fix)


def _imported(place: str) -> Family:
    module, _, name = place.rpartition(":")
    if not module or not name.isidentifier():
        raise UsageError(
            f"config.families: {place!r} is not module:OBJECT",
            fix="Write my_module:FAMILY, or /path/my_family.py:FAMILY.",
        )
    with user_code(f"config.families: {place}", UsageError):
        found = getattr(_module(module), name)
    if missing := [part for part in _PARTS if not hasattr(found, part)]:
        raise UsageError(
            f"config.families: {place} has no {', '.join(missing)}", fix="See families/family.py for what a family is."
        )
    return guarded(found, place)


def _hashed(place: str) -> str:
    module = place.rpartition(":")[0]
    with user_code(f"config.families: {place}", UsageError):
        if module.endswith(".py"):
            return hash_file(module)
        spec = importlib.util.find_spec(module)
        if spec is None or not spec.has_location or spec.origin is None:
            return module  # created in memory, or missing, which `families` reports
        file = pathlib.Path(spec.origin)
        return hash_value([hash_file(path) for path in (sorted(file.parent.glob("*.py")) if spec.parent else [file])])


def _module(place: str) -> Any:
    if not place.endswith(".py"):
        return importlib.import_module(place)
    # A name that no module has. Registered, because dataclasses and Flax look up names in annotations in the module of
    # their class.
    spec = importlib.util.spec_from_file_location(f"vit_convert_family_{pathlib.Path(place).stem}", place)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
