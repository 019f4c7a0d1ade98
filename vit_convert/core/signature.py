"""A model's inputs and outputs: names, types, shapes, and how each output is judged. All other packages rely on this
record."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from vit_convert.core.errors import UsageError

Dim = int | str
JUDGES = ("top1", "cosine", "embedding")
LAYOUTS = ("NHWC", "NCHW")


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One input or output.

    Attributes:
        name: its name in the graph and in the engine.
        dtype: numpy's name for its type: "float32", "uint8", "int32".
        shape: batch first, with a name for each dimension that varies: ("batch", 224, 224, 3), ("batch", "height",
            "width", 3), ("batch", 64).
        layout: "NHWC" or "NCHW" for images, which are decoded, resized and normalised; "" for anything else.
        below: exclusive upper bound of its whole numbers, such as the size of a vocabulary; 0 for no bound.
        start: the token that begins a text; -1 for none.
        end: the token that ends a text; -1 for none.
        pad: the token that pads a text to its length; -1 if it takes no text.
    """

    name: str
    dtype: str
    shape: tuple[Dim, ...]
    layout: str = ""
    below: int = 0
    start: int = -1
    end: int = -1
    pad: int = -1

    @property
    def is_text(self) -> bool:
        """Whether it takes the tokens of a text."""
        return self.pad >= 0

    @property
    def is_image(self) -> bool:
        """Whether it takes images."""
        return bool(self.layout)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values, without tokens that do not apply."""
        values = {name: value for name, value in dataclasses.asdict(self).items() if value != -1}
        return {**values, "shape": list(self.shape)}


@dataclasses.dataclass(frozen=True)
class Output(Tensor):
    """One output that is judged against JAX.

    Attributes:
        judge: "top1": by its values, and by its class on labelled images; "cosine": by its values only; "embedding": by
            its values, and within a pair.
    """

    judge: str = "cosine"


@dataclasses.dataclass(frozen=True)
class Signature:
    """A model's tensors.

    Attributes:
        inputs: in the model's order.
        outputs: in the model's order; the first represents the model where a single number is shown.
    """

    inputs: tuple[Tensor, ...]
    outputs: tuple[Output, ...]

    @property
    def image(self) -> Tensor | None:
        """The input that takes images, or None."""
        return next((tensor for tensor in self.inputs if tensor.is_image), None)

    @property
    def classes(self) -> Output | None:
        """The output that labels are compared with, or None."""
        return next((output for output in self.outputs if output.judge == "top1"), None)

    @property
    def judged(self) -> tuple[str, ...]:
        """Names of the outputs."""
        return tuple(output.name for output in self.outputs)

    def of_graph(self, layout: str, *, uint8: bool = False, dynamic: bool = False) -> "Signature":
        """The signature of a graph, from that of its model.

        Args:
            layout: order of the axes of the input that takes images.
            uint8: whether it takes pixels, and normalises them itself.
            dynamic: height and width of the images vary, and with them the number of tokens; without images, the length
                of the texts does.
        """
        between_name = "tokens" if self.image else "length"

        def as_taken(tensor: Tensor) -> Tensor:
            if tensor.is_text and dynamic and not self.image:
                return dataclasses.replace(tensor, shape=(tensor.shape[0], "length", *tensor.shape[2:]))
            if not tensor.is_image:
                return tensor
            batch, height, width, channels = tensor.shape
            sides = ("height", "width") if dynamic else (height, width)
            shape = (batch, *sides, channels) if layout == "NHWC" else (batch, channels, *sides)
            return dataclasses.replace(tensor, shape=shape, layout=layout, dtype="uint8" if uint8 else tensor.dtype)

        def as_given(output: Output) -> Output:
            between = (between_name for _ in output.shape[1:-1]) if dynamic else output.shape[1:-1]
            return dataclasses.replace(output, shape=(output.shape[0], *between, *output.shape[1:][-1:]))

        return Signature(tuple(map(as_taken, self.inputs)), tuple(map(as_given, self.outputs)))

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values, for `signature.json`."""
        return {
            "inputs": [tensor.to_dict() for tensor in self.inputs],
            "outputs": [output.to_dict() for output in self.outputs],
        }

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> "Signature":
        """The inverse of `to_dict`.

        Raises:
            UsageError: it cannot be read.
        """
        try:
            inputs = tuple(Tensor(**{**row, "shape": _shape(row["shape"])}) for row in record["inputs"])
            outputs = tuple(Output(**{**row, "shape": _shape(row["shape"])}) for row in record["outputs"])
            found = cls(inputs, outputs)
            if not inputs or not outputs or not all(output.judge in JUDGES for output in outputs):
                raise ValueError("no inputs, no outputs, or an unknown judge")
            return found
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            raise UsageError(f"not a signature ({type(e).__name__}: {e})", fix="Convert again.") from e


def _shape(sides: Sequence[Any]) -> tuple[Dim, ...]:
    if not sides or not all(isinstance(side, int | str) and not isinstance(side, bool) for side in sides):
        raise ValueError(f"shape {sides}")
    return tuple(sides)
