"""The hybrids of google-research/vision_transformer, in Flax Linen: a ResNet with GroupNorm, whose feature map the ViT
embeds.

Convolutions are over [batch, channels, height, width], as in ONNX and TensorRT, so that the graph needs no transposes
between them.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from vit_convert.core.model import Arrays, Model
from vit_convert.core.stack import Stack
from vit_convert.families import run as parts
from vit_convert.families.hybrid.architecture import GROUPS, NORM_EPSILON, Hybrid, Unit, signature_of
from vit_convert.families.vit.model import gives_norm
from vit_convert.families.vit.module import EncoderBlock, Taps, ViT
from vit_convert.families.vit.shapes import BLOCK

_NCHW = ("NCHW", "HWIO", "NCHW")


class Conv(nn.Module):
    """A convolution without bias, with SAME padding; its kernel, [height, width, inputs, outputs], is already
    standardised."""

    features: int
    side: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:  # [B, C, H, W] -> [B, features, ceil(H / stride), ceil(W / stride)]
        shape = (self.side, self.side, x.shape[1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        return lax.conv_general_dilated(x, kernel, (self.stride, self.stride), "SAME", dimension_numbers=_NCHW)


class GroupNorm(nn.Module):
    """GroupNorm over 32 groups, as a LayerNorm of each group's values, followed by a scale and bias for each channel.

    Every TensorRT's parser reads LayerNormalization and keeps its statistics in float32 when the graph is fp16;
    TensorRT 8.6 cannot import GroupNormalization, and others compute it wrongly (NVIDIA/TensorRT#4336).
    """

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:  # [B, C, H, W] -> the same
        channels = x.shape[1]
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        groups = x.reshape(x.shape[0], GROUPS, -1)
        normal = nn.LayerNorm(epsilon=NORM_EPSILON, use_scale=False, use_bias=False)(groups)
        by_channel = (1, channels, 1, 1)
        return normal.reshape(x.shape) * scale.reshape(by_channel) + bias.reshape(by_channel)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions beside a shortcut; post-activation, as in the first ResNet."""

    unit: Unit

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:  # [B, C, H, W]
        unit = self.unit
        residual = x
        if unit.projects:
            residual = GroupNorm(name="gn_proj")(Conv(4 * unit.width, 1, unit.stride, name="conv_proj")(x))
        y = nn.relu(GroupNorm(name="gn1")(Conv(unit.width, 1, name="conv1")(x)))
        y = nn.relu(GroupNorm(name="gn2")(Conv(unit.width, 3, unit.stride, name="conv2")(y)))
        y = GroupNorm(name="gn3")(Conv(4 * unit.width, 1, name="conv3")(y))
        return nn.relu(residual + y)


class Stage(nn.Module):
    """Bottlenecks of one width."""

    units: tuple[Unit, ...]

    @nn.compact
    def __call__(self, x: jax.Array) -> list[jax.Array]:
        outputs = []
        for i, unit in enumerate(self.units):
            x = Bottleneck(unit, name=f"block_{i}")(x)
            outputs.append(x)
        return outputs


class HybridViT(ViT):
    """A hybrid on the canonical parameters of `families.hybrid`: the ViT, with a ResNet in front.

    Args:
        architecture: the trunk, for the size of the feature map.
        stages: the units of each stage.
        root_width: channels of the stem.
    """

    stages: tuple[tuple[Unit, ...], ...] = ()
    root_width: int = 64

    def setup(self) -> None:
        super().setup()
        self.conv_root = Conv(self.root_width, 7, 2)
        self.gn_root = GroupNorm()
        for i, units in enumerate(self.stages, 1):
            setattr(self, f"stage_{i}", Stage(units))

    def __call__(self, images: jax.Array) -> tuple[jax.Array, Taps]:
        """Classifies images.

        Args:
            images: float32 [batch, height, width, 3], normalised as the preprocessing record says.

        Returns:
            The first output, and by name the others and the taps: `root`, `stage_1/block_00`… [batch, channels, height,
            width] after each bottleneck, then the ViT's.
        """
        features, taps = self.resnet(images)
        x, trunk_taps = self.Transformer(self.embed_features(features))
        return parts.with_first(self.classify(x), taps | trunk_taps)

    def resnet(self, images: jax.Array) -> tuple[jax.Array, Taps]:
        """[batch, height, width, 3] -> the feature map [batch, channels, h, w], and the taps on the way."""
        x = nn.relu(self.gn_root(self.conv_root(jnp.transpose(images, (0, 3, 1, 2)))))
        x = nn.max_pool(jnp.transpose(x, (0, 2, 3, 1)), window_shape=(3, 3), strides=(2, 2), padding="SAME")
        x = jnp.transpose(x, (0, 3, 1, 2))
        taps = {"root": x}
        for i in range(1, len(self.stages) + 1):
            for unit, result in enumerate(getattr(self, f"stage_{i}")(x)):
                x = taps[f"stage_{i}/block_{unit:02d}"] = result
        return x, taps

    def embed(self, images: jax.Array) -> jax.Array:
        """[batch, height, width, 3] -> [batch, tokens, width]."""
        return self.embed_features(self.resnet(images)[0])

    def embed_features(self, features: jax.Array) -> jax.Array:
        """[batch, channels, h, w] -> [batch, tokens, width]."""
        return super().embed(jnp.transpose(features, (0, 2, 3, 1)))


def module_of(architecture: Hybrid) -> HybridViT:
    """The Flax module of an architecture."""
    stages = (
        tuple(units) for _, units in itertools.groupby(architecture.units(), key=lambda unit: unit.scope.split("/")[0])
    )
    return HybridViT(architecture.trunk, tuple(stages), architecture.root_width)


def hybrid_model(architecture: Hybrid, params: Mapping[str, np.ndarray]) -> Model:
    """The model of canonical parameters; the ResNet is traced completely, but only two of the encoder's blocks, and the
    graph repeats the second.

    Args:
        architecture: what to build.
        params: canonical parameters.

    Returns:
        The model.
    """
    trunk = architecture.trunk
    encoder = Stack(f"{BLOCK}{{}}/", trunk.depth)
    stages = [
        Stack(f"stage_{i}/block_{{}}/", depth, f"stage_{i}/block_{{:02d}}", nodes=1.25)
        for i, depth in enumerate(architecture.stages, 1)
    ]
    resnet = ["root", *(stack.tap(i) for stack in stages for i in range(stack.depth))]
    traced = module_of(dataclasses.replace(architecture, trunk=dataclasses.replace(trunk, depth=encoder.traced)))
    names = trunk.given
    norm = [] if gives_norm(trunk) else ["encoder_norm"]  # otherwise it is an output

    def apply(leaves: Arrays, images: jax.Array) -> Arrays:
        return parts.by_name(traced.apply(parts.nested(leaves), images), names, taps(encoder.cut()))

    def taps(stack: Stack) -> list[str]:
        return [*resnet, *(stack.tap(i) for i in range(stack.depth)), *norm]

    return Model(
        signature=signature_of(architecture),
        params=params,
        taps=taps(encoder),
        apply=apply,
        traced_shapes=parts.param_shapes(traced, architecture.image_size),
        traced_taps=taps(encoder.cut()),
        run=_runner(architecture, params, encoder),
        stacks=(*stages, encoder),
        kind=architecture,
        pooled_token=0 if trunk.pool == "tok" else None,
    )


def _runner(
    architecture: Hybrid, params: Mapping[str, np.ndarray], encoder: Stack
) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    block, module = parts.compiled(EncoderBlock(architecture.trunk)), module_of(architecture)
    methods = (HybridViT.resnet, HybridViT.embed_features, HybridViT.normalize, HybridViT.classify)
    resnet, embed, normalize, classify = (parts.compiled(module, method) for method in methods)

    def run(images: np.ndarray) -> dict[str, np.ndarray]:
        variables = parts.outside(params, [BLOCK])
        with jax.default_matmul_precision("highest"):
            features, taps = resnet(variables, jnp.asarray(images))
            results = {name: np.asarray(value) for name, value in taps.items()}
            x: Any = embed(variables, features)
            for i in range(encoder.depth):
                x = block({"params": parts.under(params, encoder.prefix(i))}, x)
                results[encoder.tap(i)] = np.asarray(x)
            x = normalize(variables, x)
            results["encoder_norm"] = np.asarray(x)
            results |= {name: np.asarray(value) for name, value in classify(variables, x).items()}
        return results

    return run
