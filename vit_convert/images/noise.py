"""Images for a conversion without data."""

import numpy as np

from vit_convert.images.resize import resize

_CELL = 16  # pixels; about the size of a patch, so that patches differ and are not flat


def seeded_noise(count: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    """Draws random images: colours that change smoothly over some 16 pixels, with finer noise on top.

    Good for measuring speed and for comparing two programs on the same input. Their activations differ from those of
    photographs, so neither accuracy nor calibration on them says anything about real data.

    Args:
        count: how many.
        height: in pixels.
        width: in pixels.
        seed: the same seed gives the same images, whatever the count.

    Returns:
        uint8 [count, height, width, 3].
    """
    images = np.empty((count, height, width, 3), np.uint8)
    for i in range(count):
        rng = np.random.default_rng([seed, i])
        coarse = rng.integers(0, 256, (height // _CELL + 2, width // _CELL + 2, 3), dtype=np.uint8)
        fine = rng.integers(-24, 25, images.shape[1:], dtype=np.int16)
        images[i] = np.clip(resize(coarse, height, width) + fine, 0, 255)
    return images
