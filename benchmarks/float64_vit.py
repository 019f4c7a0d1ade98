"""A ViT's forward pass in float64 NumPy from a checkpoint's own leaves, written from the paper, with which graphs are
compared."""

import pathlib

import numpy as np


def forward(path: pathlib.Path, images: np.ndarray) -> np.ndarray:
    """Computes the logits.

    Args:
        path: an `.npz` of the original ViT layout, with a class token and a head.
        images: float [batch, height, width, 3], normalised.

    Returns:
        float64 [batch, classes].
    """
    with np.load(path) as file:
        leaves = {name: file[name].astype(np.float64) for name in file.files}
    kernel = leaves["embedding/kernel"]
    side, width = kernel.shape[0], kernel.shape[-1]
    count, rows, columns = len(images), images.shape[1] // side, images.shape[2] // side
    patches = (
        images.astype(np.float64)
        .reshape(count, rows, side, columns, side, 3)
        .swapaxes(2, 3)
        .reshape(count, rows * columns, -1)
    )
    x = patches @ kernel.reshape(-1, width) + leaves["embedding/bias"]
    x = np.concatenate([np.broadcast_to(leaves["cls"], (count, 1, width)), x], axis=1)
    x = x + leaves["Transformer/posembed_input/pos_embedding"]
    depth = len({name.split("/")[1] for name in leaves if name.startswith("Transformer/encoderblock_")})
    for number in range(depth):
        block = f"Transformer/encoderblock_{number}/"
        own = {name.removeprefix(block): leaf for name, leaf in leaves.items() if name.startswith(block)}
        first, second = sorted({name.split("/")[0] for name in own if name.startswith("LayerNorm_")})
        (attention,) = {name.split("/")[0] for name in own if name.startswith("MultiHeadDotProductAttention_")}
        (mlp,) = {name.split("/")[0] for name in own if name.startswith("MlpBlock_")}
        x = x + _attention(_norm(x, own, first), own, attention)
        y = _norm(x, own, second) @ own[f"{mlp}/Dense_0/kernel"] + own[f"{mlp}/Dense_0/bias"]
        # GELU by tanh: (1 + tanh z) / 2 is the logistic of 2 z
        y = y / (1 + np.exp(-2 * np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
        x = x + y @ own[f"{mlp}/Dense_1/kernel"] + own[f"{mlp}/Dense_1/bias"]
    return _norm(x, leaves, "Transformer/encoder_norm")[:, 0] @ leaves["head/kernel"] + leaves["head/bias"]


def _norm(x: np.ndarray, leaves: dict[str, np.ndarray], name: str) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    return (
        centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * leaves[f"{name}/scale"]
        + leaves[f"{name}/bias"]
    )


def _attention(x: np.ndarray, leaves: dict[str, np.ndarray], name: str) -> np.ndarray:
    query, key, value = (
        np.tensordot(x, leaves[f"{name}/{part}/kernel"], axes=1) + leaves[f"{name}/{part}/bias"]
        for part in ("query", "key", "value")
    )
    scores = np.einsum("bqhd,bkhd->bhqk", query, key) / np.sqrt(query.shape[-1])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    mixed = np.einsum("bhqk,bkhd->bqhd", weights / weights.sum(-1, keepdims=True), value)
    return np.tensordot(mixed, leaves[f"{name}/out/kernel"], axes=2) + leaves[f"{name}/out/bias"]
