"""big_vision's model against a forward pass in float64 numpy, written from its source file, one loop or sum at a
time."""

import math

import numpy as np
import pytest

from vit_convert.families.random import write_random_checkpoint


def tanh_gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def norm(x, leaves, name):
    mean = x.mean(-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + 1e-6) * leaves[f"{name}/scale"] + leaves[f"{name}/bias"]


def attention(queries, x, leaves, name):
    """queries [Q, D], x [S, D] -> [Q, D], head by head."""
    kernel = {part: leaves[f"{name}/{part}/kernel"] for part in ("query", "key", "value", "out")}
    bias = {part: leaves[f"{name}/{part}/bias"] for part in ("query", "key", "value", "out")}
    result = np.zeros_like(queries) + bias["out"]
    for head in range(kernel["query"].shape[1]):
        q, k, v = (
            tokens @ kernel[part][:, head] + bias[part][head]
            for part, tokens in (("query", queries), ("key", x), ("value", x))
        )
        scores = np.exp(q @ k.T / math.sqrt(q.shape[-1]))
        result += scores / scores.sum(-1, keepdims=True) @ v @ kernel["out"][head]
    return result


def mlp(x, leaves, name):
    hidden = tanh_gelu(x @ leaves[f"{name}/Dense_0/kernel"] + leaves[f"{name}/Dense_0/bias"])
    return hidden @ leaves[f"{name}/Dense_1/kernel"] + leaves[f"{name}/Dense_1/bias"]


def sincos(rows, columns, width):
    omegas = [10_000 ** (-k / (width / 4 - 1)) for k in range(width // 4)]
    return np.array(
        [
            [f(v * w) for v in (x, y) for f in (math.sin, math.cos) for w in omegas]
            for y in range(rows)
            for x in range(columns)
        ]
    )


def forward(image, leaves, pool, depth):
    """One image [height, width, 3], all in float64; leaves as big_vision stores them."""
    kernel = leaves["embedding/kernel"]
    side, _, _, width = kernel.shape
    rows, columns = image.shape[0] // side, image.shape[1] // side
    tokens = []
    for i in range(rows):
        for j in range(columns):
            patch = image[i * side : (i + 1) * side, j * side : (j + 1) * side]
            tokens.append(np.tensordot(patch, kernel, axes=3) + leaves["embedding/bias"])
    x = np.array(tokens)
    x += leaves["pos_embedding"][0] if "pos_embedding" in leaves else sincos(rows, columns, width)
    if pool == "tok":
        x = np.concatenate([leaves["cls"][0], x])
    for i in range(depth):
        block = f"Transformer/encoderblock_{i}"
        y = norm(x, leaves, f"{block}/LayerNorm_0")
        x = x + attention(y, y, leaves, f"{block}/MultiHeadDotProductAttention_0")
        x = x + mlp(norm(x, leaves, f"{block}/LayerNorm_1"), leaves, f"{block}/MlpBlock_0")
    x = norm(x, leaves, "Transformer/encoder_norm")
    if pool == "map":
        x = attention(leaves["MAPHead_0/probe"][0], x, leaves, "MAPHead_0/MultiHeadDotProductAttention_0")
        x = x + mlp(norm(x, leaves, "MAPHead_0/LayerNorm_0"), leaves, "MAPHead_0/MlpBlock_0")
    x = x.mean(0) if pool == "gap" else x[0]
    if "pre_logits/kernel" in leaves:
        x = np.tanh(x @ leaves["pre_logits/kernel"] + leaves["pre_logits/bias"])
    return x @ leaves["head/kernel"] + leaves["head/bias"] if "head/kernel" in leaves else x


def stored(path, depth):
    leaves = {name: leaf.astype(np.float64) for name, leaf in np.load(path).items()}
    for name in [name for name in leaves if name.startswith("Transformer/encoderblock/")]:
        for i in range(depth):
            leaves[name.replace("encoderblock", f"encoderblock_{i}")] = leaves[name][i]
    return leaves


@pytest.mark.parametrize(
    ("pool", "layout", "pre_logits"),
    [
        ("tok", "big_vision", False),
        ("tok", "big_vision_scan", True),
        ("gap", "big_vision", True),
        ("map", "big_vision_scan", False),
    ],
)
def test_pooling(tmp_path, images, run, assert_close, pool, layout, pre_logits):
    path = tmp_path / "random.npz"
    write_random_checkpoint(
        path, "Ti/16", image_size=(64, 64), num_classes=10, layout=layout, pool=pool, pre_logits=pre_logits
    )
    leaves = stored(path, 12)
    batch = images(64, 64)
    reference = np.stack([forward(image.astype(np.float64), leaves, pool, 12) for image in batch])
    assert_close(run(path, batch)["logits"], reference)


@pytest.mark.parametrize("pool", ["gap", "map"])
def test_sincos2d_at_a_size_that_is_not_square(tmp_path, images, run, assert_close, pool):
    path = tmp_path / "random.npz"
    write_random_checkpoint(
        path, "mu/16", num_classes=10, layout="big_vision", pool=pool, posemb="sincos2d", pre_logits=True
    )
    batch = images(48, 80)
    reference = np.stack([forward(image.astype(np.float64), stored(path, 1), pool, 1) for image in batch])
    assert_close(run(path, batch, image_size=(48, 80))["logits"], reference)


def test_features(tmp_path, images, run, assert_close):
    path = tmp_path / "random.npz"
    write_random_checkpoint(path, "mu/16", image_size=(64, 64), layout="big_vision", pool="map")
    leaves = {name: leaf for name, leaf in stored(path, 1).items() if not name.startswith("head/")}
    batch = images(64, 64)
    reference = np.stack([forward(image.astype(np.float64), leaves, "map", 1) for image in batch])
    assert_close(run(path, batch, outputs="features")["features"], reference)
