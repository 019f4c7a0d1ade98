"""R+ViT hybrids, in which a ViT reads the last feature map of a ResNet: the named variants and the canonical
parameters."""

import dataclasses
import itertools
import math
from collections.abc import Iterator

from vit_convert.core.signature import Signature
from vit_convert.families.head import classifier_signature
from vit_convert.families.vit.architecture import Architecture
from vit_convert.families.vit.shapes import leaf_shapes as trunk_shapes
from vit_convert.families.vit.shapes import parameter_count as trunk_count

Shape = tuple[int, ...]
ROOT_WIDTH = 64
GROUPS = 32
NORM_EPSILON = 1e-6
STANDARDIZE_EPSILON = 1e-5


@dataclasses.dataclass(frozen=True)
class Row:
    """The meaning of a variant's name.

    Attributes:
        stages: bottleneck units of each stage; () for only the stem.
        patch_size: side of a patch in pixels of the feature map.
        letters: the ViT's row, such as "B".
    """

    stages: tuple[int, ...]
    patch_size: int
    letters: str


# vit_jax/configs/models.py. R50+ViT-B/16 is not a complete R50: three stages, the third with nine units. R+ViT-Ti/16
# has 32 pixels per token, by its stem and its patches of 8. The last two are ours, for tests.
HYBRIDS = {
    "R+ViT-Ti/16": Row((), 8, "Ti"),
    "R26+ViT-S/32": Row((2, 2, 2, 2), 1, "S"),
    "R26+ViT-B/32": Row((2, 2, 2, 2), 1, "B"),
    "R50+ViT-B/16": Row((3, 4, 9), 1, "B"),
    "R50+ViT-L/32": Row((3, 4, 6, 3), 1, "L"),
    "R+ViT-mu/16": Row((), 8, "mu"),
    "R8+ViT-mu/8": Row((1, 2), 1, "mu"),
}
PUBLISHED = tuple(HYBRIDS)[:5]


@dataclasses.dataclass(frozen=True)
class Unit:
    """One bottleneck: 1x1 to `width`, 3x3, 1x1 to four times that.

    Attributes:
        scope: such as "stage_2/block_0/".
        inputs: channels that it reads.
        width: channels of its 3x3 convolution.
        stride: of that convolution.
        projects: whether its shortcut is a convolution, as in the first unit of every stage.
    """

    scope: str
    inputs: int
    width: int
    stride: int
    projects: bool


@dataclasses.dataclass(frozen=True)
class Hybrid:
    """One hybrid, complete enough to build its Flax definition.

    Attributes:
        variant: name in `HYBRIDS`; "custom" when the shapes match no row.
        stages: bottleneck units of each stage.
        image_size: (height, width) in pixels.
        trunk: the ViT that reads the feature map; its `image_size` and `patch_size` are in pixels of the map.
        root_width: channels of the stem.
        family: "hybrid".
    """

    variant: str
    stages: tuple[int, ...]
    image_size: tuple[int, int]
    trunk: Architecture
    root_width: int = ROOT_WIDTH
    family: str = "hybrid"

    @property
    def stride(self) -> int:
        """Pixels of the image to one of the feature map: 4 after the stem, and 2 for each stage but the first."""
        return stride_of(self.stages)

    @property
    def channels(self) -> int:
        """Of the feature map."""
        return 4 * self.root_width * 2 ** (len(self.stages) - 1) if self.stages else self.root_width

    @property
    def group_norms(self) -> tuple[int, ...]:
        """Channels of the GroupNorms, each number once.

        Example:
            >>> Hybrid("R+ViT-mu/16", (1, 2), (224, 224), None).group_norms
            (64, 128, 256, 512)
        """
        return tuple(
            sorted({self.root_width, *(wide for unit in self.units() for wide in (unit.width, 4 * unit.width))})
        )

    def units(self) -> Iterator[Unit]:
        """The bottlenecks, in order."""
        inputs = self.root_width
        for stage, depth in enumerate(self.stages):
            width = self.root_width * 2**stage
            for unit in range(depth):
                stride = 2 if stage and not unit else 1
                yield Unit(
                    f"stage_{stage + 1}/block_{unit}/",
                    inputs,
                    width,
                    stride,
                    projects=inputs != 4 * width or stride > 1,
                )
                inputs = 4 * width


