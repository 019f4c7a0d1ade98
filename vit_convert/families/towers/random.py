"""What the writers of random towers share."""

import dataclasses
from collections.abc import Mapping
from typing import TypeVar

from vit_convert.core.errors import UsageError
from vit_convert.families.towers.architecture import Tower

_Tower = TypeVar("_Tower", bound=Tower)


def sized(tower: _Tower, depth: int | None) -> _Tower:
    """The tower with this many blocks; None leaves it unchanged."""
    return (
        tower if depth is None else dataclasses.replace(tower, encoder=dataclasses.replace(tower.encoder, depth=depth))
    )


def wanted(towers: Mapping[str, Tower], named: str) -> dict[str, Tower]:
    """Both towers, or the one that `RandomOptions.towers` names.

    Raises:
        UsageError: there is none of that name.
    """
    if named not in ("", *towers):
        raise UsageError(f"towers={named!r}: neither image nor text", fix="Leave it out for both.")
    return {kind: tower for kind, tower in towers.items() if named in ("", kind)}
