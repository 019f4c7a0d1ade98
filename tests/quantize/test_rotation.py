"""The orthogonal matrix of a rotation: what it is for, and the same bits everywhere."""

import hashlib

import numpy as np
import pytest

from vit_convert.quantize.rotation import centred, rotate, weighted_rows

WIDTHS = [1, 2, 3, 5, 9, 12, 64, 96, 192, 384, 15 * 22]


@pytest.mark.parametrize("width", WIDTHS)
def test_it_is_orthogonal_and_keeps_ones(width):
    q = rotate(np.eye(width))
    # float64: a hundred roundings of 1e-16 at most
    np.testing.assert_allclose(q @ q.T, np.eye(width), rtol=0, atol=2e-14)
    np.testing.assert_allclose(q.sum(1), 1, rtol=0, atol=2e-14)


@pytest.mark.parametrize("width", [192, 384, 768, 1152, 1280, 1664])
def test_no_channel_stands_out(width):
    """One channel that is all there is ends up spread: its largest share of 1/√n, and of the energy that it had."""
    q = rotate(np.eye(width))
    largest = np.abs(q).max()
    assert largest < 10 * width**-0.5  # 1 where nothing is mixed, 12 to 40 times as much
    assert (q**4).sum(0).max() < 14 / width  # a Gaussian's is 3 / width


def test_axes_are_told_apart():
    array, q = np.random.default_rng(0).normal(size=(3, 12, 5)), rotate(np.eye(12))
    np.testing.assert_allclose(rotate(array, 1), np.einsum("ij,ajb->aib", q, array), rtol=0, atol=1e-14)
    np.testing.assert_allclose(rotate(array.transpose(0, 2, 1), 2), rotate(array, 1).transpose(0, 2, 1))
    np.testing.assert_allclose(centred(array, 1), array - array.mean(1, keepdims=True), rtol=0, atol=1e-14)


def test_layernorm_does_not_notice():
    x = np.random.default_rng(1).normal(3.0, 2.0, (7, 384))
    x[:, 5] += 40  # what a trained stream has

    def norm(y):
        return (y - y.mean(1, keepdims=True)) / np.sqrt(y.var(1, keepdims=True) + 1e-6)

    turned = norm(rotate(centred(x, 1), 1))
    np.testing.assert_allclose(turned, rotate(norm(x), 1), rtol=0, atol=1e-12)
    assert np.abs(norm(x)).max() > 14 and np.abs(turned).max() < 6  # what it is for: 384 Gaussian values reach about 4


def test_rows_are_weighted():
    rng = np.random.default_rng(2)
    weights, matrix = rng.normal(size=7), rng.normal(size=(7, 4))
    np.testing.assert_allclose(weighted_rows(weights, matrix), weights @ matrix, rtol=0, atol=1e-14)


def test_bits_are_the_same_on_every_processor():
    """Only additions, products and roots of float64 in a fixed order: this sum holds wherever IEEE 754 does."""
    bits = hashlib.sha256(np.ascontiguousarray(rotate(np.eye(24))).tobytes()).hexdigest()
    assert bits == "9084a5abd54272cdbca15636acf89303b4fddcc5a3fcf3d7a9c781b7c043c7cc"
