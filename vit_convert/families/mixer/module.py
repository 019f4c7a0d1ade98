"""MLP-Mixer of google-research/vision_transformer (arXiv:2105.01601), in Flax Linen, with taps after both halves of
every block."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vit_convert.core.model import Arrays, Model
from vit_convert.core.stack import Stack
from vit_convert.families import run as parts
from vit_convert.families.head import classifier_signature
from vit_convert.families.mixer.architecture import BLOCK, Mixer

Taps = dict[str, jax.Array]


class MlpBlock(nn.Module):
    """Two dense layers with a tanh GELU between, over the last axis."""

    hidden: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:  # [..., D] -> [..., D]
        y = nn.gelu(nn.Dense(self.hidden)(x), approximate=True)
        return nn.Dense(x.shape[-1])(y)


class MixerBlock(nn.Module):
    """An MLP over the tokens of each channel, then one over the channels of each token, each added to the residual
    stream."""

    architecture: Mixer

    def setup(self) -> None:
        arch = self.architecture
        self.norms = [nn.LayerNorm(epsilon=arch.norm_epsilon, name=f"LayerNorm_{i}") for i in range(2)]
        self.token_mixing = MlpBlock(arch.tokens_mlp_dim)
        self.channel_mixing = MlpBlock(arch.channels_mlp_dim)

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Computes a block.

        Args:
            x: [batch, tokens, width].

        Returns:
            The residual stream after token mixing, and after the block, both shaped as x.
        """
        y = jnp.swapaxes(self.norms[0](x), 1, 2)  # [B, D, N]
        mixed = x + jnp.swapaxes(self.token_mixing(y), 1, 2)
        return mixed, mixed + self.channel_mixing(self.norms[1](mixed))


class MlpMixer(nn.Module):
    """A Mixer on the canonical parameters of `families.mixer`.

    Args:
        architecture: what to build.
    """

    architecture: Mixer

    def setup(self) -> None:
        arch = self.architecture
        patch = (arch.patch_size, arch.patch_size)
        # the image size is a multiple of the patch's
        self.stem = nn.Conv(arch.width, patch, strides=patch, padding="VALID")
        self.MixerBlock = [MixerBlock(arch) for _ in range(arch.depth)]
        self.pre_head_layer_norm = nn.LayerNorm(epsilon=arch.norm_epsilon)
        if arch.num_classes:
            self.head = nn.Dense(arch.num_classes)

    def __call__(self, images: jax.Array) -> tuple[jax.Array, Taps]:
        """Classifies images.

        Args:
            images: float32 [batch, height, width, 3] of the architecture's size, normalised to [-1, 1].

        Returns:
            The first output of `classify`, and by name the others and the taps, each [batch, tokens, width]:
            `block_00/token_mixing` and `block_00` for every block, and `pre_head_layer_norm`.
        """
        x, taps = self.embed(images), {}
        for i, block in enumerate(self.MixerBlock):
            taps[f"block_{i:02d}/token_mixing"], x = block(x)
            taps[f"block_{i:02d}"] = x
        x = taps["pre_head_layer_norm"] = self.normalize(x)
        return parts.with_first(self.classify(x), taps)

    def embed(self, images: jax.Array) -> jax.Array:
        """Patches: [batch, height, width, 3] -> [batch, tokens, width]."""
        x = self.stem(images)
        return x.reshape(x.shape[0], -1, x.shape[-1])

    def normalize(self, x: jax.Array) -> jax.Array:
        """The last norm: [batch, tokens, width] -> the same."""
        return self.pre_head_layer_norm(x)

    def classify(self, x: jax.Array) -> Taps:
        """The requested outputs, from [batch, tokens, width]: `logits`, `features` (the mean of the tokens), `tokens`,
        and `grid` [batch, rows, columns, width]."""
        arch = self.architecture
        found = {"features": jnp.mean(x, axis=1), "tokens": x}
        found["grid"] = x.reshape(x.shape[0], *arch.grid, x.shape[-1])
        if arch.num_classes:
            found["logits"] = self.head(found["features"])
        return {name: found[name] for name in arch.given}


def mixer_model(architecture: Mixer, params: Mapping[str, np.ndarray]) -> Model:
    """The model with canonical parameters; two of its blocks are traced, and the graph repeats the second.

    Args:
        architecture: what to build.
        params: canonical parameters.

    Returns:
        The model.
    """
    # 16 nodes compared with a ViT's 29; with GELU and LayerNorm in primitives, 44 compared with 50
    stack = Stack(f"{BLOCK}{{}}/", architecture.depth, nodes=0.9)
    traced = dataclasses.replace(architecture, depth=stack.traced)
    width, names = architecture.width, architecture.given
    norm = [] if "tokens" in names else ["pre_head_layer_norm"]  # otherwise it is an output

    def apply(leaves: Arrays, images: jax.Array) -> Arrays:
        return parts.by_name(MlpMixer(traced).apply(parts.nested(leaves), images), names, [*_taps(stack.cut()), *norm])

    return Model(
        signature=classifier_signature(
            architecture.image_size, architecture.num_classes, width, (), names, (*architecture.grid, width)
        ),
        params=params,
        taps=[*_taps(stack), *norm],
        apply=apply,
        traced_shapes=parts.param_shapes(MlpMixer(traced), architecture.image_size),
        traced_taps=[*_taps(stack.cut()), *norm],
        run=_runner(architecture, params, stack),
        stacks=(stack,),
        kind=architecture,
    )


def _taps(stack: Stack) -> list[str]:
    blocks = [(f"{stack.tap(i)}/token_mixing", stack.tap(i)) for i in range(stack.depth)]
    return [tap for block in blocks for tap in block]


def _runner(
    architecture: Mixer, params: Mapping[str, np.ndarray], stack: Stack
) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    block = parts.compiled(MixerBlock(architecture))
    methods = (MlpMixer.embed, MlpMixer.normalize, MlpMixer.classify)
    embed, normalize, classify = (parts.compiled(MlpMixer(architecture), method) for method in methods)

    def run(images: np.ndarray) -> dict[str, np.ndarray]:
        variables, results = parts.outside(params, [BLOCK]), {}
        with jax.default_matmul_precision("highest"):
            x: Any = embed(variables, jnp.asarray(images))
            for i in range(stack.depth):
                mixed, x = block({"params": parts.under(params, stack.prefix(i))}, x)
                results[f"{stack.tap(i)}/token_mixing"], results[stack.tap(i)] = np.asarray(mixed), np.asarray(x)
            x = normalize(variables, x)
            results["pre_head_layer_norm"] = np.asarray(x)
            results |= {name: np.asarray(value) for name, value in classify(variables, x).items()}
        return results

    return run
