"""Random ViTs, in any of their layouts."""

import dataclasses
import math
import os
import re
from collections.abc import Iterable, Iterator

import numpy as np

from vit_convert.checkpoint.draw import normal, write_npz
from vit_convert.core.errors import UsageError
from vit_convert.families.family import RandomOptions
from vit_convert.families.vit.architecture import Architecture
from vit_convert.families.vit.layouts import Layout, stored_name
from vit_convert.families.vit.shapes import BLOCK, leaf_shapes
from vit_convert.families.vit.variants import architecture_of

OUTLIER = 1.2e3  # mean over tokens; the largest reach about 1.4e3, as in large trained ViTs
_CLASS_ROW_LAYOUTS = (Layout.VIT_JAX, Layout.VIT_JAX_LINEN, Layout.BIG_VISION_OLD)


def write_random_vit(path: str | os.PathLike[str], variant: str, options: RandomOptions) -> Architecture:
    """Writes an uncompressed `.npz`, leaf by leaf, so that memory stays at the size of one leaf.

    Values depend only on the seed and the canonical name: every layout of one seed is the same model. Kernels are
    normal with variance 1/inputs, LayerNorm scales near 1, biases small, position table and class token non-trivial, so
    that logits are of order 1 and every part of the model affects them.

    Args:
        path: the file; appears whole or not at all.
        variant: such as "B/32" or "ViT-S_16-gap-norep".
        options: a ViT supports all of them; the usual image size is 224x224.

    Returns:
        The architecture that was written.

    Raises:
        UsageError: unknown variant, an image size that its patches do not tile, a table that the layout always stores,
            or an odd number of outlier channels.
    """
    form = Layout(options.layout or Layout.VIT_JAX)
    if options.posemb == "sincos2d" and form not in (Layout.BIG_VISION, Layout.BIG_VISION_SCAN):
        raise UsageError(
            f"layout {form.value}: always stores its position table",
            fix="Use big_vision or big_vision_scan for sincos2d.",
        )
    if options.outlier_channels % 2:
        raise UsageError(
            f"outlier_channels {options.outlier_channels}: odd, so the outliers would shift the mean of every "
            "LayerNorm",
            fix="Use an even number.",
        )
    architecture = architecture_of(variant, options.image_size or (224, 224), options.num_classes, pool=options.pool)
    if options.depth is not None:
        architecture = dataclasses.replace(architecture, depth=options.depth)
    if options.pre_logits:
        architecture = dataclasses.replace(architecture, representation_size=architecture.width)
    weights = _Weights(architecture, options.seed, options.outlier_channels)
    members = (
        (options.prefix + name, shape, arrays)
        for name, shape, arrays in weights.stored(form)
        if not (options.posemb == "sincos2d" and name == "pos_embedding")
    )
    write_npz(path, members, options.dtype)
    return architecture


@dataclasses.dataclass(frozen=True)
class _Weights:
    architecture: Architecture
    seed: int
    outlier_channels: int

    def stored(self, layout: Layout) -> Iterator[tuple[str, tuple[int, ...], Iterable[np.ndarray]]]:
        """Yields name, shape and consecutive pieces of every leaf in the layout's form."""
        shapes = leaf_shapes(self.architecture)
        for name, shape in shapes.items():
            place = stored_name(name, layout)
            if layout is Layout.BIG_VISION_SCAN and name.startswith(BLOCK):
                if name.startswith(f"{BLOCK}0/"):
                    rest = name.removeprefix(f"{BLOCK}0/")
                    blocks = range(self.architecture.depth)
                    yield place, (len(blocks), *shape), (self.leaf(f"{BLOCK}{i}/{rest}", shape) for i in blocks)
            elif self.architecture.pool == "tok" and layout in _CLASS_ROW_LAYOUTS and name == "pos_embedding":
                yield place, (1, shape[1] + 1, shape[2]), (self._class_part("row"), self.leaf(name, shape))
            elif layout in _CLASS_ROW_LAYOUTS and name == "cls":
                yield place, shape, (self._class_part("token"),)
            else:
                yield place, shape, (self.leaf(name, shape),)

    def leaf(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """One canonical parameter, float32."""
        if name == "cls":
            return self._class_part("token") + self._class_part("row")
        values = normal(self.seed, name, shape)
        kind = name.rpartition("/")[2]
        if kind == "scale":
            return self._norm_scale(name, 1 + 0.1 * values)
        if kind == "bias":
            return 0.02 * values
        if kind == "pos_embedding":
            return 0.1 * values
        if kind == "probe":
            return values
        is_projection = name.endswith(("query/kernel", "key/kernel", "value/kernel"))
        inputs = shape[0] if is_projection else math.prod(shape[:-1])
        return self._outliers(name, values / np.float32(math.sqrt(inputs)))

    def _class_part(self, part: str) -> np.ndarray:
        # Multiples of 1/256 below 1/2: the sum of the two is exact even in bfloat16, so layouts that store it agree to
        # the bit.
        value = 0.1 * normal(self.seed, f"cls/{part}", (1, 1, self.architecture.width))
        return np.clip(np.rint(value * 256), -127, 127) / np.float32(256)

    def _outlier_columns(self) -> np.ndarray:
        return np.random.default_rng([self.seed, 1]).permutation(self.architecture.width)[: self.outlier_channels]

    def _outliers(self, name: str, kernel: np.ndarray) -> np.ndarray:
        if self.outlier_channels and name == f"{BLOCK}0/MlpBlock_0/Dense_1/kernel":
            # The hidden units' mean is that of GELU over a standard normal, 1/(2 sqrt(pi)); signs alternate to keep the
            # stream's mean.
            signs = np.where(np.arange(self.outlier_channels) % 2, -1.0, 1.0)
            kernel[:, self._outlier_columns()] += signs * OUTLIER * 2 * math.sqrt(math.pi) / self.architecture.mlp_dim
        return kernel

    def _norm_scale(self, name: str, scale: np.ndarray) -> np.ndarray:
        """Compensates, as training does, for the outliers' effect on every later LayerNorm, whose variance they alone
        determine."""
        block = re.match(rf"{BLOCK}(\d+)/", name)
        blocks_before = int(block[1]) if block else self.architecture.depth
        if self.outlier_channels and blocks_before and not name.startswith("MAPHead_0/"):
            deviation = OUTLIER * math.sqrt(self.outlier_channels / self.architecture.width)
            # With these kernels the mean square of the other channels is about the number of blocks passed.
            scale = scale * np.float32(deviation / math.sqrt(blocks_before))
            scale[self._outlier_columns()] *= np.float32(math.sqrt(blocks_before) / OUTLIER)
        return scale
