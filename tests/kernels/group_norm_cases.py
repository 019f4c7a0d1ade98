"""relu(GroupNorm(x) + residual) in float64, and how far a result may be from it."""

import numpy as np

GROUPS = 32


def normalised(x, gamma, beta, epsilon=1e-6):
    """GroupNorm of [images, pixels, channels] over 32 groups."""
    images, pixels, channels = x.shape
    groups = x.astype(np.float64).reshape(images, pixels, GROUPS, channels // GROUPS)
    centred = groups - groups.mean((1, 3), keepdims=True)
    result = centred / np.sqrt((centred**2).mean((1, 3), keepdims=True) + epsilon)
    return result.reshape(x.shape) * gamma.astype(np.float64) + beta.astype(np.float64)


def expected_of(x, gamma, beta, residual=None, affine=(None, None), epsilon=1e-6):
    total = normalised(x, gamma, beta, epsilon)
    if affine[0] is not None:
        total = total + normalised(residual, *affine, epsilon)
    elif residual is not None:
        total = total + residual.astype(np.float64)
    return np.maximum(total, 0)


def worst(got, expected, *, relative=2**-11, absolute=1e-4):
    """The largest error over what is allowed: one rounding to half, and float32's own of terms that cancel."""
    error = np.abs(got.astype(np.float64) - expected)
    return float((error / (relative * np.abs(expected) + absolute)).max())
