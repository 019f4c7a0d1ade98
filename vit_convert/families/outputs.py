"""Selects which of its outputs a model gives, and describes each."""

import os
from collections.abc import Mapping, Sequence

from vit_convert.core.config import read_outputs
from vit_convert.core.errors import UsageError
from vit_convert.core.signature import Dim, Output

_JUDGES = {"logits": "top1", "embedding": "embedding"}


def settle_outputs(
    asked: str, offered: Sequence[str], file: str | os.PathLike[str], what: str = "this model"
) -> tuple[str, ...]:
    """Selects a model's outputs.

    Args:
        asked: `Asked.outputs`.
        offered: those that it has, its main output first.
        file: for messages.
        what: name of the model in messages.

    Returns:
        At least one of its outputs; the first represents the model where a single number is shown.

    Raises:
        UsageError: an output is requested that it lacks.

    Example:
        >>> settle_outputs("auto", ["logits", "features"], "a.npz")
        ('logits',)
    """
    names = read_outputs(asked) or offered[:1]
    if missing := [name for name in names if name not in offered]:
        *most, last = offered
        has = f"{', '.join(most)} or {last}" if most else last
        raise UsageError(f"{file}: outputs={asked!r}: {what} has no {missing[0]}, but {has}", fix=f"Use {has}.")
    return tuple(names)


def outputs_of(names: Sequence[str], shapes: Mapping[str, tuple[Dim, ...]]) -> tuple[Output, ...]:
    """The outputs of a model for its signature.

    Args:
        names: from `settle_outputs`.
        shapes: of each output, without the batch.

    Example:
        >>> outputs_of(["logits"], {"logits": (10,)})[0].judge
        'top1'
    """
    return tuple(Output(name, "float32", ("batch", *shapes[name]), judge=_JUDGES.get(name, "cosine")) for name in names)
