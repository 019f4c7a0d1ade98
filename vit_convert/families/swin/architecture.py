"""Swin (v1): the numbers that a checkpoint's shapes decide, the named variants, and the canonical parameters."""

import dataclasses

from vit_convert.families.head import given_usually

Shape = tuple[int, ...]
PATCH = 4
MLP_RATIO = 4


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes that the letter of a variant's name stands for: width of the first stage, blocks and heads of each."""

    width: int
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]


# microsoft/Swin-Transformer, configs/swin; "mu" is ours, for tests.
SIZES = {
    "mu": Sizes(32, (2, 2), (1, 2)),
    "T": Sizes(96, (2, 2, 6, 2), (3, 6, 12, 24)),
    "S": Sizes(96, (2, 2, 18, 2), (3, 6, 12, 24)),
    "B": Sizes(128, (2, 2, 18, 2), (4, 8, 16, 32)),
    "L": Sizes(192, (2, 2, 18, 2), (6, 12, 24, 48)),
}
PUBLISHED = ("Swin-T/7", "Swin-S/7", "Swin-B/7", "Swin-B/12", "Swin-L/7", "Swin-L/12")
SIZE_OF_WINDOW = {7: 224, 12: 384}
"""Image size in pixels of the published models with each window."""


@dataclasses.dataclass(frozen=True)
class Swin:
    """One Swin, complete enough to build its Flax definition.

    Attributes:
        variant: letter and window, such as "Swin-T/7"; "custom" when the shapes match no row of `SIZES`.
        width: channels of the first stage; each later one has twice as many.
        depths: blocks of each stage, the odd ones with shifted windows.
        num_heads: attention heads of each stage.
        window: side of a window in tokens.
        image_size: (height, width) in pixels.
        num_classes: outputs of the head; 0 for a model without one.
        norm_epsilon: epsilon of every LayerNorm.
        family: "swin".
        outputs: its outputs; () for logits, or for features if there is no head.
    """

    variant: str
    width: int
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    window: int
    image_size: tuple[int, int]
    num_classes: int
    norm_epsilon: float = 1e-5
    family: str = "swin"
    outputs: tuple[str, ...] = ()

    @property
    def given(self) -> tuple[str, ...]:
        """Its outputs, by name."""
        return self.outputs or given_usually(self.num_classes)

    @property
    def features(self) -> int:
        """Channels of the last stage."""
        return self.stage_width(len(self.depths) - 1)

    def stage_width(self, stage: int) -> int:
        """Channels of a stage."""
        return self.width * 2**stage

    def grid(self, stage: int) -> tuple[int, int]:
        """Tokens of a stage, down and across."""
        return self.image_size[0] // (PATCH * 2**stage), self.image_size[1] // (PATCH * 2**stage)

    def windows(self, stage: int) -> tuple[int, int]:
        """Windows of a stage, down and across."""
        rows, columns = self.grid(stage)
        return rows // self.window, columns // self.window

    def shift(self, stage: int, block: int) -> int:
        """By how many tokens a block's windows are shifted: half a window in every second block, unless a single window
        spans the side."""
        return self.window // 2 if block % 2 and min(self.grid(stage)) > self.window else 0


def tiles(image_size: tuple[int, int], window: int, num_stages: int) -> bool:
    """Whether windows tile the tokens of every stage, and the grid of every stage but the last can be halved."""
    step = PATCH * 2 ** (num_stages - 1) * window
    return all(side > 0 and side % step == 0 for side in image_size)


def name_variant(sizes: Sizes, window: int) -> str:
    """The name of the row with these sizes, or "custom"."""
    letter = next((letter for letter, row in SIZES.items() if row == sizes), None)
    return f"Swin-{letter}/{window}" if letter else "custom"


def leaf_shapes(architecture: Swin) -> dict[str, Shape]:
    """Lists every stored parameter by its canonical name, in the order in which the model uses them.

    Args:
        architecture: the model.

    Returns:
        Shape by name; matrices are [inputs, outputs], convolutions [height, width, inputs, outputs].
    """
    a = architecture
    shapes: dict[str, Shape] = {
        "patch_embed/proj/kernel": (PATCH, PATCH, 3, a.width),
        "patch_embed/proj/bias": (a.width,),
    }
    shapes |= _norm("patch_embed/norm", a.width)
    for stage, depth in enumerate(a.depths):
        width = a.stage_width(stage)
        for block in range(depth):
            parts = _norm("norm1", width) | {"attn/table": ((2 * a.window - 1) ** 2, a.num_heads[stage])}
            for name in ("query", "key", "value", "out"):
                parts |= _dense(f"attn/{name}", width, width)
            parts |= _norm("norm2", width)
            parts |= _dense("mlp/fc1", width, MLP_RATIO * width) | _dense("mlp/fc2", MLP_RATIO * width, width)
            shapes |= {f"stage_{stage}/block_{block}/{name}": shape for name, shape in parts.items()}
        if stage < len(a.depths) - 1:
            shapes |= _norm(f"stage_{stage}/downsample/norm", 4 * width)
            shapes[f"stage_{stage}/downsample/reduction/kernel"] = (4 * width, 2 * width)
    shapes |= _norm("norm", a.features)
    return shapes | _dense("head", a.features, a.num_classes) if a.num_classes else shapes


def parameter_count(architecture: Swin) -> int:
    """Number of parameters in closed form: for a stage of width C and h heads, L(12C² + 13C + (2w − 1)²h) + 8C² + 8C
    between stages."""
    a = architecture
    count = (3 * PATCH**2 + 3) * a.width
    for stage, (depth, heads) in enumerate(zip(a.depths, a.num_heads)):
        c = a.stage_width(stage)
        count += depth * (12 * c * c + 13 * c + (2 * a.window - 1) ** 2 * heads)
    merged = sum(a.stage_width(stage) ** 2 + a.stage_width(stage) for stage in range(len(a.depths) - 1))
    return count + 8 * merged + 2 * a.features + (a.features + 1) * a.num_classes


def _norm(name: str, width: int) -> dict[str, Shape]:
    return {f"{name}/scale": (width,), f"{name}/bias": (width,)}


def _dense(name: str, inputs: int, outputs: int) -> dict[str, Shape]:
    return {f"{name}/kernel": (inputs, outputs), f"{name}/bias": (outputs,)}
