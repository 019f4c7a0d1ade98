"""Images for the tiny ViT."""

import numpy as np
import pytest


@pytest.fixture(scope="session")
def images() -> np.ndarray:
    """Low-frequency seeded images, so that their patches and logits differ: uint8 [24, 32, 32, 3]."""
    rng = np.random.default_rng(11)
    coarse = rng.uniform(0, 255, (24, 8, 8, 3))
    noise = rng.normal(0, 12, (24, 32, 32, 3))
    return np.clip(coarse.repeat(4, 1).repeat(4, 2) + noise, 0, 255).astype(np.uint8)
