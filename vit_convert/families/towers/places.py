"""Where a tower's canonical parameters are in files of other projects: names and shapes on disk, and the conversion in
both directions.

One table per layout serves both the loader and the writer of random checkpoints.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping

import numpy as np

from vit_convert.checkpoint.containers import Leaf
from vit_convert.families.towers.architecture import Shape

Change = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a canonical parameter is stored.

    Attributes:
        name: of the array on disk.
        shape: of the canonical parameter.
        stored: shape on disk of the whole array.
        read: converts the array on disk to the canonical parameter.
        write: the inverse; for an array in which several parameters are stacked, gives this one's part.
    """

    name: str
    shape: Shape
    stored: Shape
    read: Change
    write: Change


def as_is(name: str, shape: Shape) -> Place:
    """The same numbers in the same order, perhaps without axes of one."""
    return reshaped(name, shape, shape)


def reshaped(name: str, shape: Shape, stored: Shape) -> Place:
    """The same numbers in the same order."""
    return Place(name, shape, stored, lambda array: array.reshape(shape), lambda array: array.reshape(stored))


def torch_linear(name: str, shape: Shape, rows: int) -> Place:
    """A matrix of PyTorch, [outputs, inputs]; of the canonical kernel the first `rows` axes are inputs."""
    inputs, outputs = math.prod(shape[:rows]), math.prod(shape[rows:])
    return Place(
        name, shape, (outputs, inputs), lambda m: m.T.reshape(shape), lambda kernel: kernel.reshape(inputs, outputs).T
    )


def flax_linear(name: str, shape: Shape, rows: int) -> Place:
    """A matrix of Flax, [inputs, outputs]; of the canonical kernel the first `rows` axes are inputs."""
    return reshaped(name, shape, (math.prod(shape[:rows]), math.prod(shape[rows:])))


def torch_convolution(name: str, shape: Shape) -> Place:
    """A convolution's kernel, [outputs, inputs, height, width] on disk."""
    height, width, inputs, outputs = shape
    stored = (outputs, inputs, height, width)
    return Place(name, shape, stored, lambda k: k.transpose(2, 3, 1, 0), lambda kernel: kernel.transpose(3, 2, 0, 1))


def part_of(place: Place, index: int, parts: int) -> Place:
    """One of several parameters stacked in an array, each in the given form."""
    rows = place.stored[0]
    stored = (parts * rows, *place.stored[1:])
    return Place(
        place.name, place.shape, stored, lambda array: place.read(array[index * rows : (index + 1) * rows]), place.write
    )


def stored_shapes(places: Iterable[Place]) -> dict[str, Shape]:
    """Shapes on disk by name."""
    return {place.name: place.stored for place in places}


def taken(leaves: Mapping[str, Leaf], places: Mapping[str, Place]) -> dict[str, Leaf]:
    """Leaves by canonical name, computed when they are read, from stored ones that match `stored_shapes`."""
    return {name: leaves[place.name].derive(place.shape, place.read) for name, place in places.items()}


def written(
    values: Callable[[str, Shape], np.ndarray], places: Mapping[str, Place]
) -> dict[str, tuple[Shape, Callable[[], np.ndarray]]]:
    """The content of a file in this layout, computed on demand: (shape, array) by name on disk.

    Args:
        values: makes a canonical parameter, given its name and shape.
        places: by canonical name.
    """
    parts: dict[str, list[str]] = {}
    for canonical, place in places.items():
        parts.setdefault(place.name, []).append(canonical)

    def stored(names: list[str]) -> np.ndarray:
        arrays = [places[name].write(values(name, places[name].shape)) for name in names]
        return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)

    return {
        name: (places[names[0]].stored, lambda names=names: stored(names))  # type: ignore[misc]
        for name, names in parts.items()
    }
