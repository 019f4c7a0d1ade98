"""What a user's own model returns: arrays by name, however they are packed, and which of them is judged."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from vit_convert.core.errors import ExportError, UsageError

BARE = ""  # the name of an array returned by itself


@dataclasses.dataclass(frozen=True)
class Choice:
    """Which outputs of a model are converted.

    Attributes:
        names: the name in the graph, by the name from `named`; the judged one first.
        left_out: for each of the others, why.
    """

    names: dict[str, str]
    left_out: dict[str, str]

    @property
    def judged(self) -> str:
        """The name in the graph of the output that checks, top-1 and engines use."""
        return next(iter(self.names.values()))


def named(result: Any) -> dict[str, Any]:
    """Takes a model's result apart.

    Args:
        result: an array; or a dictionary, named tuple, dataclass, tuple, list or any pytree of such, nested or not.

    Returns:
        {name: array}, with "/" between levels, in the order of the result. An array by itself, or alone in a tuple, is
        BARE; those of a tuple or list are output_0, output_1, …; (array, dictionary) is BARE and the dictionary's
        names.

    Raises:
        UsageError: something in it is not an array, or two have the same name.
    """
    if _is_plain(result) and len(result) == 2 and _is_leaf(result[0]) and isinstance(result[1], Mapping):
        pairs = [(BARE, result[0]), *_walk(result[1], ())]
    elif _is_plain(result):
        parts = result if len(result) != 1 else [result[0]]
        names = [(f"output_{i}",) if len(parts) > 1 else () for i in range(len(parts))]
        pairs = [pair for part, name in zip(parts, names) for pair in _walk(part, name)]
    else:
        pairs = list(_walk(result, ()))
    found: dict[str, Any] = {}
    for name, value in pairs:
        if not hasattr(value, "dtype") or not hasattr(value, "shape"):
            raise UsageError(
                f"the model's output {name!r} is a {type(value).__name__}, not an array", fix="Return only arrays."
            )
        if name in found:
            raise UsageError(f"the model has two outputs named {name!r}", fix="Name each of them otherwise.")
        found[name] = value
    if not found:
        raise UsageError(f"the model returns no array but a {type(result).__name__}", fix="Return an array [batch, …].")
    return found


def _is_plain(value: Any) -> bool:
    return type(value) in (tuple, list)


def _is_leaf(value: Any) -> bool:
    return value is not None and _fields(value) is None


def _fields(value: Any) -> Mapping[Any, Any] | None:
    """The content of a container, by name; None for anything else."""
    if isinstance(value, Mapping):
        return value
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return value._asdict()
    if isinstance(value, tuple | list):
        return dict(enumerate(value))
    if isinstance(value, jax.Array | jax.ShapeDtypeStruct):
        return None
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    children = jax.tree_util.tree_flatten_with_path(value, is_leaf=lambda inner: inner is not value)[0]
    if len(children) == 1 and children[0][1] is value:
        return None
    return {
        str(getattr(path[0], "key", getattr(path[0], "name", getattr(path[0], "idx", path[0])))): child
        for path, child in children
    }


def _walk(value: Any, path: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    if value is None:
        return
    fields = _fields(value)
    if fields is None:
        yield "/".join(path) or BARE, value
        return
    for key, child in fields.items():
        yield from _walk(child, (*path, str(key)))


def choose(shapes: Mapping[int, Mapping[str, Any]], asked: str, taken: Sequence[str] = ()) -> Choice:
    """Chooses the output to judge, and keeps the others that can be compared.

    Args:
        shapes: by batch size, the result of `named` for a batch: anything with a shape and a dtype.
        asked: `config.outputs`: the name of the output to judge, or to give to an array returned by itself.
        taken: names that no output can have.

    Returns:
        The Choice.

    Raises:
        UsageError: there are several and none has the requested name, or one has the name of something else.
        ExportError: the judged output does not hold one result per image.
    """
    names = list(next(iter(shapes.values())))
    if BARE in names:
        chosen = BARE
    elif asked in names:
        chosen = asked
    elif len(names) == 1 and asked == "logits":  # the default, not requested by the user
        chosen = names[0]
    else:
        raise UsageError(
            f"config.outputs={asked!r}: the model returns {', '.join(names)}",
            fix=f'Say which is judged: config.outputs = "{names[0]}".',
        )
    wrong = {name: why for name in names if (why := _wrong(name, shapes))}
    if chosen in wrong:
        raise ExportError(
            f"config.model: the output {asked if chosen == BARE else chosen} {wrong[chosen]}",
            fix="Return scores, float, as [batch, …]: one result for each image, whatever the batch size.",
        )
    kept = {
        chosen: asked if chosen == BARE else chosen,
        **{name: name for name in names if name != chosen and name not in wrong},
    }
    for name in kept.values():
        if name in taken or list(kept.values()).count(name) > 1:
            raise UsageError(f"the model's output {name!r} is called like another tensor", fix="Rename it.")
    return Choice(kept, wrong)


def without_copies(choice: Choice, values: Sequence[Any], names: Sequence[str]) -> Choice:
    """Drops outputs that are the same array as another, which already has a name in the graph.

    Args:
        choice: from `choose`.
        values: the variable of each output in a jaxpr: the same object for the same array.
        names: of the values.
    """
    value_of = dict(zip(names, values))
    first = {id(value_of[name]): name for name in reversed(choice.names)}
    copies = {
        name: f"is {choice.names[first[id(value_of[name])]]} again"
        for name in choice.names
        if first[id(value_of[name])] != name
    }
    kept = {own: name for own, name in choice.names.items() if own not in copies}
    return Choice(kept, {**choice.left_out, **copies})


def _wrong(name: str, shapes: Mapping[int, Mapping[str, Any]]) -> str:
    """Why an output cannot be compared image by image; "" if it can."""
    first = next(iter(shapes.values()))[name]
    if not jnp.issubdtype(first.dtype, jnp.floating):
        return f"is {first.dtype}, not floating-point"
    for batch, outputs in shapes.items():
        shape = outputs[name].shape
        if not shape:
            return "is a single number"
        if shape[0] != batch or shape[1:] != first.shape[1:] or 0 in shape:
            return f"has shape {tuple(shape)} for a batch of {batch}"
    return ""
