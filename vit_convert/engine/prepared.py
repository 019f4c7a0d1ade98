"""An input shape made ready to run; its GPU memory goes back when the session is done with it and nobody else holds it."""

import contextlib
import dataclasses
import weakref
from collections.abc import Mapping
from typing import Any

from vit_convert.engine import cuda
from vit_convert.engine.graphs import CudaGraph
from vit_convert.engine.profiles import Shape
from vit_convert.engine.runtime import TensorSpec


@dataclasses.dataclass(eq=False)
class Prepared:
    """One input shape, ready to run.

    Args:
        held: gives the graph and the outputs' memory back.

    Attributes:
        index: of the optimization profile.
        shape: of the input.
        context: TensorRT's execution context, of this shape for good: a recorded graph holds its state.
        outputs: for each output its spec, its shape here and its GPU memory.
        graph: the recorded run; None where CUDA graphs are off or cannot record this engine.
        why_no_graph: why `graph` is None, else "".
    """

    index: int
    shape: Shape
    context: Any
    outputs: Mapping[str, tuple[TensorSpec, Shape, cuda.DeviceBuffer]]
    graph: CudaGraph | None
    why_no_graph: str
    held: dataclasses.InitVar[contextlib.ExitStack]

    def __post_init__(self, held: contextlib.ExitStack) -> None:
        # Whoever still holds it may go on after the session has let it go.
        self._finalizer = weakref.finalize(self, _free, held)
        self._finalizer.atexit = False  # the process takes its memory along

    def close(self) -> None:
        """Gives the graph and the outputs' memory back now; nothing may be queued on them any more."""
        self._finalizer()


def _free(held: contextlib.ExitStack) -> None:
    cuda.use_context()  # the last reference may end in any thread
    held.close()
