"""Combines requests that Triton hands over together into one batch, and splits the result."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from vit_convert.core.errors import BenchmarkError
from vit_convert.serve.triton.models.common import answer, array_of, refusal

Arrays = Mapping[str, np.ndarray]


def require_finite(inputs: Arrays) -> None:
    """Refuses values that would silently spoil an answer.

    Args:
        inputs: by name, [batch, …].

    Raises:
        BenchmarkError: NaN or infinity, with the input and the place in the batch.
    """
    for name, values in inputs.items():
        if values.dtype.kind != "f" or np.isfinite(values).all():
            continue
        place = int(np.argmin(np.isfinite(values.reshape(len(values), -1)).all(axis=1)))
        raise BenchmarkError(
            f"{name}: NaN or infinity at place {place} of {len(values)}",
            fix="Preprocess the images as the bundle says.",
        )


def answer_together(
    requests: Sequence[Any], names: Sequence[str], run: Callable[[Arrays], Arrays], most: int
) -> list[Any]:
    """Runs requests with inputs of the same shape as one batch, and returns each one's part.

    Args:
        requests: of Triton's Python backend.
        names: of the inputs.
        run: maps {input: [batch, …]} to {output: [batch, …]}.
        most: the largest batch to run at once.

    Returns:
        One response for each request, in their order.
    """
    responses: dict[int, Any] = {}
    groups: dict[Any, list[tuple[int, Arrays]]] = {}
    for place, request in enumerate(requests):
        try:
            inputs = {name: array_of(request, name) for name in names}
            require_finite(inputs)
            groups.setdefault(tuple(value.shape[1:] for value in inputs.values()), []).append((place, inputs))
        except Exception as e:
            responses[place] = refusal(e)
    for members in groups.values():
        for part in _parts(members, most):
            responses |= _run(part, names, run)
    return [responses[place] for place in range(len(requests))]


def _parts(members: Sequence[tuple[int, Arrays]], most: int) -> list[list[tuple[int, Arrays]]]:
    parts: list[list[tuple[int, Arrays]]] = [[]]
    taken = 0
    for member in members:
        size = len(next(iter(member[1].values())))
        if parts[-1] and taken + size > most:
            parts.append([])
            taken = 0
        parts[-1].append(member)
        taken += size
    return parts


def _run(
    members: Sequence[tuple[int, Arrays]], names: Sequence[str], run: Callable[[Arrays], Arrays]
) -> dict[int, Any]:
    try:
        together = {name: np.concatenate([inputs[name] for _, inputs in members]) for name in names}
        outputs = run(together)
        ends = np.cumsum([len(inputs[names[0]]) for _, inputs in members])[:-1]
        split = {name: np.split(value, ends) for name, value in outputs.items()}
        return {
            place: answer({name: parts[i] for name, parts in split.items()}) for i, (place, _) in enumerate(members)
        }
    except Exception as e:
        return {place: refusal(e) for place, _ in members}
