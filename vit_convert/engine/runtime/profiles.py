"""Selects the optimization profile for a batch: a fixed one of that size, else the tightest range, else the next larger
size with padding."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from vit_convert.core.errors import BenchmarkError, BuildError
from vit_convert.core.signature import Tensor
from vit_convert.core.text_length import Sizes, sides_of

Shape = tuple[int, ...]
Profile = Mapping[str, tuple[Shape, Shape, Shape]]


@dataclasses.dataclass(frozen=True)
class ShapeRange:
    """The shapes that an optimization profile accepts.

    Attributes:
        smallest: input shape, batch first.
        optimal: the shape that the profile was tuned for.
        largest: input shape.
    """

    smallest: Shape
    optimal: Shape
    largest: Shape

    @property
    def fixed(self) -> bool:
        """Whether it accepts a single shape."""
        return self.smallest == self.largest

    def accepts(self, shape: Shape) -> bool:
        """Whether a shape lies within the range."""
        return len(shape) == len(self.smallest) and all(
            low <= size <= high for low, size, high in zip(self.smallest, shape, self.largest)
        )


def batch_profiles(inputs: Sequence[Tensor], image_size: Sizes, batch: Mapping[str, Any]) -> list[Profile]:
    """Optimization profiles over the batch: one for each fixed size, then the range; each covers all image sizes of a
    dynamic graph.

    Args:
        inputs: of the graph.
        image_size: (height, width) in pixels, or the range of sizes or lengths that a dynamic graph takes; () if it
            takes no images, and texts of one length.
        batch: {"min", "opt", "max", "profiles": sizes that get a fixed profile}.

    Returns:
        For each profile, by input, (smallest, optimal, largest shape).

    Raises:
        BuildError: an input has a side that varies and is neither the batch, nor the height or width of images, nor the
            length of texts.
    """
    sizes = [sides_of(image_size, at) for at in ("smallest", "optimal", "largest")]
    triples = dict.fromkeys(
        [*((size, size, size) for size in batch["profiles"]), (batch["min"], batch["opt"], batch["max"])]
    )
    return [
        {
            tensor.name: tuple(_shape(tensor, count, size) for count, size in zip(triple, sizes))  # type: ignore[misc]
            for tensor in inputs
        }
        for triple in triples
    ]


def _shape(tensor: Tensor, batch: int, varying: Mapping[str, int]) -> Shape:
    known: dict[int | str, int] = {**dict(varying.items()), tensor.shape[0]: batch}
    sides = [side if isinstance(side, int) else known.get(side) for side in tensor.shape]
    found = tuple(side for side in sides if side is not None)
    if len(found) != len(sides):
        raise BuildError(
            f"{tensor.name} {list(tensor.shape)}: a side that nothing tells the size of",
            fix="Export it with a fixed size.",
        )
    return found


@dataclasses.dataclass(frozen=True)
class Choice:
    """How to run one batch.

    Attributes:
        index: of the optimization profile.
        shape: input shape to run; its batch may be larger than the given one.
    """

    index: int
    shape: Shape


def choose_profile(ranges: Sequence[ShapeRange], shape: Shape) -> Choice:
    """Chooses the profile for an input shape.

    A fixed profile comes before a range, and a tighter range before a wider one. If none accepts the batch, it is
    padded to the smallest batch that a profile starts with.

    Args:
        ranges: the engine's profiles, in order.
        shape: of the input, batch first; the batch at most `largest_batch(ranges, shape)`.

    Returns:
        The choice.

    Raises:
        BenchmarkError: no profile takes the shape.
    """
    fitting = [i for i, candidate in enumerate(ranges) if candidate.accepts(shape)]
    if fitting:
        best = min(
            fitting,
            key=lambda i: (not ranges[i].fixed, ranges[i].largest[0] - ranges[i].smallest[0], ranges[i].largest, i),
        )
        return Choice(best, shape)
    padded = [
        i
        for i, candidate in enumerate(ranges)
        if shape[0] < candidate.smallest[0] and candidate.accepts(_padded(candidate, shape))
    ]
    if not padded:
        raise BenchmarkError(
            f"input {list(shape)}: the engine takes {describe(ranges)}", fix="Build a profile for this shape."
        )
    best = min(padded, key=lambda i: (ranges[i].smallest[0], not ranges[i].fixed, i))
    return Choice(best, _padded(ranges[best], shape))


def largest_batch(ranges: Sequence[ShapeRange], shape: Shape, name: str = "input") -> int:
    """The largest batch that any profile takes for images of a shape; larger ones must be split.

    Args:
        ranges: the engine's profiles.
        shape: of the input, batch first.
        name: of the input, for messages.

    Raises:
        BenchmarkError: no profile takes images of this shape.
    """
    sizes = [r.largest[0] for r in ranges if r.accepts((r.largest[0], *shape[1:]))]
    if not sizes:
        raise BenchmarkError(
            f"{name} {list(shape)}: the engine takes {describe(ranges)}",
            fix="Resize the images, cut or pad the texts, or build for them.",
        )
    return max(sizes)


def describe(ranges: Sequence[ShapeRange]) -> str:
    """ "[1, 224, 224, 3] to [64, 224, 224, 3], or [256, 224, 224, 3]"."""
    return ", or ".join(f"{list(r.largest)}" if r.fixed else f"{list(r.smallest)} to {list(r.largest)}" for r in ranges)


def _padded(candidate: ShapeRange, shape: Shape) -> Shape:
    return (candidate.smallest[0], *shape[1:])
