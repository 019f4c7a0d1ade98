"""SigLIP's towers as google-research/big_vision publishes them (models/vit.py, models/proj/image_text/), for the peers.

Dropout, scanning and the types that inference does not use are left out; names, order of operations and defaults are
the original's.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

FOLDERS = {"image": "img/", "text": "txt/"}


class MlpBlock(nn.Module):
    """Two dense layers."""

    mlp_dim: int

    @nn.compact
    def __call__(self, x):
        width = x.shape[-1]
        x = nn.gelu(nn.Dense(self.mlp_dim)(x))
        return nn.Dense(width)(x)


class Encoder1DBlock(nn.Module):
    """One block."""

    mlp_dim: int
    num_heads: int

    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=self.num_heads, deterministic=True)(y, y)
        y = nn.LayerNorm()(x)
        return x + MlpBlock(self.mlp_dim)(y)


class Encoder(nn.Module):
    """Blocks and final norm."""

    depth: int
    mlp_dim: int
    num_heads: int

    @nn.compact
    def __call__(self, x):
        for layer in range(self.depth):
            x = Encoder1DBlock(self.mlp_dim, self.num_heads, name=f"encoderblock_{layer}")(x)
        return nn.LayerNorm(name="encoder_norm")(x)


class MAPHead(nn.Module):
    """Attention pooling."""

    mlp_dim: int
    num_heads: int

    @nn.compact
    def __call__(self, x):
        n, _, d = x.shape
        probe = self.param("probe", nn.initializers.xavier_uniform(), (1, 1, d))
        probe = jnp.tile(probe, [n, 1, 1])
        x = nn.MultiHeadDotProductAttention(num_heads=self.num_heads, deterministic=True)(probe, x)
        y = nn.LayerNorm()(x)
        return (x + MlpBlock(self.mlp_dim)(y))[:, 0]


class Image(nn.Module):
    """The image tower."""

    patch: int
    width: int
    depth: int
    mlp_dim: int
    num_heads: int

    @nn.compact
    def __call__(self, images):
        patch = (self.patch, self.patch)
        x = nn.Conv(self.width, patch, strides=patch, padding="VALID", name="embedding")(images)
        n, h, w, c = x.shape
        x = jnp.reshape(x, [n, h * w, c])
        x = x + self.param("pos_embedding", nn.initializers.normal(), (1, h * w, c))
        x = Encoder(self.depth, self.mlp_dim, self.num_heads, name="Transformer")(x)
        return _normalized(MAPHead(self.mlp_dim, self.num_heads)(x))


class Text(nn.Module):
    """The text tower, of which the last token is pooled."""

    vocabulary: int
    length: int
    width: int
    depth: int
    mlp_dim: int
    num_heads: int

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(self.vocabulary, self.width)(tokens)
        x = x + self.param("pos_embedding", nn.initializers.normal(), (1, self.length, self.width))
        x = Encoder(self.depth, self.mlp_dim, self.num_heads, name="Encoder_0")(x)
        return _normalized(nn.Dense(self.width, name="head")(x[:, -1]))


def _normalized(x):
    return x / (jnp.linalg.norm(x, axis=1, keepdims=True) + 1e-8)


def load(path: str, tower: str) -> tuple[nn.Module, dict[str, Any]]:
    """Reads one tower of a published `.npz` into JAX, and makes the model that it is for.

    Args:
        path: the checkpoint, its blocks numbered.
        tower: "image" or "text".

    Returns:
        The module, and its parameters.
    """
    with np.load(path) as file:
        flat = {
            name.removeprefix(FOLDERS[tower]): jnp.asarray(file[name])
            for name in file.files
            if name.startswith(FOLDERS[tower])
        }
    encoder = "Transformer" if tower == "image" else "Encoder_0"
    depth = 1 + max(int(name.split("_")[-1].split("/")[0]) for name in _blocks(flat, encoder))
    width, heads, _ = flat[f"{encoder}/encoderblock_0/MultiHeadDotProductAttention_0/query/kernel"].shape
    sizes = {"width": width, "depth": depth, "num_heads": heads}
    sizes["mlp_dim"] = flat[f"{encoder}/encoderblock_0/MlpBlock_0/Dense_0/bias"].shape[0]
    params = traverse_util.unflatten_dict(flat, sep="/")
    if tower == "image":
        return Image(patch=flat["embedding/kernel"].shape[0], **sizes), params
    vocabulary, length = flat["Embed_0/embedding"].shape[0], flat["pos_embedding"].shape[1]
    return Text(vocabulary=vocabulary, length=length, **sizes), params


def _blocks(flat: dict[str, Any], encoder: str) -> set[str]:
    return {name.split("/")[1] for name in flat if name.startswith(f"{encoder}/encoderblock_")}
