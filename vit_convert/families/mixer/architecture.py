"""MLP-Mixer: the numbers that a checkpoint's shapes decide, the named variants, and the canonical parameters."""

import dataclasses
import math

from vit_convert.families.head import given_usually

BLOCK = "MixerBlock_"
Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What the letter of a variant's name stands for."""

    width: int
    depth: int
    tokens_mlp_dim: int
    channels_mlp_dim: int


# vit_jax/configs/models.py (B, L) and big_vision/models/mlp_mixer.py (S, B, L, H); "mu" is ours, for tests.
SIZES = {
    "mu": Sizes(32, 2, 16, 64),
    "S": Sizes(512, 8, 256, 2048),
    "B": Sizes(768, 12, 384, 3072),
    "L": Sizes(1024, 24, 512, 4096),
    "H": Sizes(1280, 32, 640, 5120),
}
PUBLISHED = ("Mixer-S/8", "Mixer-S/16", "Mixer-S/32", "Mixer-B/16", "Mixer-B/32", "Mixer-L/16")


@dataclasses.dataclass(frozen=True)
class Mixer:
    """One Mixer, complete enough to build its Flax definition.

    Attributes:
        variant: such as "Mixer-B/16"; "custom" when the shapes match no row of `SIZES`.
        width: size of the residual stream, D.
        depth: number of blocks.
        tokens_mlp_dim: hidden size of the MLP over tokens, S.
        channels_mlp_dim: hidden size of the MLP over channels, K.
        patch_size: side of a patch in pixels.
        image_size: (height, width) in pixels; the weights of token mixing are for exactly this number of patches.
        num_classes: outputs of the head; 0 for a model without one.
        norm_epsilon: epsilon of every LayerNorm.
        family: "mixer".
        outputs: its outputs; () for logits, or for features if there is no head.
    """

    variant: str
    width: int
    depth: int
    tokens_mlp_dim: int
    channels_mlp_dim: int
    patch_size: int
    image_size: tuple[int, int]
    num_classes: int
    norm_epsilon: float = 1e-6
    family: str = "mixer"
    outputs: tuple[str, ...] = ()

    @property
    def given(self) -> tuple[str, ...]:
        """Its outputs, by name."""
        return self.outputs or given_usually(self.num_classes)

    @property
    def grid(self) -> tuple[int, int]:
        """Patches down and across."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    @property
    def num_tokens(self) -> int:
        """Patches of an image."""
        return math.prod(self.grid)


def name_variant(sizes: Sizes, patch_size: int) -> str:
    """The name of the row with these sizes, or "custom"."""
    letter = next((letter for letter, row in SIZES.items() if row == sizes), None)
    return f"Mixer-{letter}/{patch_size}" if letter else "custom"


def leaf_shapes(architecture: Mixer) -> dict[str, Shape]:
    """Lists every canonical parameter, in the order in which the model uses them.

    Args:
        architecture: the model.

    Returns:
        Shape by name; names are those of vit_jax's Flax Linen module, joined by "/".
    """
    a = architecture
    shapes: dict[str, Shape] = {"stem/kernel": (a.patch_size, a.patch_size, 3, a.width), "stem/bias": (a.width,)}
    for i in range(a.depth):
        block = (
            _norm("LayerNorm_0", a.width)
            | _mlp("token_mixing", a.num_tokens, a.tokens_mlp_dim)
            | _norm("LayerNorm_1", a.width)
            | _mlp("channel_mixing", a.width, a.channels_mlp_dim)
        )
        shapes |= {f"{BLOCK}{i}/{name}": shape for name, shape in block.items()}
    shapes |= _norm("pre_head_layer_norm", a.width)
    if a.num_classes:
        shapes |= {"head/kernel": (a.width, a.num_classes), "head/bias": (a.num_classes,)}
    return shapes


def parameter_count(architecture: Mixer) -> int:
    """Number of parameters in closed form: with N tokens, 3P²D + D + L(2NS + S + N + 2DK + K + D + 4D) + 2D + (D +
    1)C."""
    a = architecture
    d, n, s, k = a.width, a.num_tokens, a.tokens_mlp_dim, a.channels_mlp_dim
    block = 2 * n * s + s + n + 2 * d * k + k + d + 4 * d
    return 3 * a.patch_size**2 * d + d + a.depth * block + 2 * d + (d + 1) * a.num_classes


def _norm(name: str, width: int) -> dict[str, Shape]:
    return {f"{name}/scale": (width,), f"{name}/bias": (width,)}


def _mlp(name: str, width: int, hidden: int) -> dict[str, Shape]:
    return {
        f"{name}/Dense_0/kernel": (width, hidden),
        f"{name}/Dense_0/bias": (hidden,),
        f"{name}/Dense_1/kernel": (hidden, width),
        f"{name}/Dense_1/bias": (width,),
    }
