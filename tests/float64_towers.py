"""Forward passes of towers in float64, written one formula at a time from the papers and the projects' own code; leaves
are taken as the projects store them."""

import math

import numpy as np

erf = np.vectorize(math.erf)


def norm(x, leaves, name, epsilon=1e-6):
    """LayerNorm over the last axis."""
    mean = x.mean(-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + epsilon) * leaves[f"{name}/scale"] + leaves[f"{name}/bias"]


def gelu(x):
    """By tanh, as Flax does."""
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def softmax(x):
    """Over the last axis."""
    power = np.exp(x - x.max(-1, keepdims=True))
    return power / power.sum(-1, keepdims=True)


def attend(query, key, value, allowed=None):
    """One text or image: each [tokens, heads, size]; `allowed` [keys] tells which keys may be looked at."""
    scores = np.einsum("qhd,khd->hqk", query, key) / math.sqrt(query.shape[-1])
    if allowed is not None:
        scores = np.where(allowed, scores, -np.inf)
    return np.einsum("hqk,khd->qhd", softmax(scores), value)


def dense(x, leaves, name):
    """x W + b."""
    return x @ leaves[f"{name}/kernel"] + leaves[f"{name}/bias"]


def attention(x, leaves, name, allowed=None):
    """Self-attention with kernels [width, heads, size]."""
    query, key, value = (
        np.einsum("sd,dhe->she", x, leaves[f"{name}/{part}/kernel"]) + leaves[f"{name}/{part}/bias"]
        for part in ("query", "key", "value")
    )
    mixed = attend(query, key, value, allowed)
    return np.einsum("she,hed->sd", mixed, leaves[f"{name}/out/kernel"]) + leaves[f"{name}/out/bias"]


def blocks(x, leaves, scope, depth, activation=gelu, allowed=None):
    """Pre-norm blocks of Flax Linen's names; the stream behind each of them."""
    streams = []
    for i in range(depth):
        block = scope.format(i)
        x = x + attention(
            norm(x, leaves, f"{block}/LayerNorm_0"), leaves, f"{block}/MultiHeadDotProductAttention_0", allowed
        )
        x = x + mlp(norm(x, leaves, f"{block}/LayerNorm_1"), leaves, f"{block}/MlpBlock_0", activation)
        streams.append(x)
    return streams


def mlp(x, leaves, name, activation):
    """Two layers."""
    return dense(activation(dense(x, leaves, f"{name}/Dense_0")), leaves, f"{name}/Dense_1")


def patches(image, leaves, name):
    """[height, width, 3] -> [rows · columns, width of the model]; what the patches do not tile is left out."""
    kernel = leaves[f"{name}/kernel"]
    side = kernel.shape[0]
    rows, columns = image.shape[0] // side, image.shape[1] // side
    cut = image[: rows * side, : columns * side].reshape(rows, side, columns, side, 3)
    cut = cut.transpose(0, 2, 1, 3, 4).reshape(rows * columns, -1)
    return cut @ kernel.reshape(-1, kernel.shape[-1]) + leaves[f"{name}/bias"]


def unit(x, epsilon=1e-8):
    """Divided by its norm."""
    return x / (np.linalg.norm(x, axis=-1, keepdims=True) + epsilon)


def float64(arrays, folder=""):
    """Leaves below a folder in float64."""
    return {name.removeprefix(folder): arrays[name].astype(np.float64) for name in arrays if name.startswith(folder)}
