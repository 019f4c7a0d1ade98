"""Random towers: seeded values for canonical parameters, chosen so that every part of a tower affects its embedding."""

import math

import numpy as np

from vit_convert.checkpoint.draw import draw as draw_parameter
from vit_convert.checkpoint.draw import normal
from vit_convert.families.towers.architecture import Shape


def draw(seed: int, name: str, shape: Shape) -> np.ndarray:
    """One parameter, which depends only on the seed, its name and its shape.

    Args:
        seed: of the checkpoint.
        name: canonical, with the tower before it: "txt/head/kernel".
        shape: of the result.

    Returns:
        float32: kernels of variance 1/inputs, norm scales near 1, biases small, tables and tokens of learned sizes.
    """
    kind = name.rpartition("/")[2]
    if kind in ("pos_embedding", "segments", "cls"):
        return np.float32(0.1) * normal(seed, name, shape)
    if kind in ("probe", "embedding"):
        return normal(seed, name, shape)
    if name.endswith(("query/kernel", "key/kernel", "value/kernel")):  # heads and their channels are outputs
        return normal(seed, name, shape) / np.float32(math.sqrt(shape[0]))
    return draw_parameter(seed, name, shape)
