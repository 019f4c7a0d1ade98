"""An input shape that is ready to run; its GPU memory is freed once neither the session nor anybody else uses it."""

import contextlib
import dataclasses
from collections.abc import Mapping
from typing import Any

from vit_convert.engine.backend import cuda
from vit_convert.engine.runtime.cuda_graph import CudaGraph
from vit_convert.engine.runtime.engine import TensorSpec
from vit_convert.engine.runtime.profiles import Shape


@dataclasses.dataclass(eq=False)
class Prepared:
    """One input shape, ready to run.

    Args:
        held: releases the graph and the outputs' memory.

    Attributes:
        index: of the optimization profile.
        shape: of the input.
        context: TensorRT's execution context, which keeps this shape for good, because a recorded graph holds its
            state.
        outputs: for each output its spec, its shape here and its GPU memory.
        graph: the recorded run; None if CUDA graphs are off or cannot record this engine.
        why_no_graph: why `graph` is None; otherwise "".
    """

    index: int
    shape: Shape
    context: Any
    outputs: Mapping[str, tuple[TensorSpec, Shape, cuda.DeviceBuffer]]
    graph: CudaGraph | None
    why_no_graph: str
    held: dataclasses.InitVar[contextlib.ExitStack]

    def __post_init__(self, held: contextlib.ExitStack) -> None:
        # whoever still holds it may keep using it after the session released it
        self._free = cuda.when_gone(self, held.close)

    def close(self) -> None:
        """Frees the graph and the outputs' memory now; nothing may be queued on them any more."""
        self._free()
