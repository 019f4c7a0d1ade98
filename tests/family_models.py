"""A small model of every family, with random weights: compiled once for all tests of a process."""

import functools
import pathlib
import tempfile
from typing import Any

import numpy as np

from vit_convert.core.model import Model
from vit_convert.families.load import Checkpoint, load_checkpoint
from vit_convert.families.random import write_random_checkpoint

# By family: variant, side of the images in pixels, and blocks: more than are traced of a stack that is repeated.
SMALL: dict[str, tuple[str, int, int]] = {
    "mixer": ("Mixer-mu/16", 64, 5),
    "hybrid": ("R8+ViT-mu/8", 64, 3),
    "swin": ("Swin-mu/7", 112, 6),
}


@functools.cache
def checkpoint(family: str) -> Checkpoint:
    """A file of a family, loaded; its weights are in memory."""
    variant, side, depth = SMALL[family]
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / f"{family}.{'safetensors' if family == 'swin' else 'npz'}"
        write_random_checkpoint(path, variant, image_size=(side, side), num_classes=10, depth=depth)
        return load_checkpoint(path, image_size=(side, side))


@functools.cache
def model(family: str) -> Model:
    """Its JAX model."""
    found = checkpoint(family)
    return found.family.model(found)


def images(family: str, count: int = 3) -> np.ndarray:
    """Normalised images: float32 [count, height, width, 3] in [-1, 1]."""
    side = SMALL[family][1]
    return np.random.default_rng(0).uniform(-1, 1, (count, side, side, 3)).astype(np.float32)


@functools.cache
def reference(family: str) -> dict[str, Any]:
    """What JAX makes of `images`: outputs and taps."""
    return model(family).run(images(family))
