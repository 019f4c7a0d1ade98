"""Text of a `config.pbtxt`: fields in the syntax of Triton's protobuf, each choice with a sentence that justifies
it."""

import dataclasses
import json
import textwrap
from collections.abc import Iterable, Sequence

from vit_convert.core.errors import BuildError
from vit_convert.core.signature import Tensor

TYPES = {
    "float32": "TYPE_FP32",
    "float16": "TYPE_FP16",
    "bfloat16": "TYPE_BF16",
    "uint8": "TYPE_UINT8",
    "int8": "TYPE_INT8",
    "int32": "TYPE_INT32",
    "int64": "TYPE_INT64",
    "bool": "TYPE_BOOL",
    "bytes": "TYPE_STRING",
}
_WIDTH = 110


@dataclasses.dataclass(frozen=True)
class Chosen:
    """A part of a config.

    Attributes:
        text: the field or fields, as in the file.
        why: the sentence above them; "" if they need none.
    """

    text: str
    why: str = ""

    def __str__(self) -> str:
        comment = textwrap.wrap(
            self.why,
            _WIDTH,
            initial_indent="# ",
            subsequent_indent="# ",
            break_long_words=False,
            break_on_hyphens=False,
        )
        return "\n".join([*comment, self.text])


def quoted(value: object) -> str:
    """A string in the text format.

    Example:
        >>> quoted('a "b"')
        '"a \\\\"b\\\\""'
    """
    return json.dumps(str(value))


def tensor(field: str, tensor: Tensor, *, batched: bool = True, more: str = "") -> Chosen:
    """An `input` or `output`.

    Args:
        field: "input" or "output".
        tensor: its name, type and shape, batch first.
        batched: whether Triton handles the model's batch separately; the first dimension is then omitted.
        more: its further fields.

    Returns:
        The Chosen, with -1 for each dimension that varies.

    Raises:
        BuildError: Triton has no such type.

    Example:
        >>> print(tensor("input", Tensor("images", "float32", ("batch", 32, 32, 3))))
        input [ { name: "images" data_type: TYPE_FP32 dims: [ 32, 32, 3 ] } ]
    """
    if tensor.dtype not in TYPES:
        raise BuildError(
            f"{field} {tensor.name}: {tensor.dtype}: Triton has no such type", fix=f"It has {', '.join(TYPES)}."
        )
    dims = [side if isinstance(side, int) else -1 for side in (tensor.shape[1:] if batched else tensor.shape)]
    fields = f"name: {quoted(tensor.name)} data_type: {TYPES[tensor.dtype]} dims: {numbers(dims)}"
    return Chosen(f"{field} [ {{ {fields}{' ' + more if more else ''} }} ]")


def numbers(values: Iterable[int]) -> str:
    """[ 1, 8 ]."""
    return f"[ {', '.join(map(str, values))} ]"


def parameter(key: str, value: object) -> Chosen:
    """One of the free parameters that a backend reads.

    Example:
        >>> print(parameter("intra_op_thread_count", 1))
        parameters { key: "intra_op_thread_count" value { string_value: "1" } }
    """
    return Chosen(f"parameters {{ key: {quoted(key)} value {{ string_value: {quoted(value)} }} }}")


def step(model: str, inputs: dict[str, str], outputs: dict[str, str]) -> str:
    """One step of an ensemble; the maps go from the model's own names to names within the ensemble."""
    maps = [f"input_map {{ key: {quoted(k)} value: {quoted(v)} }}" for k, v in inputs.items()]
    maps += [f"output_map {{ key: {quoted(k)} value: {quoted(v)} }}" for k, v in outputs.items()]
    return f"    {{ model_name: {quoted(model)} model_version: -1 {' '.join(maps)} }}"


def document(parts: Sequence[Chosen]) -> str:
    """The whole file."""
    return "\n".join(map(str, parts)) + "\n"
