"""Whether what a caller gives fits a graph, told before onnxruntime is asked: its own messages name neither both shapes
nor what to do."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vit_convert.core.errors import BenchmarkError

_DTYPES: dict[str, np.dtype[Any]] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(float16)": np.dtype(np.float16),
    "tensor(uint8)": np.dtype(np.uint8),
    "tensor(int32)": np.dtype(np.int32),
    "tensor(int64)": np.dtype(np.int64),
    "tensor(bool)": np.dtype(np.bool_),
}


def fitting_inputs(given: Any, wanted: Sequence[Any]) -> dict[str, np.ndarray]:
    """What a caller gives, as the arrays that a graph takes.

    Args:
        given: an array or nested lists; {input: array} if the graph has several inputs.
        wanted: onnxruntime's description of each input: its name, type and shape.

    Returns:
        The arrays by input.

    Raises:
        BenchmarkError: an input is missing, unknown, empty, or of another type or shape; names it, and both.
    """
    names = [one.name for one in wanted]
    arrays = given if isinstance(given, Mapping) else {names[0]: given}
    if sorted(map(str, arrays)) != sorted(names):
        raise BenchmarkError(
            f"the model takes {', '.join(names)}; given {', '.join(map(str, arrays)) or 'nothing'}",
            fix="Give {input: array}.",
        )
    return {one.name: _fitting(arrays[one.name], one) for one in wanted}


def _fitting(given: Any, wanted: Any) -> np.ndarray:
    dtype = _DTYPES.get(wanted.type)
    try:
        array = np.asarray(given) if hasattr(given, "dtype") else np.asarray(given, dtype)
    except Exception as e:  # whatever a foreign array's conversion raises
        raise _misfit(f"a {type(given).__name__}", wanted, dtype) from e
    fits = len(array.shape) == len(wanted.shape) and all(
        have == side for have, side in zip(array.shape, wanted.shape) if isinstance(side, int)
    )
    if not fits or not array.size or array.dtype != (dtype or array.dtype):
        raise _misfit(f"{array.dtype} {list(array.shape)}", wanted, dtype)
    return array


def _misfit(found: str, wanted: Any, dtype: np.dtype[Any] | None) -> BenchmarkError:
    shape = ", ".join(str(side) for side in wanted.shape)
    is_text = dtype is not None and dtype.kind == "i"
    return BenchmarkError(
        f"{wanted.name}: {found}, the model takes {dtype or wanted.type} [{shape}]",
        fix="Make token ids with the tokenizer of the checkpoint."
        if is_text
        else "Preprocess the images as the bundle's record says.",
    )
