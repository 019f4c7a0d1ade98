"""Position tables: resampled to another grid, or computed where none is stored."""

import math

import numpy as np

from vit_convert.checkpoint.containers import Leaf


def resample(table: np.ndarray, old_grid: tuple[int, int], new_grid: tuple[int, int]) -> np.ndarray:
    """Resamples a position table linearly with aligned corners, axis by axis, in float64.

    Row i of an axis reads position i·(old−1)/(new−1), as with `scipy.ndimage.zoom(order=1)` in vit_jax's checkpoint.py,
    except that no corner falls outside: scipy's default mode writes zeros into the last row and column for pairs such
    as 28→48.

    Args:
        table: [1, N, D], patches row by row, without the class token.
        old_grid: (rows, columns) with rows·columns = N.
        new_grid: (rows, columns) wanted.

    Returns:
        [1, rows·columns, D] in the table's dtype; the table itself when the grids are equal.
    """
    if old_grid == new_grid:
        return table
    width = table.shape[-1]
    grid = table.reshape(*old_grid, width).astype(np.float64)
    for axis, new in enumerate(new_grid):
        grid = _linear(grid, axis, new)
    return grid.reshape(1, -1, width).astype(table.dtype)


def resampled(table: Leaf, old_grid: tuple[int, int], new_grid: tuple[int, int]) -> Leaf:
    """A stored table [1, N, D] on another grid, in float32, computed when it is read; see `resample`."""
    table = table.as_float32()
    shape = (1, math.prod(new_grid), table.shape[-1])
    return table.derive(shape, lambda values: resample(values, old_grid, new_grid))


def resampling_warning(file: str, old_size: tuple[int, int], new_size: tuple[int, int]) -> str:
    """The warning about a table on another grid; sizes are (height, width) in pixels."""
    old, new = ("x".join(map(str, size)) for size in (old_size, new_size))
    return (
        f"{file}: position table resampled from {old} to {new} pixels; accuracy drops unless the model was "
        f"trained for both."
    )


def _linear(values: np.ndarray, axis: int, new: int) -> np.ndarray:
    old = values.shape[axis]
    if old == new:
        return values
    # For a single row, aligned corners give 0/0; scipy uses the first row.
    position = np.arange(new) * ((old - 1) / (new - 1)) if new > 1 else np.zeros(1)
    low = np.minimum(position.astype(np.intp), old - 1)
    high = np.minimum(low + 1, old - 1)
    weight = (position - low).reshape([-1 if i == axis else 1 for i in range(values.ndim)])
    return values.take(low, axis) * (1 - weight) + values.take(high, axis) * weight


def sincos2d(grid: tuple[int, int], width: int) -> np.ndarray:
    """Computes MoCo-v3's two-dimensional sine-cosine table, as big_vision's `posemb_sincos_2d`.

    omega_k = 10000^(−k/(width/4 − 1)); each row is [sin(x·omega), cos(x·omega), sin(y·omega), cos(y·omega)].

    Args:
        grid: (rows, columns) of patches.
        width: size of the residual stream, a multiple of 4.

    Returns:
        float32 [1, rows·columns, width].
    """
    quarter = width // 4
    omega = 10_000.0 ** -(np.arange(quarter) / (quarter - 1))
    y, x = np.mgrid[: grid[0], : grid[1]]
    by_x, by_y = np.outer(x.ravel(), omega), np.outer(y.ravel(), omega)
    table = np.concatenate([np.sin(by_x), np.cos(by_x), np.sin(by_y), np.cos(by_y)], axis=1)
    return table[None].astype(np.float32)
