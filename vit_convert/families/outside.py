"""A family from outside the package: what its own code raises becomes a message that names the family and the line."""

import contextlib
import dataclasses
import enum
import os
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from vit_convert.checkpoint.containers import Leaf
from vit_convert.core.errors import ExportError
from vit_convert.core.model import Model
from vit_convert.core.user_code import user_code
from vit_convert.families.family import Asked, Family, Loaded, RandomOptions


def guarded(family: Any, place: str) -> Family:
    """The family with its methods guarded.

    Args:
        family: has all the parts of a `Family`, or of a `TowerFamily`.
        place: where it is from, for messages: "my_family.py:FAMILY".
    """
    return (_OutsideTowers if hasattr(family, "towers") else _Outside)(family, place)


class _Outside:
    """See `families.family.Family`; each method may also raise an ExportError with what the family's code raised."""

    def __init__(self, family: Any, place: str):
        self._family, self._place = family, place
        self.name: str = family.name
        self.layouts: tuple[str, ...] = tuple(family.layouts)
        self.variants: tuple[str, ...] = tuple(family.variants)

    def match(self, names: Collection[str]) -> Any:
        """See `Family`."""
        with self._own_code("match"):
            layout = self._family.match(names)
            return layout if layout is None else _checked(layout, enum.Enum)

    def load(self, leaves: Mapping[str, Leaf], layout: Any, asked: Asked) -> Loaded:
        """See `Family`."""
        with self._own_code("load"):
            return _checked(self._family.load(leaves, layout, asked), Loaded)

    def model(self, loaded: Loaded) -> Model:
        """See `Family`."""
        with self._own_code("model"):
            model = _checked(self._family.model(loaded), Model)

        def run(*inputs: np.ndarray) -> dict[str, np.ndarray]:
            with self._own_code("Model.run"):
                return model.run(*inputs)

        return dataclasses.replace(model, run=run)

    def has_variant(self, variant: str) -> bool:
        """See `Family`."""
        with self._own_code("has_variant"):
            return bool(self._family.has_variant(variant))

    def write_random(self, path: str | os.PathLike[str], variant: str, options: RandomOptions) -> str:
        """See `Family`."""
        with self._own_code("write_random"):
            return str(self._family.write_random(path, variant, options))

    def _own_code(self, part: str) -> contextlib.AbstractContextManager[None]:
        return user_code(f"config.families: {part} of {self._place}", ExportError)


class _OutsideTowers(_Outside):
    """See `families.family.TowerFamily`."""

    def towers(self, names: Collection[str], layout: Any) -> tuple[str, ...]:
        """See `TowerFamily`."""
        with self._own_code("towers"):
            return tuple(self._family.towers(names, layout))


def _checked(found: Any, kind: type) -> Any:
    if not isinstance(found, kind):
        raise TypeError(f"it returned a {type(found).__name__}, not a {kind.__name__}")
    return found
