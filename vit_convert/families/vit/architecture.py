"""A ViT's architecture: the numbers that follow from a checkpoint's shapes."""

import dataclasses

from vit_convert.core.signature import Signature
from vit_convert.families.head import classifier_signature, given_usually


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One model, complete enough to build its Flax definition.

    Attributes:
        family: "vit".
        variant: name in `variants.py`, such as "B/32"; "custom" when the shapes match no row.
        width: size of the residual stream, D.
        depth: number of encoder blocks, L.
        mlp_dim: hidden size of the MLP, M.
        num_heads: attention heads, H; the head size is read from the checkpoint and need not be 64.
        patch_size: side of a patch in pixels.
        image_size: (height, width) in pixels that the position table is for, after any resampling.
        num_classes: outputs of the head; 0 for a model without one.
        pool: "tok" (class token), "gap" (mean of the patch tokens), "map" (attention pooling) or "none" (all tokens).
        representation_size: width of the tanh layer before the head (`pre_logits`); 0 for none.
        gelu: "tanh" (Flax's default, all JAX checkpoints) or "erf".
        norm_epsilon: epsilon of every LayerNorm.
        outputs: its outputs; () for logits, or for features if there is no head.
    """

    family: str
    variant: str
    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    patch_size: int
    image_size: tuple[int, int]
    num_classes: int
    pool: str
    representation_size: int = 0
    gelu: str = "tanh"
    norm_epsilon: float = 1e-6
    outputs: tuple[str, ...] = ()

    @property
    def given(self) -> tuple[str, ...]:
        """Its outputs, by name."""
        return self.outputs or given_usually(self.num_classes)

    @property
    def pools(self) -> bool:
        """Whether any output pools all tokens."""
        return not {"logits", "features"}.isdisjoint(self.given)

    @property
    def grid(self) -> tuple[int, int]:
        """Patches down and across."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    @property
    def num_tokens(self) -> int:
        """Tokens of an image in the encoder: its patches, and the class token if there is one."""
        return self.grid[0] * self.grid[1] + (self.pool == "tok")


def signature_of(architecture: Architecture) -> Signature:
    """Images in; logits out (features if there is no head, for each token if they are not pooled), or the requested
    outputs."""
    a = architecture
    tokens = (a.num_tokens,) if a.pool == "none" else ()
    return classifier_signature(
        a.image_size, a.num_classes, a.representation_size or a.width, tokens, a.outputs, (*a.grid, a.width)
    )
