"""The vision transformer of google-research/vision_transformer and big_vision, in Flax Linen, with a tap after every
block."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_convert.families import run as parts
from vit_convert.families.vit.architecture import Architecture

Taps = dict[str, jax.Array]


class MlpBlock(nn.Module):
    """Two dense layers with a GELU between (arXiv:2010.11929, section 3.1)."""

    architecture: Architecture

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:  # [B, S, D] -> [B, S, D]
        width = x.shape[-1]
        x = nn.Dense(self.architecture.mlp_dim)(x)
        x = nn.gelu(x, approximate=self.architecture.gelu == "tanh")
        return nn.Dense(width)(x)


class EncoderBlock(nn.Module):
    """Pre-norm attention and MLP, each added to the residual stream."""

    architecture: Architecture

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:  # [B, S, D] -> [B, S, D]
        arch = self.architecture
        y = nn.LayerNorm(epsilon=arch.norm_epsilon)(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=arch.num_heads, deterministic=True)(y, y)
        y = nn.LayerNorm(epsilon=arch.norm_epsilon)(x)
        return x + MlpBlock(arch)(y)


class Encoder(nn.Module):
    """The stack of blocks and its final norm, under the names that checkpoints use."""

    architecture: Architecture

    def setup(self) -> None:
        self.encoderblock = [EncoderBlock(self.architecture) for _ in range(self.architecture.depth)]
        self.encoder_norm = nn.LayerNorm(epsilon=self.architecture.norm_epsilon)

    def __call__(self, x: jax.Array) -> tuple[jax.Array, Taps]:  # [B, S, D]
        taps = {}
        for i, block in enumerate(self.encoderblock):
            x = taps[f"block_{i:02d}"] = block(x)
        x = taps["encoder_norm"] = self.encoder_norm(x)
        return x, taps


class MAPHead(nn.Module):
    """Multi-head attention pooling: one learned probe attends to all tokens (big_vision, models/vit.py)."""

    architecture: Architecture

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:  # [B, S, D] -> [B, D]
        arch = self.architecture
        probe = self.param("probe", nn.initializers.xavier_uniform(), (1, 1, arch.width))
        probe = jnp.tile(probe, [x.shape[0], 1, 1])
        x = nn.MultiHeadDotProductAttention(num_heads=arch.num_heads, deterministic=True)(probe, x)  # [B, 1, D]
        y = nn.LayerNorm(epsilon=arch.norm_epsilon)(x)
        x = x + MlpBlock(arch)(y)
        return x[:, 0]


class ViT(nn.Module):
    """A vision transformer on the canonical parameters of `vit_convert.checkpoint`.

    The position table covers only the patches and is added before the class token is prepended, as in big_vision; the
    loader folds vit_jax's extra row into `cls`, which computes the same function.

    Args:
        architecture: what to build.
    """

    architecture: Architecture

    def setup(self) -> None:
        arch = self.architecture
        patch = (arch.patch_size, arch.patch_size)
        rows, columns = arch.grid
        self.embedding = nn.Conv(arch.width, patch, strides=patch, padding="VALID")
        self.pos_embedding = self.param(
            "pos_embedding", nn.initializers.normal(arch.width**-0.5), (1, rows * columns, arch.width)
        )
        if arch.pool == "tok":
            self.cls = self.param("cls", nn.initializers.zeros, (1, 1, arch.width))
        self.Transformer = Encoder(arch)
        if not arch.pools:
            return
        if arch.pool == "map":
            self.MAPHead_0 = MAPHead(arch)
        if arch.representation_size:
            self.pre_logits = nn.Dense(arch.representation_size)
        if arch.num_classes:
            self.head = nn.Dense(arch.num_classes)

    def __call__(self, images: jax.Array) -> tuple[jax.Array, Taps]:
        """Classifies images.

        Args:
            images: float32 [batch, height, width, 3], normalised as the preprocessing record says.

        Returns:
            The first output of `classify`, and by name the others and the taps: `block_00`… and `encoder_norm`,
            each [batch, tokens, width].
        """
        x, taps = self.Transformer(self.embed(images))
        return parts.with_first(self.classify(x), taps)

    def embed(self, images: jax.Array) -> jax.Array:
        """Patches, positions and the class token: [batch, height, width, 3] -> [batch, tokens, width]."""
        x = self.embedding(images)  # [B, h, w, D]
        x = x.reshape(x.shape[0], -1, x.shape[-1]) + self.pos_embedding
        if self.architecture.pool == "tok":
            x = jnp.concatenate([jnp.tile(self.cls, [x.shape[0], 1, 1]), x], axis=1)
        return x

    def normalize(self, x: jax.Array) -> jax.Array:
        """The encoder's final norm: [batch, tokens, width] -> the same."""
        return self.Transformer.encoder_norm(x)

    def classify(self, x: jax.Array) -> Taps:
        """The architecture's outputs, from [batch, tokens, width].

        Returns:
            `logits` [batch, num_classes] and `features` [batch, width], each of every token with pool "none"; `tokens`
            [batch, patches, width], without the class token, and `grid` [batch, rows, columns, width].
        """
        arch, found = self.architecture, {}
        if arch.pools:
            found["features"] = self.pool(x)
            if arch.num_classes:
                found["logits"] = self.head(found["features"])
        if "tokens" in arch.given or "grid" in arch.given:
            found["tokens"] = x[:, 1:] if arch.pool == "tok" else x
            found["grid"] = found["tokens"].reshape(x.shape[0], *arch.grid, x.shape[-1])
        return {name: found[name] for name in arch.given}

    def pool(self, x: jax.Array) -> jax.Array:
        """Pooling and representation layer: [batch, tokens, width] -> features."""
        if self.architecture.pool == "map":
            x = self.MAPHead_0(x)
        elif self.architecture.pool == "gap":
            x = jnp.mean(x, axis=1)
        elif self.architecture.pool == "tok":
            x = x[:, 0]
        return nn.tanh(self.pre_logits(x)) if self.architecture.representation_size else x


def param_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter under its `/`-joined name, without allocating any."""
    return parts.param_shapes(ViT(architecture), architecture.image_size)
