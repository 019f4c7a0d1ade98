"""What the writers of random towers share."""

import dataclasses
from typing import TypeVar

from vit_convert.families.towers.architecture import Tower

_Tower = TypeVar("_Tower", bound=Tower)


def sized(tower: _Tower, depth: int | None) -> _Tower:
    """The tower with so many blocks; None leaves it as it is."""
    return (
        tower if depth is None else dataclasses.replace(tower, encoder=dataclasses.replace(tower.encoder, depth=depth))
    )
