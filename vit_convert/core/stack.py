"""A run of equal blocks, and their names in a checkpoint, in a graph and in a report."""

import dataclasses

from vit_convert.core.layer_names import block_of


@dataclasses.dataclass(frozen=True)
class Stack:
    """Consecutive blocks that compute the same function, each with its own parameters.

    Attributes:
        scope: of a block's parameters, with {} for its number: "Transformer/encoderblock_{}/"; "stage_2/block_{}/"
            if a model has several stacks.
        depth: how many blocks the whole model has.
        taps: the name of a block and of its output: "block_{:02d}", or "stage_2/block_{:02d}". Other taps within a
            block are named after it: "block_03/token_mixing".
        start: the tap that the first block reads; "" to find it in the graph.
        period: after how many blocks the structure repeats: 2 if every other one is shifted.
        nodes: how many nodes a block may have, as a multiple of what the target allows a ViT's.
    """

    scope: str
    depth: int
    taps: str = "block_{:02d}"
    start: str = ""
    period: int = 1
    nodes: float = 1.0

    def __post_init__(self) -> None:
        if block_of(self.scope.format(3)) != self.taps.format(3):
            raise ValueError(
                f"stack {self.scope!r}: its parameters' names say {block_of(self.scope.format(3))}, its taps "
                f"{self.taps.format(3)}; "
                "use 'stage_<name>/block_{}/' and 'stage_<name>/block_{:02d}' for one of several stacks"
            )
        if self.depth % self.period:
            raise ValueError(f"stack {self.scope!r}: {self.depth} blocks in periods of {self.period}")

    @property
    def traced(self) -> int:
        """How many blocks must be traced: one period at the beginning, and one that the others repeat."""
        return min(self.depth, 2 * self.period)

    def tap(self, block: int) -> str:
        """The name of a block, and of its output."""
        return self.taps.format(block)

    def prefix(self, block: int) -> str:
        """The prefix of the names of a block's parameters."""
        return self.scope.format(block)

    def cut(self) -> "Stack":
        """The stack as it is traced."""
        return dataclasses.replace(self, depth=self.traced)
