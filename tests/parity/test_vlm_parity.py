"""Image towers of PaliGemma, openpi and Gemma 3 against a float64 forward pass."""

import numpy as np
import pytest
from float64_towers import blocks, dense, float64, norm, patches

from vit_convert.families.load import load_checkpoint
from vit_convert.families.random import write_random_checkpoint

FOLDERS = {"PaliGemma": "img/", "openpi": "PaliGemma/img/", "Gemma3": "SigLiPFromPatches_0/siglip_encoder/"}


def forward(image, leaves, depth):
    """[height, width, 3] -> the last norm of every patch, [rows, columns, width]."""
    x = patches(image, leaves, "embedding") + leaves["pos_embedding"][0]
    x = norm(blocks(x, leaves, "Transformer/encoderblock_{}", depth)[-1], leaves, "Transformer/encoder_norm")
    side = int(np.sqrt(len(x)))
    return x.reshape(side, side, -1)


@pytest.mark.parametrize("model", FOLDERS)
def test_float64(tmp_path, images, assert_close, model):
    path = tmp_path / "random.npz"
    write_random_checkpoint(path, f"{model}-mu/14", image_size=(112, 112), depth=2)
    leaves, fed = float64(dict(np.load(path)), FOLDERS[model]), images(112, 112)
    stack = {name: leaf for name, leaf in leaves.items() if "/encoderblock/" in name}
    for name, leaf in stack.items():
        leaves |= {name.replace("encoderblock/", f"encoderblock_{i}/"): part for i, part in enumerate(leaf)}
    grids = np.stack([forward(image.astype(np.float64), leaves, 2) for image in fed])
    if model == "Gemma3":  # the mean of each 4 x 4 patches
        expected = np.stack(
            [[grid[i : i + 4, j : j + 4].mean((0, 1)) for i in (0, 4) for j in (0, 4)] for grid in grids]
        )
    else:
        expected = dense(grids.reshape(2, 64, -1), leaves, "head")
    loaded = load_checkpoint(path)
    assert (loaded.output, loaded.preprocess, loaded.variant) == ("tokens", "paligemma", "custom")
    assert_close(loaded.family.model(loaded).run(fed)["tokens"], expected)
