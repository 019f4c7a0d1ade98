"""Our resizer against JAX's and PyTorch's."""

import numpy as np
import pytest

from vit_convert.images.resize import resize

SIZES = [(37, 53, 24, 24), (24, 24, 37, 53), (375, 500, 224, 224), (32, 32, 32, 48), (5, 1, 9, 7)]


def photo(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize(("h", "w", "height", "width"), SIZES)
def test_bilinear_without_antialias_is_that_of_jax_and_torch(h, w, height, width):
    jax, torch = pytest.importorskip("jax"), pytest.importorskip("torch")
    image = photo(h, w)
    got = resize(image, height, width, "bilinear", antialias=False)
    theirs = jax.image.resize(image.astype(np.float32), (height, width, 3), "bilinear", antialias=False)
    planes = torch.from_numpy(image.astype(np.float32)).permute(2, 0, 1)[None]
    others = torch.nn.functional.interpolate(
        planes, (height, width), mode="bilinear", align_corners=False, antialias=False
    )
    # Both return floats, ours is rounded to a level: half of one. They place their samples in float32, so that each
    # axis is off by up to a unit in the last place of its size, where neighbours differ by up to 255.
    tolerance = 0.5 + 2 * 255 * max(h, w) * 2**-23
    assert got.dtype == np.uint8
    assert np.abs(got - np.asarray(theirs)).max() <= tolerance
    assert np.abs(got - others[0].permute(1, 2, 0).numpy()).max() <= tolerance


@pytest.mark.parametrize("method", ["bilinear", "bicubic"])
def test_antialiased_filters_are_those_of_torch(method):
    torch = pytest.importorskip("torch")
    image = photo(90, 70)
    planes = torch.from_numpy(image.astype(np.float32)).permute(2, 0, 1)[None]
    theirs = torch.nn.functional.interpolate(planes, (32, 32), mode=method, align_corners=False, antialias=True)
    theirs = theirs[0].permute(1, 2, 0).numpy().clip(0, 255)
    # Pillow rounds to a level after the columns and again after the rows.
    assert np.abs(resize(image, 32, 32, method, antialias=True) - theirs).max() <= 1.5
