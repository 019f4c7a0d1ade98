"""Strict loading, whatever the family: everything present, nothing left over, every shape right, every number
counted."""

import dataclasses
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping

from vit_convert.checkpoint.containers import Leaf
from vit_convert.core.errors import CheckpointError

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Expected:
    """What a file has to hold.

    Attributes:
        file: for messages.
        variant: name of the model that it is held against.
        shapes: of every parameter by canonical name, in the model's order.
        num_params: their number, counted in another way than by adding up `shapes`.
        stored_name: maps a canonical name to the one on disk, for messages.
        found: the variant that the file's own shapes say, where another one was asked for; "" where none was.
    """

    file: pathlib.Path
    variant: str
    shapes: Mapping[str, Shape]
    num_params: int
    stored_name: Callable[[str], str]
    found: str = ""


def require_match(leaves: Mapping[str, Leaf], expected: Expected) -> None:
    """Holds leaves against a model, and raises for the first difference in the model's order.

    Args:
        leaves: by canonical name.
        expected: the model.

    Raises:
        CheckpointError: a leaf is missing, has another shape or belongs to nothing; names it, both shapes and how many
            more there are.
    """
    wrong, missing, transposed = [], [], set()
    for name, shape in expected.shapes.items():
        if name not in leaves:
            missing.append(f"{expected.stored_name(name)}: missing, variant {expected.variant} needs {shape}.")
        elif leaves[name].shape != shape:
            wrong.append(
                f"{leaves[name].name}: checkpoint {leaves[name].shape}, variant {expected.variant} needs {shape}."
            )
            transposed.add(sorted(leaves[name].shape) == sorted(shape))
    extra = [
        f"{leaf.name}: belongs to no part of variant {expected.variant}."
        for name, leaf in leaves.items()
        if name not in expected.shapes
    ]
    if problems := wrong + missing + extra:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise CheckpointError(
            f"{expected.file}: {problems[0]}{_hint(expected, transposed == {True})}{more}", fix=_fix(expected)
        )
    if (stored := sum(leaf.size for leaf in leaves.values())) != expected.num_params:
        raise CheckpointError(
            f"{expected.file}: checkpoint {stored} parameters, variant {expected.variant} has {expected.num_params}"
        )


def require_blocks(names: Iterable[str], pattern: str, what: str, path: str) -> None:
    """Refuses a file that lacks a block before the last one that it has, or has none.

    Args:
        names: of its leaves.
        pattern: what the name of a block's leaf begins with; group 1 is the block's number.
        what: a block is called, for the message.
        path: the file.

    Raises:
        CheckpointError: so it is; names the first that are missing.
    """
    found = {int(match[1]) for name in names if (match := re.match(pattern, name))}
    last = max(found, default=0)
    # So many as there are, and one more where one lies beyond: a number that nobody has makes no list of all below it.
    if missing := [i for i in range(len(found) + (last >= len(found))) if i not in found]:
        listed, there = ", ".join(map(str, missing)), f"blocks up to {last} found" if found else "no block found"
        raise CheckpointError(
            f"{path}: {what} {listed} missing, {there}", fix="Fetch the file again, or save it whole."
        )


def require_size(file: pathlib.Path, what: str, size: int, leaf: str) -> None:
    """Refuses a file that lacks every leaf which would tell a size of its model.

    Args:
        file: for messages.
        what: the size is called.
        size: as the leaves tell it, 0 where none does.
        leaf: the first one that would.

    Raises:
        CheckpointError: nothing tells the size.
    """
    if size < 1:
        raise CheckpointError(
            f"{file}: nothing tells the model's {what}, {leaf} is missing or empty",
            fix="Save the model's parameters whole, under the names its project uses.",
        )


def _hint(expected: Expected, transposed: bool) -> str:
    if expected.found not in ("", "custom", expected.variant):
        return f" Did you mean {expected.found}?"
    return " It looks transposed." if transposed else ""


def _fix(expected: Expected) -> str:
    if expected.found:
        return "Set variant to the checkpoint's, or to auto."
    return "Save the model's parameters, whole and nothing else, under the names its project uses."
