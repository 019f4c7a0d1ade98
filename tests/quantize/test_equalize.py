"""Channels of queries, keys and values made to reach equally far: the model computes what it did."""

import numpy as np

from vit_convert.quantize.equalize import factors


def test_factors_of_known_ranges():
    # One head of two channels: queries reach 4 and 1, keys lie in 1 ± 1 and ± 4, values in 10 ± 1 and ± 0.5.
    low = np.array([-4, -1, 0, -4, 9, -0.5], np.float32)
    high = np.array([2, 1, 2, 4, 11, 0.5], np.float32)
    found = factors(low, high, 1)
    np.testing.assert_allclose(found.query, [[0.5, 2.0]])  # queries and keys both reach 2 in both channels
    np.testing.assert_allclose(found.key_shift, [[-1, 0]])
    np.testing.assert_allclose(found.value, [[2, 4]])  # and so do the values
    np.testing.assert_allclose(found.value_shift, [[-10, 0]])


def test_channel_that_is_always_zero_stays_finite():
    found = factors(np.zeros(6, np.float32), np.zeros(6, np.float32), 1)
    assert all(np.isfinite(x).all() for x in (found.query, 1 / found.query, found.value, 1 / found.value))
