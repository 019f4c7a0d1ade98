"""Random images: smooth colours, finer noise on top, and nothing that wraps round at black or white."""

import numpy as np
import pytest

from vit_convert.images import noise
from vit_convert.images.noise import seeded_noise


def with_colours(monkeypatch, value, height=80, width=48):
    """The images where the smooth part is one grey, and the coarse colours that it would have been made of."""
    seen = []

    def resize(coarse, height, width):
        seen.append(coarse)
        return np.full((height, width, 3), value, np.uint8)

    monkeypatch.setattr(noise, "resize", resize)
    return seeded_noise(3, height, width), seen


def test_finer_noise_has_as_much_of_both_signs(monkeypatch):
    images, _ = with_colours(monkeypatch, 100)
    fine = images.astype(int) - 100
    assert (fine.min(), fine.max()) == (-24, 24) and abs(fine.mean()) < 0.5  # 34 560 numbers: 14.1/√34560 = 0.08
    counts = np.bincount(fine.ravel() + 24)
    assert len(counts) == 49 and counts.min() > 0.7 * counts.mean()  # about 705 of each: √705 = 27


@pytest.mark.parametrize(("value", "low", "high"), [(250, 226, 255), (3, 0, 27)])
def test_nothing_wraps_round(monkeypatch, value, low, high):
    images, _ = with_colours(monkeypatch, value)
    assert (images.min(), images.max()) == (low, high)


def test_a_colour_for_about_sixteen_pixels(monkeypatch):
    """And one beyond each edge."""
    _, coarse = with_colours(monkeypatch, 0)
    assert [(array.shape, array.dtype) for array in coarse] == [((80 // 16 + 2, 48 // 16 + 2, 3), np.uint8)] * 3
    _, coarse = with_colours(monkeypatch, 0, 320, 336)
    values = np.concatenate([array.ravel() for array in coarse])
    assert len({*values.tolist()}) == 256  # of some 4 500 numbers: one is missing in 1 of 100 000 seeds


def test_an_image_is_of_its_seed_and_number_alone():
    images = seeded_noise(3, 33, 17, seed=3)
    assert images.shape == (3, 33, 17, 3) and images.dtype == np.uint8
    np.testing.assert_array_equal(seeded_noise(2, 33, 17, seed=3), images[:2])
    assert not np.array_equal(images[0], images[1])
    np.testing.assert_array_equal(seeded_noise(1, 33, 17), seeded_noise(1, 33, 17, seed=0))
    assert not np.array_equal(seeded_noise(1, 33, 17), images[:1])
