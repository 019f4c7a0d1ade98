"""How images are prepared goes with the family that a checkpoint is of, not with the names that its leaves have."""

import numpy as np
import pytest

from vit_convert.families.load import load_checkpoint
from vit_convert.families.random import write_random_checkpoint
from vit_convert.images.preprocess import preprocess_for

STRAIGHT = (0, "bilinear")  # resized to the square, the aspect not kept


def save(path, *, beside=(), inside="", layout="big_vision", pool="map", num_classes=0):
    """A tiny checkpoint with all of it under `inside`, and other leaves beside it."""
    write_random_checkpoint(path, "mu/16", image_size=(32, 32), num_classes=num_classes, layout=layout, pool=pool)
    with np.load(path) as arrays:
        leaves = {f"{inside}{name}": arrays[name] for name in arrays.files}
    outer = inside.removesuffix("img/")
    np.savez(path, **leaves, **{f"{outer}{name}": np.ones(1, np.float32) for name in beside})
    return path


@pytest.mark.parametrize("outer", ["", "params/"])
@pytest.mark.parametrize("layout", ["big_vision", "big_vision_scan", "vit_jax", "vit_jax_linen"])
@pytest.mark.parametrize(
    ("beside", "family"),
    [
        (("txt/head/kernel", "t", "b"), "siglip"),
        (("txt/head/kernel", "t"), "lit"),
        (("llm/embedder", "b"), "paligemma"),
        (("t",), "siglip"),  # CLIPPO
    ],
)
def test_towers_of_image_text_models(tmp_path, beside, family, layout, outer):
    pool = "tok" if layout.startswith("vit_jax") else "gap" if family == "paligemma" else "map"
    path = save(tmp_path / "a.npz", beside=beside, inside=f"{outer}img/", layout=layout, pool=pool)
    checkpoint = load_checkpoint(f"{path}:img", outputs="features")
    assert checkpoint.preprocess == family
    record = preprocess_for(checkpoint.preprocess, (32, 32))
    assert (record.resize_short, record.resize) == STRAIGHT
    assert record.antialias == (family == "paligemma")


@pytest.mark.parametrize(
    ("layout", "pool", "num_classes", "resized"),
    [
        ("big_vision", "map", 0, STRAIGHT),  # SigLIP's image tower, saved by itself
        ("big_vision", "map", 10, (37, "area")),  # a classifier of big_vision
        ("big_vision", "gap", 10, (37, "area")),
        ("big_vision_scan", "gap", 10, (37, "area")),
        ("vit_jax", "tok", 10, STRAIGHT),
        ("vit_jax_linen", "tok", 10, STRAIGHT),
    ],
)
def test_whole_files(tmp_path, layout, pool, num_classes, resized):
    path = save(tmp_path / "a.npz", layout=layout, pool=pool, num_classes=num_classes)
    checkpoint = load_checkpoint(path, outputs="logits" if num_classes else "features")
    record = preprocess_for(checkpoint.preprocess, (32, 32))
    assert (record.resize_short, record.resize) == resized


def test_leaving_the_head_out_changes_no_image(tmp_path):
    path = save(tmp_path / "a.npz", pool="gap", num_classes=10)
    assert load_checkpoint(path, outputs="features").preprocess == load_checkpoint(path).preprocess == "big_vision"
