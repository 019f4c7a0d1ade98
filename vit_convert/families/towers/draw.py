"""Random towers: seeded values of a canonical parameter, such that every part of a tower shows in its embedding."""

import math

import numpy as np

from vit_convert.checkpoint.draw import normal
from vit_convert.families.towers.architecture import Shape


def draw(seed: int, name: str, shape: Shape) -> np.ndarray:
    """One parameter, which depends on the seed, its name and its shape alone.

    Args:
        seed: of the checkpoint.
        name: canonical, with the tower before it: "txt/head/kernel".
        shape: of the result.

    Returns:
        float32: kernels of variance 1/inputs, norm scales near 1, biases small, tables and tokens of learned sizes.
    """
    values = normal(seed, name, shape)
    kind = name.rpartition("/")[2]
    if kind == "scale":
        return 1 + np.float32(0.1) * values
    if kind == "bias":
        return np.float32(0.02) * values
    if kind in ("pos_embedding", "segments", "cls"):
        return np.float32(0.1) * values
    if kind in ("probe", "embedding"):
        return values
    is_projection = name.endswith(("query/kernel", "key/kernel", "value/kernel"))
    inputs = shape[0] if is_projection else math.prod(shape[:-1])
    return values / np.float32(math.sqrt(inputs))
