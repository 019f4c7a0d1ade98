"""Strict loading for any family: everything present, nothing left over, every shape right, every number counted."""

import dataclasses
import difflib
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping

from vit_convert.checkpoint.containers import Leaf
from vit_convert.core.errors import CheckpointError

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Expected:
    """What a file must hold.

    Attributes:
        file: for messages.
        variant: name of the model that it is compared with.
        shapes: of every parameter by canonical name, in the model's order.
        num_params: their number, computed independently of `shapes`.
        stored_name: maps a canonical name to the one on disk, for messages.
        found: the variant that the file's own shapes imply, if another one was asked for; otherwise "".
    """

    file: pathlib.Path
    variant: str
    shapes: Mapping[str, Shape]
    num_params: int
    stored_name: Callable[[str], str]
    found: str = ""


def require_match(leaves: Mapping[str, Leaf], expected: Expected) -> None:
    """Compares leaves with a model, and raises for the first difference in the model's order.

    Args:
        leaves: by canonical name.
        expected: the model.

    Raises:
        CheckpointError: a leaf is missing, has the wrong shape or belongs to nothing; names it, both shapes and the
            number of further differences.
    """
    wrong: list[str] = []
    missing: list[str] = []
    transposed: set[bool] = set()
    unknown = [leaf for name, leaf in leaves.items() if name not in expected.shapes]
    for name, shape in expected.shapes.items():
        if name not in leaves:
            on_disk = expected.stored_name(name)
            like = "" if missing else _renamed(on_disk, [leaf.name for leaf in unknown if leaf.shape == shape])
            missing.append(f"{on_disk}: missing, variant {expected.variant} needs {shape}.{like}")
        elif leaves[name].shape != shape:
            wrong.append(
                f"{leaves[name].name}: checkpoint {leaves[name].shape}, variant {expected.variant} needs {shape}."
            )
            transposed.add(sorted(leaves[name].shape) == sorted(shape))
    extra = [f"{leaf.name}: belongs to no part of variant {expected.variant}." for leaf in unknown]
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
    """Refuses a file without any block, or without one of the blocks before its last.

    Args:
        names: of its leaves.
        pattern: matches the beginning of the name of a block's leaf; group 1 is the block's number.
        what: name of a block in messages.
        path: the file.

    Raises:
        CheckpointError: blocks are missing; names the first of them.
    """
    found = {int(match[1]) for name in names if (match := re.match(pattern, name))}
    last = max(found, default=0)
    # Look no further than the count of blocks, plus one if the last lies beyond: an absurd number makes no long list.
    if missing := [i for i in range(len(found) + (last >= len(found))) if i not in found]:
        listed, there = ", ".join(map(str, missing)), f"blocks up to {last} found" if found else "no block found"
        raise CheckpointError(
            f"{path}: {what} {listed} missing, {there}", fix="Fetch the file again, or save it whole."
        )


def require_size(file: pathlib.Path, what: str, size: int, leaf: str) -> None:
    """Refuses a file without any leaf from which a size of its model could be inferred.

    Args:
        file: for messages.
        what: name of the size in the message.
        size: inferred from the leaves; 0 if impossible.
        leaf: the first one from which it could be.

    Raises:
        CheckpointError: the size is unknown.
    """
    if size < 1:
        raise CheckpointError(
            f"{file}: nothing tells the model's {what}, {leaf} is missing or empty",
            fix="Save the model's parameters whole, under the names its project uses.",
        )


def _renamed(missing: str, unknown: list[str]) -> str:
    """What a leaf may be called in the file, if one that belongs to nothing has nearly its name."""
    close = difflib.get_close_matches(missing, unknown, n=1, cutoff=0.8)
    return f" Is it {close[0]}, which has that shape?" if close else ""


def _hint(expected: Expected, transposed: bool) -> str:
    if expected.found not in ("", "custom", expected.variant):
        return f" Did you mean {expected.found}?"
    return " It looks transposed." if transposed else ""


def _fix(expected: Expected) -> str:
    if expected.found:
        return "Set variant to the checkpoint's, or to auto."
    return "Save the model's parameters, whole and nothing else, under the names its project uses."
