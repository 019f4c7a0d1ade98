"""Writes a full-size checkpoint with seeded random weights, in the layout of the published files.

For tests and benchmarks where the names, shapes and magnitudes of the weights matter and their values do not:

    python -m vit_convert.checkpoint.random --variant=B/32 --output=B32.npz
    python -m vit_convert.checkpoint.random --variant=S/16-gap-norep --layout=big_vision_scan --output=S16.npz
    python -m vit_convert.checkpoint.random --variant=B/16 --outlier_channels=4 --output=B16-outliers.npz
"""

import dataclasses
import math
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from absl import flags

from vit_convert.checkpoint.architecture import Architecture
from vit_convert.checkpoint.draw import DTYPES, normal, write_npz
from vit_convert.checkpoint.layouts import Layout, stored_name
from vit_convert.checkpoint.shapes import BLOCK, leaf_shapes
from vit_convert.checkpoint.variants import PUBLISHED, architecture_of
from vit_convert.core.errors import UsageError
from vit_convert.core.program import Program

OUTLIER = 1.2e3  # mean over tokens; the largest reach about 1.4e3, as in large trained ViTs
LAYOUTS = tuple(layout.value for layout in Layout)
POSEMBS = ("learn", "sincos2d")
_CLASS_ROW_LAYOUTS = (Layout.VIT_JAX, Layout.VIT_JAX_LINEN, Layout.BIG_VISION_OLD)


def write_random_checkpoint(
    path: str | os.PathLike[str],
    variant: str,
    *,
    seed: int = 0,
    image_size: tuple[int, int] | None = None,
    num_classes: int = 1000,
    depth: int | None = None,
    layout: str = "vit_jax",
    prefix: str = "",
    dtype: str = "float32",
    pool: str | None = None,
    posemb: str = "learn",
    pre_logits: bool = False,
    outlier_channels: int = 0,
) -> Architecture:
    """Writes an uncompressed `.npz`, leaf by leaf, so that memory stays at the size of one leaf.

    Values depend on the seed and the canonical name alone: every layout of one seed is the same model. Kernels are normal with
    variance 1/inputs, LayerNorm scales near 1, biases small, position table and class token non-trivial, so that logits are of
    order 1 and every part of the model shows in them.

    Args:
        path: the file; appears whole or not at all.
        variant: such as "B/32" or "ViT-S_16-gap-norep".
        seed: of the weights.
        image_size: (height, width) in pixels that the position table is for; None for 224x224.
        num_classes: outputs of the head; 0 leaves it out.
        depth: encoder blocks; None takes the variant's.
        layout: one of LAYOUTS.
        prefix: put in front of every name, such as "params/" or "opt/target/".
        dtype: one of DTYPES.
        pool: "tok", "gap" or "map"; None takes what the variant's name says.
        posemb: "learn", or "sincos2d" to store no table (big_vision layouts alone).
        pre_logits: add the tanh layer before the head, as wide as the model.
        outlier_channels: even number of channels, of alternating sign, in which the residual stream reaches about 1.4e3 from the
            first block on.

    Returns:
        The architecture that was written.

    Raises:
        UsageError: unknown variant, an image size that its patches do not tile, a table that the layout always stores, or an odd
            number of outlier channels.
    """
    form = Layout(layout)
    if posemb == "sincos2d" and form not in (Layout.BIG_VISION, Layout.BIG_VISION_SCAN):
        raise UsageError(f"layout {layout}: always stores its position table", fix="Use big_vision or big_vision_scan for sincos2d.")
    if outlier_channels % 2:
        raise UsageError(
            f"outlier_channels {outlier_channels}: odd, so the outliers would shift the mean of every LayerNorm", fix="Use an even number."
        )
    architecture = architecture_of(variant, image_size or (224, 224), num_classes, pool=pool)
    if depth is not None:
        architecture = dataclasses.replace(architecture, depth=depth)
    if pre_logits:
        architecture = dataclasses.replace(architecture, representation_size=architecture.width)
    weights = _Weights(architecture, seed, outlier_channels)
    stored = ((prefix + name, shape, arrays) for name, shape, arrays in weights.stored(form))
    write_npz(path, (member for member in stored if posemb == "learn" or member[0] != f"{prefix}pos_embedding"), dtype)
    return architecture


