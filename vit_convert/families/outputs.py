"""Which of the outputs that a model has it is to give, and what each is."""

import os
from collections.abc import Mapping, Sequence

from vit_convert.core.config import read_outputs
from vit_convert.core.errors import UsageError
from vit_convert.core.signature import Dim, Output

_JUDGES = {"logits": "top1", "embedding": "embedding"}


def settle_outputs(
    asked: str, offered: Sequence[str], file: str | os.PathLike[str], what: str = "this model"
) -> tuple[str, ...]:
    """The outputs that a model gets.

    Args:
        asked: `Asked.outputs`.
        offered: what it has; the first is what it is for.
        file: for messages.
        what: the model is called.

    Returns:
        At least one of those that it has; the first stands for the model where one number is shown.

    Raises:
        UsageError: one is asked for that it has not.

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
    """The outputs of a model as its signature has them.

    Args:
        names: from `settle_outputs`.
        shapes: of each without the batch.

    Example:
        >>> outputs_of(["logits"], {"logits": (10,)})[0].judge
        'top1'
    """
    return tuple(Output(name, "float32", ("batch", *shapes[name]), judge=_JUDGES.get(name, "cosine")) for name in names)
