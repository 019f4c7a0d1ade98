"""Images of any aspect as patches: sizes by trying scales, cuts by indexing pixel for pixel."""

import numpy as np
import pytest

from vit_convert.core.errors import UsageError
from vit_convert.images.patches import (
    image_patches,
    packed_patches,
    packed_size,
    patch_grid,
    pixels_of,
    unpacked_patches,
)


def by_scales(height, width, patch, length):
    """The rows and columns of the largest of many scales that fits."""
    scales = np.arange(1, 60_000) * 2e-4
    rows = np.maximum(1, np.ceil(np.round(height * scales / patch, 9)))
    columns = np.maximum(1, np.ceil(np.round(width * scales / patch, 9)))
    last = np.flatnonzero(rows * columns <= length)[-1]
    return int(rows[last]), int(columns[last])


@pytest.mark.parametrize(
    ("height", "width"), [(480, 640), (640, 427), (100, 100), (37, 2000), (2000, 37), (333, 332), (64, 1024)]
)
@pytest.mark.parametrize("length", [256, 9])
def test_the_grid_is_that_of_the_largest_scale(height, width, length):
    rows, columns = patch_grid(height, width, 16, length)
    assert (rows, columns) == by_scales(height, width, 16, length) and rows * columns <= length


def test_thin_images_keep_a_patch_across():
    assert patch_grid(1, 10_000, 16, 256) == (1, 256) and patch_grid(10_000, 1, 16, 256) == (256, 1)
    assert patch_grid(16, 16, 16, 1) == (1, 1) and patch_grid(16, 16, 16, 3) == (1, 1)


def test_patches_lie_row_by_row():
    """An image that fits as it is: every value is that of its pixel."""
    image = np.random.default_rng(0).integers(0, 256, (8, 12, 3)).astype(np.uint8)
    patches, coordinates, mask = image_patches(image, 4, 6)
    assert patches.shape == (6, 48) and mask.tolist() == [1] * 6
    for patch, (row, column) in zip(patches, coordinates):
        pixels = image[4 * row : 4 * row + 4, 4 * column : 4 * column + 4].astype(np.float64)
        np.testing.assert_allclose(patch.reshape(4, 4, 3), pixels / 127.5 - 1, atol=1e-6)
    assert coordinates.tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]


def test_what_fills_up_is_nothing():
    patches, coordinates, mask = image_patches(np.full((8, 8, 3), 255, np.uint8), 4, 7)
    assert mask.tolist() == [1] * 4 + [0] * 3 and not patches[4:].any() and not coordinates[4:].any()
    assert (patches[:4] == 1).all()


@pytest.mark.parametrize("image", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4, 3))])
def test_what_is_no_image(image):
    with pytest.raises(UsageError, match="an image is uint8"):
        image_patches(image)
    with pytest.raises(UsageError, match="an image of 0x4"):
        image_patches(np.zeros((0, 4, 3), np.uint8))


def test_as_published_models_take_them():
    """SigLIP 2's NaFlex has patches of 16 pixels and was trained on 256 of them."""
    patches, coordinates, mask = image_patches(np.zeros((16, 16, 3), np.uint8))
    assert (patches.shape, coordinates.shape, mask.shape) == ((256, 3 * 16 * 16), (256, 2), (256,))


def test_a_shrunk_image_keeps_what_lies_between_its_samples():
    """One column in eight is white: at an eighth of the size every pixel, but for the edges, is an eighth white."""
    image = np.zeros((64, 64, 3), np.uint8)
    image[:, ::8] = 255
    patches, _, _ = image_patches(image, 8, 1)
    np.testing.assert_allclose(patches.reshape(8, 8, 3)[:, 2:6], 2 / 8 - 1, atol=1 / 127.5)


def test_packed_patches_are_the_same_patches():
    """Also of more rows or columns than a byte counts."""
    generator = np.random.default_rng(3)
    for height, width, length in ((30, 90, 20), (8, 2400, 300), (2400, 8, 300)):
        image = generator.integers(0, 256, (height, width, 3)).astype(np.uint8)
        packed = packed_patches(image, 8, length)
        assert packed.dtype == np.uint8 and packed.shape == (length, packed_size(8))
        for ours, known in zip(unpacked_patches(packed), image_patches(image, 8, length)):
            assert ours.dtype == known.dtype
            np.testing.assert_array_equal(ours, known)
    assert unpacked_patches(packed)[1].max() == 299
    batch = unpacked_patches(np.stack([packed, packed]))
    assert [part.shape for part in batch] == [(2, 300, 192), (2, 300, 2), (2, 300)]


def test_the_image_of_packed_patches_is_cut_into_the_same_again():
    """Of every aspect: what is put together again has a size that is not changed any more."""
    generator = np.random.default_rng(4)
    for height, width, length in ((30, 90, 20), (91, 37, 20), (8, 2400, 300), (5, 5, 7), (40, 40, 1), (61, 60, 13)):
        packed = packed_patches(generator.integers(0, 256, (height, width, 3)).astype(np.uint8), 8, length)
        image = pixels_of(packed, 8)
        rows, columns = patch_grid(height, width, 8, length)
        assert image.shape == (8 * rows, 8 * columns, 3)
        np.testing.assert_array_equal(image[8 * (rows - 1) :, :8].ravel(), packed[columns * (rows - 1), :192])
        np.testing.assert_array_equal(packed_patches(image, 8, length), packed)
