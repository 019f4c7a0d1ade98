"""What a family accepts: names of variants, and options of random checkpoints."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from vit_convert.core.errors import UsageError
from vit_convert.families.family import RandomOptions


def is_variant(parse: Callable[[str], Any], variant: str) -> bool:
    """Whether a family's own parser of variants accepts a name; it raises UsageError if it does not."""
    try:
        parse(variant)
    except UsageError:
        return False
    return True


OF_TOWERS = ("towers", "length", "text_head")  # which mean nothing to a model with one input


def refuse_options(family: str, options: RandomOptions, without: Sequence[str]) -> None:
    """Refuses options that a family does not support.

    Args:
        family: its name, for the message.
        options: the requested ones.
        without: names of the options that have no meaning for it.

    Raises:
        UsageError: one of these is not at its default.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(options)}
    for name in without:
        if (value := getattr(options, name)) != defaults[name]:
            raise UsageError(f"{name}={value!r}: has no meaning for family {family}", fix=f"Leave {name} out.")
