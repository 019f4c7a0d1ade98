"""The vision transformer as google-research/vision_transformer publishes it (vit_jax/models_vit.py and checkpoint.py),
for the peers.

Dropout and the types that inference does not use are left out; names, order of operations and defaults are the
original's.
"""

import collections
import re
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax import traverse_util


class AddPositionEmbs(nn.Module):
    """Adds the learned position table."""

    @nn.compact
    def __call__(self, inputs):
        shape = (1, inputs.shape[1], inputs.shape[2])
        return inputs + self.param("pos_embedding", nn.initializers.normal(stddev=0.02), shape)


class MlpBlock(nn.Module):
    """Two dense layers."""

    mlp_dim: int

    @nn.compact
    def __call__(self, inputs, *, deterministic):
        x = nn.Dense(self.mlp_dim)(inputs)
        x = nn.gelu(x)
        x = nn.Dropout(rate=0.0)(x, deterministic=deterministic)
        output = nn.Dense(inputs.shape[-1])(x)
        return nn.Dropout(rate=0.0)(output, deterministic=deterministic)


class Encoder1DBlock(nn.Module):
    """One block."""

    mlp_dim: int
    num_heads: int

    @nn.compact
    def __call__(self, inputs, *, deterministic):
        x = nn.LayerNorm()(inputs)
        x = nn.MultiHeadDotProductAttention(
            kernel_init=nn.initializers.xavier_uniform(),
            broadcast_dropout=False,
            deterministic=deterministic,
            dropout_rate=0.0,
            num_heads=self.num_heads,
        )(x, x)
        x = nn.Dropout(rate=0.0)(x, deterministic=deterministic)
        x = x + inputs
        y = nn.LayerNorm()(x)
        y = MlpBlock(mlp_dim=self.mlp_dim)(y, deterministic=deterministic)
        return x + y


class Encoder(nn.Module):
    """Position table, blocks, final norm."""

    num_layers: int
    mlp_dim: int
    num_heads: int

    @nn.compact
    def __call__(self, x, *, train):
        x = AddPositionEmbs(name="posembed_input")(x)
        x = nn.Dropout(rate=0.0)(x, deterministic=not train)
        for layer in range(self.num_layers):
            x = Encoder1DBlock(mlp_dim=self.mlp_dim, num_heads=self.num_heads, name=f"encoderblock_{layer}")(
                x, deterministic=not train
            )
        return nn.LayerNorm(name="encoder_norm")(x)


class VisionTransformer(nn.Module):
    """The model, with the class token as its classifier."""

    num_classes: int
    patch: int
    hidden_size: int
    num_layers: int
    mlp_dim: int
    num_heads: int

    @nn.compact
    def __call__(self, inputs, *, train):
        patch = (self.patch, self.patch)
        x = nn.Conv(features=self.hidden_size, kernel_size=patch, strides=patch, padding="VALID", name="embedding")(
            inputs
        )
        n, h, w, c = x.shape
        x = jnp.reshape(x, [n, h * w, c])
        cls = self.param("cls", nn.initializers.zeros, (1, 1, c))
        x = jnp.concatenate([jnp.tile(cls, [n, 1, 1]), x], axis=1)
        x = Encoder(num_layers=self.num_layers, mlp_dim=self.mlp_dim, num_heads=self.num_heads, name="Transformer")(
            x, train=train
        )
        return nn.Dense(features=self.num_classes, name="head", kernel_init=nn.initializers.zeros)(x[:, 0])


def load(path: str) -> tuple[VisionTransformer, dict[str, Any]]:
    """Reads a published `.npz` into JAX, as checkpoint.load does, and makes the model that it is for.

    Args:
        path: the checkpoint, pre-Linen names included.

    Returns:
        The module and its parameters as jax arrays.
    """
    with np.load(path, allow_pickle=False) as file:
        params = traverse_util.unflatten_dict({name: jnp.asarray(file[name]) for name in file.files}, sep="/")
    params = _convert_pre_linen(params)
    encoder, embedding = params["Transformer"], params["embedding"]["kernel"]
    block = encoder["encoderblock_0"]
    model = VisionTransformer(
        num_classes=params["head"]["kernel"].shape[1],
        patch=embedding.shape[0],
        hidden_size=embedding.shape[3],
        num_layers=sum(name.startswith("encoderblock_") for name in encoder),
        mlp_dim=block["MlpBlock_0"]["Dense_0"]["kernel"].shape[1],
        num_heads=block["MultiHeadDotProductAttention_0"]["query"]["kernel"].shape[1],
    )
    return model, params


def _convert_pre_linen(params: Any) -> Any:
    """Numbers the modules of each class from 0, as checkpoint.convert_pre_linen does."""
    if not isinstance(params, dict):
        return params
    renamed, counts = {}, collections.Counter()
    for name in sorted(
        params, key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
    ):
        new = name
        if match := re.match(r"([A-Z].*_)(\d+)$", name):
            new = f"{match[1]}{counts[match[1]]}"
            counts[match[1]] += 1
        renamed[new] = _convert_pre_linen(params[name])
    return renamed
