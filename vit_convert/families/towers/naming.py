"""How projects other than big_vision name the parts of a transformer, and hence where its canonical parameters are on
disk."""

import dataclasses
import math
from collections.abc import Callable, Mapping

from vit_convert.families.towers.architecture import BLOCK, Shape, Tower, leaf_shapes
from vit_convert.families.towers.places import (
    Place,
    as_is,
    flax_linear,
    part_of,
    reshaped,
    torch_convolution,
    torch_linear,
)

ATTENTION = "MultiHeadDotProductAttention_0"
PARTS = ("query", "key", "value")


@dataclasses.dataclass(frozen=True)
class Style:
    """How a framework stores a layer.

    Attributes:
        dot: separator between the parts of a name.
        kernel: name of a layer's matrix.
        scale: name of a norm's factor.
        table: name of an embedding's rows.
        linear: where a matrix is stored, given its name, its canonical shape and how many of its axes are inputs.
        convolution: where a convolution's kernel is stored.
        flat: whether a bias of several heads is stored as one row.
    """

    dot: str
    kernel: str
    scale: str
    table: str
    linear: Callable[[str, Shape, int], Place]
    convolution: Callable[[str, Shape], Place]
    flat: bool = True

    def joined(self, *parts: str) -> str:
        """Joins the parts of a name."""
        return self.dot.join(part for part in parts if part)


TORCH = Style(".", "weight", "weight", "weight", torch_linear, torch_convolution)
FLAX = Style("/", "kernel", "scale", "embedding", flax_linear, as_is)
FLAX_HEADS = Style("/", "kernel", "scale", "embedding", lambda name, shape, _: as_is(name, shape), as_is, flat=False)
"""Of Flax's own attention, whose kernels have an axis for the heads."""


@dataclasses.dataclass(frozen=True)
class Names:
    """A project's names for the parts of a tower.

    Attributes:
        style: how it stores a layer.
        block: of a block's layers, with {} for its number.
        layers: name of each canonical layer within a block; query, key and value of the same name are stacked.
        outer: name of each canonical layer, or single array, outside the blocks.
        arrays: of those in `outer`, the ones that are arrays by themselves, with their shape on disk.
    """

    style: Style
    block: str
    layers: Mapping[str, str]
    outer: Mapping[str, str]
    arrays: Mapping[str, Shape] = dataclasses.field(default_factory=dict)


def stored_tower(tower: Tower, class_row: bool) -> dict[str, Shape]:
    """Canonical shapes as a file stores them: with the class token's row in the position table, if there is one."""
    shapes = leaf_shapes(tower)
    if class_row:
        _, rows, width = shapes["pos_embedding"]
        shapes["pos_embedding"] = (1, rows + 1, width)
    return shapes


def places_of(shapes: Mapping[str, Shape], names: Names) -> dict[str, Place]:
    """Where each canonical parameter is stored.

    Args:
        shapes: from `stored_tower`.
        names: of the project.
    """
    return {canonical: _place(canonical, shape, names) for canonical, shape in shapes.items()}


def _place(canonical: str, shape: Shape, names: Names) -> Place:
    if canonical in names.arrays:
        return reshaped(names.outer[canonical], shape, names.arrays[canonical])
    scope, _, kind = canonical.rpartition("/")
    if canonical.startswith(BLOCK):
        number, _, layer = scope.removeprefix(BLOCK).partition("/")
        where = names.style.joined(names.block.format(number), names.layers[layer])
        fused = names.layers
    else:
        layer, where, fused = scope, names.outer[scope], names.outer
    return _layer(where, kind, layer, shape, names.style, _siblings(layer, fused))


def _siblings(layer: str, names: Mapping[str, str]) -> tuple[int, int]:
    """The index of a layer among those in the same array, and their number: (0, 1) for one by itself."""
    scope, _, part = layer.rpartition("/")
    if part in PARTS and names[f"{scope}/query"] == names[f"{scope}/key"]:
        return PARTS.index(part), len(PARTS)
    return 0, 1


def _layer(where: str, kind: str, layer: str, shape: Shape, style: Style, sibling: tuple[int, int]) -> Place:
    index, parts = sibling
    dot = "_" if parts > 1 else style.dot  # in_proj_weight
    if kind == "bias":
        place = reshaped(f"{where}{dot}bias", shape, (math.prod(shape),) if style.flat else shape)
    elif kind == "scale":
        place = reshaped(style.joined(where, style.scale), shape, shape)
    elif kind == "embedding":
        place = reshaped(style.joined(where, style.table), shape, shape)
    elif len(shape) == 4:
        place = style.convolution(style.joined(where, style.kernel), shape)
    else:
        place = style.linear(f"{where}{dot}{style.kernel}", shape, len(shape) - 1 if layer.endswith("/out") else 1)
    return part_of(place, index, parts) if parts > 1 else place


def attention_names(scope: str, query: str, key: str, value: str, out: str) -> dict[str, str]:
    """Names of the four layers of an attention, by canonical name below `scope`."""
    return {f"{scope}{ATTENTION}/{part}": name for part, name in zip((*PARTS, "out"), (query, key, value, out))}
