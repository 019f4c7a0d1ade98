"""Inputs, tolerance and the other implementations of the parity tests."""

import numpy as np
import pytest


@pytest.fixture(scope="session")
def timm_vision_transformer(torchvision_operators):
    """timm's ViT module."""
    pytest.importorskip("timm", reason="timm is not installed")
    from timm.models import vision_transformer

    return vision_transformer


@pytest.fixture
def images():
    """Draws normalised images: float32 [2, height, width, 3] in [-1, 1]."""

    def draw(height=224, width=224):
        return np.random.default_rng(0).uniform(-1, 1, (2, height, width, 3)).astype(np.float32)

    return draw


@pytest.fixture
def run():
    """Loads a checkpoint and runs our Flax model at highest matmul precision."""
    from vit_convert.families.load import load_checkpoint
    from vit_convert.families.vit.model import vit_model

    def outputs(path, images, **options):
        loaded = load_checkpoint(path, **options)
        return vit_model(loaded.architecture, loaded.params).run(images)

    return outputs


@pytest.fixture
def assert_close():
    """Holds an output against its reference at 1e-4 of the reference's scale.

    Two float32 implementations that sum in different orders differ by about 1e-6 of the scale after 12 blocks; erf for
    tanh GELU, the smallest mistake there is to make, by 1.5e-4 to 2.1e-4.
    """

    def check(ours, reference, tolerance=1e-4):
        assert ours.shape == reference.shape
        assert np.isfinite(reference).all()
        scale = np.abs(reference).max()
        assert scale > 0.1, "a reference of zeros proves nothing"
        assert np.abs(ours - reference).max() <= tolerance * scale

    return check
