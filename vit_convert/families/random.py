"""Writes a full-size checkpoint with seeded random weights, in a layout of published files.

For tests and benchmarks in which the names, shapes and magnitudes of the weights matter, but not their values:

    python -m vit_convert.families.random --variant=B/32 --output=B32.npz
    python -m vit_convert.families.random --variant=S/16-gap-norep --layout=big_vision_scan --output=S16.npz
    python -m vit_convert.families.random --variant=Swin-T/7 --output=swin_t.safetensors
    python -m vit_convert.families.random --variant=B/16 --outlier_channels=4 --output=B16-outliers.npz
    python -m vit_convert.families.random --families=my_family.py:FAMILY --variant=Mine-S/16 --output=mine.npz
"""

import dataclasses
import os
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags

from vit_convert.checkpoint.draw import DTYPES
from vit_convert.core.errors import UsageError, nearest
from vit_convert.core.program import Program
from vit_convert.families.family import Family, RandomOptions
from vit_convert.families.registry import FAMILIES, family_named
from vit_convert.families.registry import families as known_families


def write_random_checkpoint(
    path: str | os.PathLike[str], variant: str, *, family: str = "auto", families: Sequence[str] = (), **options: Any
) -> str:
    """Writes a checkpoint of a variant, using its family's writer.

    Args:
        path: the file; appears whole or not at all.
        variant: such as "B/32" or "ViT-S_16-gap-norep".
        family: of the variant; "auto" for the first family with a variant of that name.
        families: further ones, see `registry.families`.
        options: see `RandomOptions`.

    Returns:
        The variant's name.

    Raises:
        UsageError: there is no such family, no family has the variant, or an option has no meaning for it.
    """
    known = known_families(families)
    found = _family_of(variant, known) if family == "auto" else family_named(family, known)
    asked = RandomOptions(**options)
    if asked.layout and asked.layout not in found.layouts:
        raise UsageError(
            f"layout {asked.layout!r}: {found.name} has "
            f"{', '.join(found.layouts)}.{nearest(asked.layout, found.layouts)}",
            fix="Leave it out for the usual one.",
        )
    return found.write_random(path, variant, asked)


def _family_of(variant: str, known: Sequence[Family]) -> Family:
    for family in known:
        if family.has_variant(variant):
            return family
    names = [name for family in known for name in family.variants]
    raise UsageError(
        f"variant {variant!r}: unknown.{nearest(variant.replace('_', '/'), names)}",
        fix=f"Use one of {', '.join(names)}.",
    )


_PROGRAM = Program(__doc__, when_interrupted="nothing was written")
_FLAGS = _PROGRAM.flags
_shared: dict[str, Any] = {"flag_values": _FLAGS}
_DEFAULTS = RandomOptions()
_VARIANTS = ", ".join(name for family in FAMILIES for name in family.variants)
_LAYOUTS = dict.fromkeys(layout for family in FAMILIES for layout in family.layouts)
flags.DEFINE_string("variant", "", f"What to write: {_VARIANTS}, mu/16 (tiny), or any width/patch.", **_shared)
flags.DEFINE_string("output", "", "The file to write.", **_shared)
flags.DEFINE_string(
    "family", "auto", f"Family of the variant: {', '.join(family.name for family in FAMILIES)}.", **_shared
)
flags.DEFINE_list("families", [], "More families, as in config.families: my_module:FAMILY,mine.py:FAMILY.", **_shared)
flags.DEFINE_integer("seed", _DEFAULTS.seed, "Seed of the weights.", lower_bound=0, **_shared)
flags.DEFINE_list(
    "image_size", None, "Image size in pixels: one number, or height,width; by default the variant's.", **_shared
)
flags.DEFINE_integer("num_classes", _DEFAULTS.num_classes, "Outputs of the head; 0 for none.", lower_bound=0, **_shared)
flags.DEFINE_integer("depth", None, "Blocks; by default the variant's.", lower_bound=1, **_shared)
flags.DEFINE_string(
    "layout", "", f"How the parameters are named: {', '.join(_LAYOUTS)}; by default the family's usual one.", **_shared
)
flags.DEFINE_string("prefix", "", "Put in front of every name: params/ or opt/target/.", **_shared)
flags.DEFINE_enum("dtype", _DEFAULTS.dtype, list(DTYPES), "How the values are stored.", **_shared)
flags.DEFINE_enum("pool", None, ["tok", "gap", "map"], "Pooling; by default what the variant's name says.", **_shared)
flags.DEFINE_enum("posemb", _DEFAULTS.posemb, ["learn", "sincos2d"], "sincos2d stores no position table.", **_shared)
flags.DEFINE_bool("pre_logits", False, "Add the tanh layer before the head.", **_shared)
flags.DEFINE_integer(
    "outlier_channels",
    0,
    "Even number of channels in which the residual stream reaches about 1.4e3.",
    lower_bound=0,
    **_shared,
)
flags.DEFINE_enum(
    "towers", _DEFAULTS.towers, ["", "image", "text"], "Write one tower of two; by default both.", **_shared
)
flags.DEFINE_integer("length", None, "Tokens per text; by default the variant's.", lower_bound=2, **_shared)
flags.DEFINE_bool("text_head", True, "For a text tower: write the product after its pooling.", **_shared)
_OPTIONS = (
    "family",
    "families",
    *(field.name for field in dataclasses.fields(RandomOptions) if field.name != "image_size"),
)


def main(argv: Sequence[str]) -> int:
    """Writes the checkpoint that the command line describes; returns the exit code."""
    return _PROGRAM.main(argv, _write)


def _write(argv: Sequence[str]) -> int:
    if words := _PROGRAM.parse(argv[1:]):
        raise UsageError(f"unexpected argument {words[0]!r}", fix="--help lists the flags.")
    for name in ("variant", "output"):
        if not _FLAGS[name].value:
            raise UsageError(
                f"no --{name} given", fix="For example --variant=B/32 --output=B32.npz; --help tells more."
            )
    size = _FLAGS.image_size
    if size is not None and not (1 <= len(size) <= 2 and all(side.isdecimal() for side in size)):
        raise UsageError(
            f"--image_size={','.join(size)}: neither one number nor height,width", fix="For example --image_size=224."
        )
    options: dict[str, Any] = {name: _FLAGS[name].value for name in _OPTIONS}
    options["image_size"] = (int(size[0]), int(size[-1])) if size else None
    variant = write_random_checkpoint(_FLAGS.output, _FLAGS.variant, **options)
    print(f"{_FLAGS.output}: {variant}, {os.path.getsize(_FLAGS.output):,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
