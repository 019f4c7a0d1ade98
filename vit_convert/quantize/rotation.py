"""One orthogonal matrix for each width, which keeps the vector of ones where it is: applied by additions, the same
bits on every processor.

Signs, a fast Hadamard transform and a reflection for each odd prime factor of the width, twice, spread one large
channel over all of them. What that makes of the vector of ones, a last reflection takes back to it, so that a
LayerNorm's mean stays the mean. Every step is an elementwise operation of float64 in a fixed order: no library's matrix
product, whose order of additions depends on the processor.

Source: signs and a Hadamard matrix: Ashkboos et al., "QuaRot", arXiv:2404.00456; a matrix that keeps the mean:
Ashkboos et al., "SliceGPT", arXiv:2401.15024, section 3.2, where the mean is made a part of the linears instead.
"""

import hashlib
import math

import numpy as np

_ROUNDS = 2  # one leaves an odd factor's channels nearly where they were


def rotate(array: np.ndarray, axis: int = 0) -> np.ndarray:
    """Multiplies by the matrix Q of the axis' length n along that axis: Q Qᵀ = 1, Q (1, …, 1) = (1, …, 1).

    Args:
        array: of any shape.
        axis: which of its axes.

    Returns:
        Of the same shape, float64.

    Example:
        >>> q = rotate(np.eye(12))
        >>> bool(np.allclose(q @ q.T, np.eye(12)) and np.allclose(q.sum(1), 1))
        True
    """
    moved = np.moveaxis(np.asarray(array, np.float64), axis, 0)
    n = len(moved)
    ones = np.full((n, 1), 1 / math.sqrt(n))
    normal = _mixed(ones) - ones
    length = _total(normal * normal)[0]
    rows = _mixed(moved.reshape(n, -1))
    if length > np.finfo(np.float64).eps:  # else ones are where they were
        rows = rows - normal * (_total(normal * rows) * (2 / length))
    return np.moveaxis(rows.reshape(moved.shape), 0, axis)


def centred(array: np.ndarray, axis: int = 0) -> np.ndarray:
    """Less its mean along an axis, float64: what a LayerNorm takes off anyway."""
    moved = np.moveaxis(np.asarray(array, np.float64), axis, 0)
    return np.moveaxis(moved - _total(moved.reshape(len(moved), -1)).reshape(moved.shape[1:]) / len(moved), 0, axis)


def weighted_rows(weights: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """weights [K] times a matrix [K, N], float64 [N]."""
    return _total(np.asarray(weights, np.float64)[:, None] * np.asarray(matrix, np.float64))


def _mixed(rows: np.ndarray) -> np.ndarray:
    """Signs, Hadamard and reflections along the first axis of [n, columns]."""
    n = len(rows)
    for turn in range(_ROUNDS):
        digest = hashlib.shake_256(f"vit_convert rotation {turn}".encode()).digest(-(-n // 8))
        signs = 1.0 - 2.0 * np.unpackbits(np.frombuffer(digest, np.uint8))[:n]
        rows, left, done = rows * signs[:, None], n, 1
        while left % 2 == 0:
            pairs = rows.reshape(done, 2, -1)
            rows = np.stack([pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]], 1) * math.sqrt(0.5)
            left, done = left // 2, done * 2
        for prime in _primes(left):
            parts = np.moveaxis(rows.reshape(done, prime, -1), 1, 0)
            parts = parts - _total(parts.reshape(prime, -1)).reshape(parts.shape[1:]) * (2 / prime)
            rows, done = np.moveaxis(parts, 0, 1), done * prime
        rows = rows.reshape(n, -1)
    return rows


def _primes(n: int) -> list[int]:
    """The prime factors of an odd number, the smallest first."""
    found, factor = [], 3
    while n > 1:
        while n % factor == 0:
            found.append(factor)
            n //= factor
        factor += 2
    return found


def _total(rows: np.ndarray) -> np.ndarray:
    """The sum over the first axis of [n, columns], in one order: NumPy's own depends on the processor for one
    column."""
    while len(rows) > 1:
        half = len(rows) // 2
        paired = rows[:half] + rows[half : 2 * half]
        if len(rows) % 2:
            paired[0] += rows[-1]
        rows = paired
    return rows[0]
