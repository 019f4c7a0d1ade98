"""A bundle of a tiny random classifier with labelled images, written by the conversion itself."""

import pathlib
from typing import Any

import ml_collections
import numpy as np


def convert_tiny(folder: pathlib.Path, image: tuple[int, int, int], count: int, **keys: Any) -> pathlib.Path:
    """Converts it for TensorRT 8.6 in FP32 and FP16, without engines.

    Args:
        folder: gets the bundle, the checkpoint and the images.
        image: (height, width, 3).
        count: number of labelled images, of ten classes.
        keys: further ones of the config.

    Returns:
        The bundle.
    """
    from vit_convert.convert import convert
    from vit_convert.core import config as configs
    from vit_convert.families.random import write_random_checkpoint

    write_random_checkpoint(folder / "tiny.npz", "mu/16", image_size=image[:2], num_classes=10)
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (count, *image), np.uint8)
    np.savez(folder / "images.npz", images=pixels, labels=generator.integers(0, 10, count))
    given = {
        "checkpoint": str(folder / "tiny.npz"),
        "target": "trt8",
        "precision": "fp32,fp16",
        "evaluation": {"data": str(folder / "images.npz")},
        "engine": {"backend": "none"},
        **keys,
    }
    convert(configs.complete(ml_collections.ConfigDict(given), "tiny"), folder, quiet=True)
    return folder / "tiny"