@dataclasses.dataclass(frozen=True)
class _Weights:
    architecture: Architecture
    seed: int
    outlier_channels: int

    def stored(self, layout: Layout) -> Iterator[tuple[str, tuple[int, ...], Iterable[np.ndarray]]]:
        """Yields name, shape and consecutive pieces of every leaf as the layout holds it."""
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
        # Multiples of 1/256 below 1/2: the sum of the two is exact even in bfloat16, so layouts that store it agree to the bit.
        value = 0.1 * normal(self.seed, f"cls/{part}", (1, 1, self.architecture.width))
        return np.clip(np.rint(value * 256), -127, 127) / np.float32(256)

    def _outlier_columns(self) -> np.ndarray:
        return np.random.default_rng([self.seed, 1]).permutation(self.architecture.width)[: self.outlier_channels]

    def _outliers(self, name: str, kernel: np.ndarray) -> np.ndarray:
        if self.outlier_channels and name == f"{BLOCK}0/MlpBlock_0/Dense_1/kernel":
            # The hidden units' mean is that of GELU over a standard normal, 1/(2 sqrt(pi)); signs alternate to keep the stream's mean.
            signs = np.where(np.arange(self.outlier_channels) % 2, -1.0, 1.0)
            kernel[:, self._outlier_columns()] += signs * OUTLIER * 2 * math.sqrt(math.pi) / self.architecture.mlp_dim
        return kernel

    def _norm_scale(self, name: str, scale: np.ndarray) -> np.ndarray:
        """Undoes, as training does, what the outliers do to every later LayerNorm: they alone decide its variance."""
        block = re.match(rf"{BLOCK}(\d+)/", name)
        blocks_before = int(block[1]) if block else self.architecture.depth
        if self.outlier_channels and blocks_before and not name.startswith("MAPHead_0/"):
            deviation = OUTLIER * math.sqrt(self.outlier_channels / self.architecture.width)
            # With these kernels the mean square of the other channels is about the number of blocks that they have passed.
            scale = scale * np.float32(deviation / math.sqrt(blocks_before))
            scale[self._outlier_columns()] *= np.float32(math.sqrt(blocks_before) / OUTLIER)
        return scale


_PROGRAM = Program(__doc__, when_interrupted="nothing was written")
_FLAGS = _PROGRAM.flags
_shared: dict[str, Any] = {"flag_values": _FLAGS}
flags.DEFINE_string("variant", "", f"What to write: {', '.join(PUBLISHED)}, mu/16 (tiny), or any width/patch.", **_shared)
flags.DEFINE_string("output", "", "The .npz to write.", **_shared)
flags.DEFINE_integer("seed", 0, "Seed of the weights.", lower_bound=0, **_shared)
flags.DEFINE_list("image_size", ["224"], "Pixels that the position table is for: one number, or height,width.", **_shared)
flags.DEFINE_integer("num_classes", 1000, "Outputs of the head; 0 for none.", lower_bound=0, **_shared)
flags.DEFINE_integer("depth", None, "Encoder blocks; by default the variant's.", lower_bound=1, **_shared)
flags.DEFINE_enum("layout", "vit_jax", LAYOUTS, "How the parameters are named.", **_shared)
flags.DEFINE_string("prefix", "", "Put in front of every name: params/ or opt/target/.", **_shared)
flags.DEFINE_enum("dtype", "float32", list(DTYPES), "How the values are stored.", **_shared)
flags.DEFINE_enum("pool", None, ["tok", "gap", "map"], "Pooling; by default what the variant's name says.", **_shared)
flags.DEFINE_enum("posemb", "learn", POSEMBS, "sincos2d stores no position table.", **_shared)
flags.DEFINE_bool("pre_logits", False, "Add the tanh layer before the head.", **_shared)
flags.DEFINE_integer(
    "outlier_channels", 0, "Even number of channels in which the residual stream reaches about 1.4e3.", lower_bound=0, **_shared
)
_OPTIONS = ("seed", "num_classes", "depth", "layout", "prefix", "dtype", "pool", "posemb", "pre_logits", "outlier_channels")


def main(argv: Sequence[str]) -> int:
    """Writes the checkpoint that the command line describes; returns the exit code."""
    return _PROGRAM.main(argv, _write)


def _write(argv: Sequence[str]) -> int:
    if words := _PROGRAM.parse(argv[1:]):
        raise UsageError(f"unexpected argument {words[0]!r}", fix="--help lists the flags.")
    for name in ("variant", "output"):
        if not _FLAGS[name].value:
            raise UsageError(f"no --{name} given", fix="For example --variant=B/32 --output=B32.npz; --help tells more.")
    size = _FLAGS.image_size
    if not (1 <= len(size) <= 2 and all(side.isdecimal() for side in size)):
        raise UsageError(f"--image_size={','.join(size)}: neither one number nor height,width", fix="For example --image_size=224.")
    options: dict[str, Any] = {name: _FLAGS[name].value for name in _OPTIONS}
    architecture = write_random_checkpoint(_FLAGS.output, _FLAGS.variant, image_size=(int(size[0]), int(size[-1])), **options)
    print(f"{_FLAGS.output}: {architecture.variant}, {os.path.getsize(_FLAGS.output):,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
