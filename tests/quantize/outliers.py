"""The digits checkpoint as large trained ViTs often are: the same function, but a few channels are far larger after
each LayerNorm."""

import pathlib

import numpy as np

CHECKPOINTS = pathlib.Path(__file__).parents[2] / "checkpoints"
DIGITS = CHECKPOINTS / "vit_digits.npz"
_READERS = {
    "LayerNorm_0": [f"MultiHeadDotProductAttention_1/{part}" for part in ("query", "key", "value")],
    "LayerNorm_2": ["MlpBlock_3/Dense_0"],
}


def write_outlier_digits(path: pathlib.Path, factor: float, blocks: range, channels: int = 3) -> pathlib.Path:
    """Multiplies channels of the norms' scale and bias by a factor and divides the rows of what reads them: exact but
    for rounding."""
    with np.load(DIGITS) as file:
        leaves = {name: file[name] for name in file.files}
    rng = np.random.default_rng(0)
    for block in blocks:
        for norm, readers in _READERS.items():
            chosen = rng.permutation(96)[:channels]
            scope = f"Transformer/encoderblock_{block}"
            for part in ("scale", "bias"):
                leaves[f"{scope}/{norm}/{part}"][chosen] *= factor
            for reader in readers:
                leaves[f"{scope}/{reader}/kernel"][chosen] /= factor
    np.savez(path, **leaves)
    return path
