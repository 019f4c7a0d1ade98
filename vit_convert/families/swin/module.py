"""Swin (arXiv:2103.14030), in Flax Linen. There is no public Flax checkpoint of it, so the names are ours.

Between attentions the tokens [batch, tokens, width] are in window order: a block with unshifted windows moves nothing,
one with shifted windows moves the tokens there and back, and LayerNorms and MLPs work in any order.
"""

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
from vit_convert.families.swin.architecture import MLP_RATIO, PATCH, Swin
from vit_convert.families.swin.windows import bias_shape

Taps = dict[str, jax.Array]


def to_windows(x: jax.Array, window: int) -> jax.Array:
    """[batch, rows, columns, width] -> [batch, tokens, width], window after window and row by row in each."""
    _, rows, columns, width = x.shape
    if (rows, columns) == (window, window):
        return x.reshape(-1, rows * columns, width)
    x = x.reshape(-1, rows // window, window, columns // window, window, width)
    return jnp.transpose(x, (0, 1, 3, 2, 4, 5)).reshape(-1, rows * columns, width)


def from_windows(x: jax.Array, window: int, grid: tuple[int, int]) -> jax.Array:
    """The inverse of `to_windows`: -> [batch, rows, columns, width]."""
    rows, columns = grid
    width = x.shape[-1]
    if grid == (window, window):
        return x.reshape(-1, rows, columns, width)
    x = x.reshape(-1, rows // window, columns // window, window, window, width)
    return jnp.transpose(x, (0, 1, 3, 2, 4, 5)).reshape(-1, rows, columns, width)


def roll(x: jax.Array, shift: int) -> jax.Array:
    """Moves tokens [batch, rows, columns, width] up and to the left by `shift`, or down and to the right if it is
    negative.

    Slices and a Concat for each axis: ONNX has no Roll.
    """
    for axis in (1, 2):
        split = shift % x.shape[axis]
        head, tail = (
            jax.lax.slice_in_dim(x, 0, split, axis=axis),
            jax.lax.slice_in_dim(x, split, x.shape[axis], axis=axis),
        )
        x = jnp.concatenate([tail, head], axis=axis)
    return x


class WindowAttention(nn.Module):
    """Attention within each window, with a bias for each pair of positions. The query's weights already include the
    factor 1/√d.

    Args:
        num_heads: heads.
        window: side of a window in tokens.
        bias_shape: shape of what is added to the scores, from `windows.bias_shape`.
    """

    num_heads: int
    window: int
    bias_shape: tuple[int, int, int, int]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:  # [batch, tokens, width] in window order -> the same
        _, tokens, width = x.shape
        bias = self.param("bias", nn.initializers.zeros, self.bias_shape)
        area, size = self.window**2, width // self.num_heads
        # windows with a bias of their own: all of an image, or one for all
        windows = self.bias_shape[1] // self.num_heads

        def heads(name: str, *axes: int) -> jax.Array:
            """[batch · windows, heads, w², size]; the windows of an image are merged with its heads if each has its own
            bias."""
            y = nn.Dense(width, name=name)(x).reshape(-1, area, self.num_heads, size)
            y = jnp.transpose(y, axes)
            return y if windows == 1 else y.reshape(-1, windows * self.num_heads, *y.shape[2:])

        query, key, value = heads("query", 0, 2, 1, 3), heads("key", 0, 2, 3, 1), heads("value", 0, 2, 1, 3)
        weights = nn.softmax(jnp.matmul(query, key) + bias, axis=-1)
        y = jnp.matmul(weights, value).reshape(-1, self.num_heads, area, size)
        return nn.Dense(width, name="out")(jnp.transpose(y, (0, 2, 1, 3)).reshape(-1, tokens, width))


class Mlp(nn.Module):
    """Two dense layers with an erf GELU between."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:  # [..., width] -> the same
        width = x.shape[-1]
        return nn.Dense(width, name="fc2")(nn.gelu(nn.Dense(MLP_RATIO * width, name="fc1")(x), approximate=False))


class Block(nn.Module):
    """Pre-norm window attention and MLP, each added to the residual stream."""

    architecture: Swin
    stage: int
    block: int

    def setup(self) -> None:
        arch = self.architecture
        self.norm1 = nn.LayerNorm(epsilon=arch.norm_epsilon)
        self.attn = WindowAttention(arch.num_heads[self.stage], arch.window, bias_shape(arch, self.stage, self.block))
        self.norm2 = nn.LayerNorm(epsilon=arch.norm_epsilon)
        self.mlp = Mlp()

    def __call__(self, x: jax.Array) -> jax.Array:  # [batch, tokens, width] -> the same
        shift = self.architecture.shift(self.stage, self.block)
        x = self._rolled(x, shift)
        x = x + self.attn(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return self._rolled(x, -shift)

    def _rolled(self, x: jax.Array, shift: int) -> jax.Array:
        if not shift:
            return x
        window = self.architecture.window
        return to_windows(roll(from_windows(x, window, self.architecture.grid(self.stage)), shift), window)


class PatchMerging(nn.Module):
    """Four neighbours side by side, normalised, and mapped to twice the width."""

    architecture: Swin

    @nn.compact
    # [batch, rows, columns, width] -> [batch, rows / 2, columns / 2, 2 width]
    def __call__(self, x: jax.Array) -> jax.Array:
        _, rows, columns, width = x.shape
        x = x.reshape(-1, rows // 2, 2, columns // 2, 2, width)
        # first the two of a column
        x = jnp.transpose(x, (0, 1, 3, 4, 2, 5)).reshape(-1, rows // 2, columns // 2, 4 * width)
        x = nn.LayerNorm(epsilon=self.architecture.norm_epsilon, name="norm")(x)
        return nn.Dense(2 * width, use_bias=False, name="reduction")(x)


class Stage(nn.Module):
    """Blocks of one width, and the merging of their tokens if another stage follows."""

    architecture: Swin
    stage: int

    def setup(self) -> None:
        self.block = [
            Block(self.architecture, self.stage, block) for block in range(self.architecture.depths[self.stage])
        ]
        if self.stage < len(self.architecture.depths) - 1:
            self.downsample = PatchMerging(self.architecture)

    def __call__(self, x: jax.Array) -> tuple[jax.Array, Taps]:  # [batch, tokens, width] -> what the next stage reads
        taps = {}
        for i, block in enumerate(self.block):
            x = taps[f"stage_{self.stage}/block_{i:02d}"] = block(x)
        return self.merge(x), taps

    def merge(self, x: jax.Array) -> jax.Array:
        """[batch, tokens, width] -> [batch, tokens / 4, 2 width], also in window order; unchanged after the last
        stage."""
        arch = self.architecture
        if self.stage == len(arch.depths) - 1:
            return x
        return to_windows(self.downsample(from_windows(x, arch.window, arch.grid(self.stage))), arch.window)


class PatchEmbed(nn.Module):
    """Patches of 4x4 pixels, normalised."""

    architecture: Swin

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:  # [batch, height, width, 3] -> [batch, rows, columns, width]
        arch = self.architecture
        x = nn.Conv(arch.width, (PATCH, PATCH), strides=(PATCH, PATCH), padding="VALID", name="proj")(images)
        return nn.LayerNorm(epsilon=arch.norm_epsilon, name="norm")(x)


class SwinTransformer(nn.Module):
    """A Swin on the canonical parameters of `families.swin`.

    Args:
        architecture: what to build.
    """

    architecture: Swin

    def setup(self) -> None:
        arch = self.architecture
        self.patch_embed = PatchEmbed(arch)
        self.stage = [Stage(arch, stage) for stage in range(len(arch.depths))]
        self.norm = nn.LayerNorm(epsilon=arch.norm_epsilon)
        if arch.num_classes:
            self.head = nn.Dense(arch.num_classes)

    def __call__(self, images: jax.Array) -> tuple[jax.Array, Taps]:
        """Classifies images.

        Args:
            images: float32 [batch, height, width, 3] of the architecture's size, normalised by ImageNet's mean and
                standard deviation.

        Returns:
            The first output of `classify`, and by name the others and the taps:
            `stage_0/block_00`…, each [batch, tokens, width] in the order of unshifted windows, and `norm`.
        """
        x = self.embed(images)
        taps: Taps = {}
        for stage in self.stage:
            x, found = stage(x)
            taps |= found
        x = taps["norm"] = self.normalize(x)
        return parts.with_first(self.classify(x), taps)

    def embed(self, images: jax.Array) -> jax.Array:
        """Patches: [batch, height, width, 3] -> [batch, tokens, width]."""
        return to_windows(self.patch_embed(images), self.architecture.window)

    def merge(self, x: jax.Array, stage: int) -> jax.Array:
        """What follows a stage's blocks."""
        return self.stage[stage].merge(x)

    def normalize(self, x: jax.Array) -> jax.Array:
        """The last norm: [batch, tokens, width] -> the same."""
        return self.norm(x)

    def classify(self, x: jax.Array) -> Taps:
        """The requested outputs, from [batch, tokens, width] in window order: `logits`, `features` (the mean of the
        tokens), `grid` [batch, rows, columns, width] of the last stage, and `tokens`, its positions row by row."""
        arch = self.architecture
        given, found = arch.given, {"features": jnp.mean(x, axis=1)}
        if arch.num_classes:
            found["logits"] = self.head(found["features"])
        if "tokens" in given or "grid" in given:
            found["grid"] = from_windows(x, arch.window, arch.grid(len(arch.depths) - 1))
            found["tokens"] = found["grid"].reshape(x.shape)
        return {name: found[name] for name in given}


def swin_model(architecture: Swin, params: Mapping[str, np.ndarray]) -> Model:
    """The model with canonical parameters; four of a stage's blocks are traced, and the graph repeats the last two.

    In a block with shifted windows, about as many nodes move tokens as other blocks have in total.

    Args:
        architecture: what to build.
        params: from `layouts.prepare`.

    Returns:
        The model.
    """
    stacks = tuple(
        Stack(f"stage_{i}/block_{{}}/", depth, f"stage_{i}/block_{{:02d}}", period=1 if depth % 2 else 2, nodes=2.0)
        for i, depth in enumerate(architecture.depths)
    )
    traced = dataclasses.replace(
        architecture, depths=tuple(stack.traced if not stack.depth % 2 else stack.depth for stack in stacks)
    )
    names, last = architecture.given, architecture.grid(len(stacks) - 1)
    # With a single window, the last norm's tokens are already row by row, and are an output.
    norm = [] if "tokens" in names and last == (architecture.window, architecture.window) else ["norm"]

    def apply(leaves: Arrays, images: jax.Array) -> Arrays:
        return parts.by_name(SwinTransformer(traced).apply(parts.nested(leaves), images), names, taps(traced.depths))

    def taps(depths: tuple[int, ...]) -> list[str]:
        return [*(stack.tap(i) for stack, depth in zip(stacks, depths) for i in range(depth)), *norm]

    return Model(
        signature=classifier_signature(
            architecture.image_size,
            architecture.num_classes,
            architecture.features,
            (),
            names,
            (*last, architecture.features),
        ),
        params=params,
        taps=taps(architecture.depths),
        apply=apply,
        traced_shapes=parts.param_shapes(SwinTransformer(traced), architecture.image_size),
        traced_taps=taps(traced.depths),
        run=_runner(architecture, params, stacks),
        stacks=stacks,
        kind=architecture,
    )


def _runner(
    architecture: Swin, params: Mapping[str, np.ndarray], stacks: tuple[Stack, ...]
) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    def compiled(method: Any, **fixed: Any) -> Any:
        return parts.compiled(SwinTransformer(architecture), method, **fixed)

    embed, normalize, classify = map(
        compiled, (SwinTransformer.embed, SwinTransformer.normalize, SwinTransformer.classify)
    )
    merge = [compiled(SwinTransformer.merge, stage=stage) for stage in range(len(stacks))]
    blocks = [[parts.compiled(Block(architecture, stage, parity)) for parity in (0, 1)] for stage in range(len(stacks))]
    scopes = [stack.prefix(i) for stack in stacks for i in range(stack.depth)]

    def run(images: np.ndarray) -> dict[str, np.ndarray]:
        variables, results = parts.outside(params, scopes), {}
        with jax.default_matmul_precision("highest"):
            x: Any = embed(variables, jnp.asarray(images))
            for stage, stack in enumerate(stacks):
                for i in range(stack.depth):
                    x = blocks[stage][i % 2]({"params": parts.under(params, stack.prefix(i))}, x)
                    results[stack.tap(i)] = np.asarray(x)
                x = merge[stage](variables, x)
            x = normalize(variables, x)
            results["norm"] = np.asarray(x)
            results |= {name: np.asarray(value) for name, value in classify(variables, x).items()}
        return results

    return run
