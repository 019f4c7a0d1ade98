"""Resamples position tables to another grid, in the way of each project."""

import math

import numpy as np

from vit_convert.checkpoint.containers import Leaf
from vit_convert.families.vit import posemb

Grid = tuple[int, int]


def half_pixel_weights(old: int, new: int) -> np.ndarray:
    """The weights of `old` positions for each of `new` ones, as in `jax.image.resize` with "linear" and antialiasing.

    Args:
        old: number of existing positions.
        new: number of positions wanted.

    Returns:
        float64 [new, old], each row of sum 1.

    Example:
        >>> half_pixel_weights(2, 4)[:2].tolist()
        [[1.0, 0.0], [0.75, 0.25]]
    """
    width = max(old / new, 1.0)  # width of the triangle in old positions: wider if there are fewer new ones
    centres = (np.arange(new) + 0.5) * (old / new) - 0.5
    weights = np.maximum(0.0, 1.0 - np.abs(centres[:, None] - np.arange(old)) / width)
    return weights / weights.sum(1, keepdims=True)


def resample_half_pixel(table: np.ndarray, old: Grid, new: Grid) -> np.ndarray:
    """Resamples a table [1, rows · columns, width] between half-pixel centres, in float64; itself on the same grid."""
    if old == new:
        return table
    grid = table.reshape(*old, -1).astype(np.float64)
    rows, columns = half_pixel_weights(old[0], new[0]), half_pixel_weights(old[1], new[1])
    return np.einsum("ih,jw,hwd->ijd", rows, columns, grid).reshape(1, math.prod(new), -1).astype(table.dtype)


RESAMPLERS = {"aligned": posemb.resample, "half_pixel": resample_half_pixel}


def resampled(table: Leaf, old: Grid, new: Grid, how: str) -> Leaf:
    """A stored table on another grid, in float32, computed when it is read.

    Args:
        table: [1, rows · columns, width].
        old: its (rows, columns).
        new: (rows, columns) wanted.
        how: "aligned" (vit_jax) or "half_pixel" (`jax.image.resize`).
    """
    table, resample = table.as_float32(), RESAMPLERS[how]
    return table.derive((1, math.prod(new), table.shape[-1]), lambda values: resample(values, old, new))