def signature_of(architecture: Hybrid) -> Signature:
    """Images in, its ViT's outputs out."""
    trunk = architecture.trunk
    features, patches = trunk.representation_size or trunk.width, (*trunk.grid, trunk.width)
    return classifier_signature(architecture.image_size, trunk.num_classes, features, (), trunk.outputs, patches)


def stride_of(stages: tuple[int, ...]) -> int:
    """Pixels of the image to one of the feature map."""
    return 4 * 2 ** max(0, len(stages) - 1)


def feature_size(image_size: tuple[int, int], stages: tuple[int, ...]) -> tuple[int, int]:
    """(height, width) of the feature map: every step of two rounds up, as SAME padding does."""
    stride = stride_of(stages)  # ceil(ceil(x / 2) / 2) = ceil(x / 4)
    return -(-image_size[0] // stride), -(-image_size[1] // stride)


def leaf_shapes(architecture: Hybrid) -> dict[str, Shape]:
    """Lists every canonical parameter, in the order in which the model uses them.

    Args:
        architecture: the model.

    Returns:
        Shape by name; names are vit_jax's with Linen's numbering, except `stage_2/block_0` for `block2/unit1`;
        GroupNorm's leaves have one axis.
    """
    a = architecture
    shapes: dict[str, Shape] = {"conv_root/kernel": (7, 7, 3, a.root_width)} | _norm("gn_root", a.root_width)
    for unit in a.units():
        wide = 4 * unit.width
        parts: dict[str, Shape] = {}
        if unit.projects:
            parts |= {"conv_proj/kernel": (1, 1, unit.inputs, wide)} | _norm("gn_proj", wide)
        parts |= {"conv1/kernel": (1, 1, unit.inputs, unit.width)} | _norm("gn1", unit.width)
        parts |= {"conv2/kernel": (3, 3, unit.width, unit.width)} | _norm("gn2", unit.width)
        parts |= {"conv3/kernel": (1, 1, unit.width, wide)} | _norm("gn3", wide)
        shapes |= {unit.scope + name: shape for name, shape in parts.items()}
    patch = a.trunk.patch_size
    return shapes | trunk_shapes(a.trunk) | {"embedding/kernel": (patch, patch, a.channels, a.trunk.width)}


def parameter_count(architecture: Hybrid, posemb_rows: int) -> int:
    """Number of parameters in closed form.

    Args:
        architecture: the model.
        posemb_rows: rows of the stored position table.
    """
    a = architecture
    count = 7 * 7 * 3 * a.root_width + 2 * a.root_width
    widths = itertools.chain.from_iterable([a.root_width * 2**stage] * depth for stage, depth in enumerate(a.stages))
    inputs = a.root_width
    for f in widths:
        count += inputs * f + 9 * f * f + 4 * f * f + 2 * (f + f + 4 * f)
        if inputs != 4 * f:
            count += inputs * 4 * f + 2 * 4 * f
        inputs = 4 * f
    patch_area = a.trunk.patch_size**2
    return count + trunk_count(a.trunk, posemb_rows) + patch_area * (inputs - 3) * a.trunk.width


def name_variant(stages: tuple[int, ...], patch_size: int, letters: str) -> str:
    """The name of the row with these numbers, or "custom"."""
    return next((name for name, row in HYBRIDS.items() if row == Row(stages, patch_size, letters)), "custom")


def num_tokens(architecture: Hybrid) -> int:
    """Tokens of an image in the encoder."""
    return math.prod(architecture.trunk.grid) + (architecture.trunk.pool == "tok")


def _norm(name: str, width: int) -> dict[str, Shape]:
    return {f"{name}/scale": (width,), f"{name}/bias": (width,)}
