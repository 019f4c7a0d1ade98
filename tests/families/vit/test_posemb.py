import math

import numpy as np
import pytest
import scipy.ndimage

from vit_convert.checkpoint.containers import Leaf
from vit_convert.families.vit.posemb import resample, resampled, resampling_warning, sincos2d

# 28→48, 28→14, 16→30, 24→22 are among the pairs where scipy's default mode writes zeros into the last row and column.
GRIDS = [
    ((28, 28), (48, 48)),
    ((28, 28), (14, 14)),
    ((7, 7), (12, 12)),
    ((14, 14), (24, 24)),
    ((24, 24), (14, 14)),
    ((16, 16), (30, 30)),
    ((24, 24), (22, 22)),
    ((7, 7), (5, 11)),
    ((6, 9), (12, 4)),
]


def table_of(grid, width=5):
    return np.random.default_rng(0).standard_normal((1, grid[0] * grid[1], width), np.float32)


@pytest.mark.parametrize(("old", "new"), GRIDS)
def test_equals_scipy_zoom_in_float64(old, new):
    table = table_of(old)
    grid = table.reshape(*old, -1).astype(np.float64)
    expected = scipy.ndimage.zoom(grid, (new[0] / old[0], new[1] / old[1], 1), order=1, mode="nearest").reshape(
        1, -1, 5
    )
    # float64 inside both; what is left is our result's rounding to float32, 2**-24 of values up to 4.
    np.testing.assert_allclose(resample(table, old, new), expected, rtol=0, atol=3e-7)


@pytest.mark.parametrize(("old", "new"), [((7, 7), (12, 12)), ((6, 9), (12, 4)), ((5, 5), (3, 3))])
def test_equals_the_formula_point_by_point(old, new):
    table = table_of(old)
    grid = table.reshape(*old, -1).astype(np.float64)
    result = resample(table, old, new).reshape(*new, -1)
    for i in range(new[0]):
        for j in range(new[1]):
            y, x = i * (old[0] - 1) / (new[0] - 1), j * (old[1] - 1) / (new[1] - 1)
            top, left = int(y), int(x)
            bottom, right = min(top + 1, old[0] - 1), min(left + 1, old[1] - 1)
            a, b = y - top, x - left
            above = (1 - b) * grid[top, left] + b * grid[top, right]
            below = (1 - b) * grid[bottom, left] + b * grid[bottom, right]
            # The rounding to float32, as above.
            np.testing.assert_allclose(result[i, j], (1 - a) * above + a * below, rtol=0, atol=3e-7)


@pytest.mark.parametrize(("old", "new"), GRIDS)
def test_corners_stay(old, new):
    table = table_of(old)
    before, after = table.reshape(*old, -1), resample(table, old, new).reshape(*new, -1)
    for corner in ((0, 0), (0, -1), (-1, 0), (-1, -1)):
        # i·(old−1)/(new−1) is exact at the ends up to one unit of float64, which float32 does not show.
        np.testing.assert_allclose(after[corner], before[corner], rtol=0, atol=3e-7)


def test_sides_of_one():
    table = table_of((1, 1))
    assert (resample(table, (1, 1), (3, 2)) == table).all()
    row = table_of((1, 4))
    assert (resample(row, (1, 4), (2, 4)).reshape(2, 4, -1) == row.reshape(1, 4, -1)).all()
    assert (resample(table_of((4, 4)), (4, 4), (1, 1)) == table_of((4, 4))[:, :1]).all()


def test_equal_grids_copy_nothing():
    table = table_of((7, 7))
    assert resample(table, (7, 7), tuple(int(side) for side in "77")) is table  # equal, and not one object


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_a_stored_table_says_its_new_shape_before_it_is_read(dtype):
    read = []
    table = table_of((6, 9)).astype(dtype)
    leaf = Leaf("pos", table.shape, np.dtype(dtype), lambda: read.append(1) or table)
    made = resampled(leaf, (6, 9), (12, 4))
    assert (made.name, made.shape, made.dtype) == ("pos", (1, 48, 5), np.float32) and not read
    values = made.read()
    assert values.shape == made.shape and values.dtype == made.dtype and read == [1]
    np.testing.assert_array_equal(values, resample(table.astype(np.float32), (6, 9), (12, 4)))


def test_what_is_said_of_a_table_on_another_grid():
    said = resampling_warning("b16.npz", (224, 160), (384, 224))
    assert said.startswith("b16.npz: position table resampled from 224x160 to 384x224 pixels; accuracy drops")


@pytest.mark.parametrize("grid", [(2, 3), (14, 14)])
def test_sincos2d_equals_its_formula(grid):
    width = 32
    table = sincos2d(grid, width)
    assert table.shape == (1, grid[0] * grid[1], width) and table.dtype == np.float32
    for y in range(grid[0]):
        for x in range(grid[1]):
            omegas = [10_000 ** (-k / (width / 4 - 1)) for k in range(width // 4)]
            row = [f(v * w) for v in (x, y) for f in (math.sin, math.cos) for w in omegas]
            # The table is computed in float64 and rounded once to float32.
            np.testing.assert_allclose(table[0, y * grid[1] + x], row, rtol=0, atol=1e-7)
