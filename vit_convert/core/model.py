"""What the exporter needs to know about a model of any family."""

import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from vit_convert.core.signature import Signature
from vit_convert.core.stack import Stack

Arrays = Mapping[str, Any]
# If the pooled token differs between the rows of a batch, a model returns its index under this name: int [batch].
POOLED = "pooled_token"


@dataclasses.dataclass(frozen=True)
class Model:
    """A JAX model, ready to trace and to compute its own reference.

    Attributes:
        signature: its inputs as `apply` takes them (images float32, NHWC) and its outputs.
        params: float32 parameters under their `/`-joined names.
        taps: names of the taps of the whole model, in order.
        apply: maps (parameters, *inputs) to {output or tap: array}; what is traced.
        traced_shapes: shapes of the parameters that `apply` reads.
        traced_taps: names of the taps that `apply` returns. If these lack a stack's later blocks, `apply` computes only
            the first ones (`Stack.traced`), and the graph repeats them.
        run: maps the inputs, numpy arrays, to {output or tap: numpy array} of the whole model, in float32 and at the
            highest matmul precision. If the model is resizable, images may be of any size that its patches tile.
        stacks: its runs of equal blocks, to which lower precisions are limited by default; empty if none are known.
        pooled_token: index of the one token [batch, tokens, width] from which the output is computed, negative if
            counted from the end; `POOLED` if each row of the batch has its own, whose index `run` returns beside the
            taps and which the graph selects by a product; None if the output is computed from all tokens.
        position_table: the parameter [1, tokens, width] that is added to the patches of a convolution, and resampled
            for other image sizes, or to the tokens of a text, and cut for shorter ones; None if the model takes only
            one size.
        kind: equal for models that differ only in their weights and so share one graph; None if unknown.
        name: of a user's own model.
        identity: of a user's own model: changes with the function or any parameter.
        warnings: what the user should know about it.
    """

    signature: Signature
    params: Mapping[str, np.ndarray]
    taps: Sequence[str]
    apply: Callable[..., Arrays]
    traced_shapes: Mapping[str, Sequence[int]]
    traced_taps: Sequence[str]
    run: Callable[..., dict[str, np.ndarray]]
    stacks: tuple[Stack, ...] = ()
    pooled_token: int | str | None = None
    position_table: str | None = None
    kind: Hashable = None
    name: str = ""
    identity: str = ""
    warnings: Sequence[str] = ()

    @property
    def output(self) -> str:
        """The name of the output that represents the model where a single number is shown."""
        return self.signature.outputs[0].name

    @property
    def repeats(self) -> bool:
        """Whether `apply` computes only the first blocks of a stack, for the graph to repeat."""
        return any(stack.tap(stack.depth - 1) not in self.traced_taps for stack in self.stacks)


def missing_results(model: Model, found: Any, rows: int) -> str:
    """What is wrong with what a model's `run` returned, by names and shapes alone; "" if nothing is.

    Without this, a block that `run` leaves out would not be compared with anything.

    Args:
        model: the model.
        found: what its `run` returned.
        rows: size of the batch that it was given.
    """
    if not isinstance(found, Mapping):
        return f"it returned a {type(found).__name__}, not a dictionary of arrays"
    for name in (*model.signature.judged, *model.taps):
        if name not in found:
            return f"it returned no {name}, but {', '.join(map(str, found)) or 'nothing'}"
        shape = np.shape(found[name])
        if shape[:1] != (rows,):
            return f"{name} has the shape {shape}, for a batch of {rows}"
    return ""
