"""Images of any aspect as patches, as for SigLIP 2's NaFlex (arXiv:2502.14786): resized to the largest size that fits
the number of patches, cut row by row, and padded."""

from collections.abc import Iterable

import numpy as np

from vit_convert.core.errors import UsageError
from vit_convert.images.resize import resize

_MEAN, _STD = np.float32(127.5), np.float32(127.5)  # to [-1, 1]
_BESIDE = 5  # bytes after the pixels of a packed patch: row, column, and whether it is a patch of the image


def patch_grid(height: int, width: int, patch_size: int, length: int) -> tuple[int, int]:
    """How many patches an image is cut into after resizing.

    Args:
        height: of the image in pixels.
        width: of the image in pixels.
        patch_size: side of a patch in pixels.
        length: maximum number of patches.

    Returns:
        (rows, columns) of the largest scale at which the image, each side rounded up to whole patches, has at most
        `length`; each at least 1.

    Example:
        >>> patch_grid(480, 640, 16, 256)
        (14, 18)
    """
    if min(height, width, patch_size, length) < 1:
        raise UsageError(
            f"an image of {height}x{width} in {length} patches of {patch_size} pixels: none of these may be 0"
        )
    best = (0, 1, 1, 1)  # scale as a fraction, by which sizes are compared without rounding; rows, columns
    for count in range(1, length + 1):
        by_height, by_width = -(-width * count // height), -(-height * count // width)
        for numerator, denominator, rows, columns in (
            (count, height, count, by_height),
            (count, width, by_width, count),
        ):
            if rows * columns <= length and numerator * best[1] > best[0] * denominator:
                best = (numerator, denominator, rows, columns)
    return best[2], best[3]


def image_patches(image: np.ndarray, patch_size: int = 16, length: int = 256) -> tuple[np.ndarray, ...]:
    """Cuts one image into the inputs of a NaFlex tower.

    Args:
        image: uint8 [height, width, 3], of any size.
        patch_size: of the model, in pixels.
        length: number of patches that its graph takes.

    Returns:
        patches float32 [length, 3 · patch_size²], in [-1, 1], 0 for padding; coordinates int32 [length, 2], row and
        column; mask int32 [length], 1 for patches of the image.

    Raises:
        UsageError: it is not an image, or has no pixels.

    Example:
        >>> patches, coordinates, mask = image_patches(np.zeros((30, 90, 3), np.uint8), 16, 20)
        >>> patches.shape, coordinates[8].tolist(), int(mask.sum())
        ((20, 768), [1, 2], 12)
    """
    return unpacked_patches(packed_patches(image, patch_size, length))


def packed_patches(image: np.ndarray, patch_size: int, length: int) -> np.ndarray:
    """Cuts one image as `image_patches` does, into bytes to be kept on disk: pixels, not yet normalised.

    Args:
        image, patch_size, length: see `image_patches`.

    Returns:
        uint8 [length, 3 · patch_size² + 5]: for each patch its pixels, its row and column in two bytes each, and 1 if
        it is a patch of the image.

    Raises:
        UsageError: see `image_patches`.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise UsageError(f"an image is uint8 [height, width, 3], not {image.dtype} {list(image.shape)}")
    rows, columns = patch_grid(image.shape[0], image.shape[1], patch_size, length)
    resized = resize(image, rows * patch_size, columns * patch_size, "bilinear", antialias=True)
    cut = resized.reshape(rows, patch_size, columns, patch_size, 3).transpose(0, 2, 1, 3, 4)
    count = rows * columns
    packed = np.zeros((length, packed_size(patch_size)), np.uint8)
    packed[:count, :-_BESIDE] = cut.reshape(count, -1)
    places = np.ascontiguousarray(np.argwhere(np.ones((rows, columns), bool)), "<u2")
    packed[:count, -_BESIDE:-1] = places.view(np.uint8)
    packed[:count, -1] = 1
    return packed


def pixels_of(packed: np.ndarray, patch_size: int) -> np.ndarray:
    """The image that was cut into these patches, as it was after resizing; cut again, it gives the same ones.

    Args:
        packed: uint8 [length, 3 · patch_size² + 5], from `packed_patches`.
        patch_size: of the model, in pixels.

    Returns:
        uint8 [height, width, 3].

    Example:
        >>> image = np.random.default_rng(0).integers(0, 256, (48, 32, 3), np.uint8)
        >>> np.array_equal(pixels_of(packed_patches(image, 16, 6), 16), image)
        True
    """
    cut = packed[packed[:, -1] == 1]
    rows, columns = np.ascontiguousarray(cut[-1, -_BESIDE:-1]).view("<u2").astype(int) + 1
    tiles = cut[:, :-_BESIDE].reshape(rows, columns, patch_size, patch_size, 3)
    return tiles.transpose(0, 2, 1, 3, 4).reshape(rows * patch_size, columns * patch_size, 3)


def packed_size(patch_size: int) -> int:
    """Bytes per patch of `packed_patches`."""
    return 3 * patch_size**2 + _BESIDE


def unpacked_patches(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The inputs of a NaFlex tower, from the result of `packed_patches`.

    Args:
        packed: uint8 [..., length, 3 · patch_size² + 5].

    Returns:
        patches, coordinates and mask as `image_patches` returns them, with the leading axes of `packed`.
    """
    mask = packed[..., -1].astype(np.int32)
    places = np.ascontiguousarray(packed[..., -_BESIDE:-1]).view("<u2").astype(np.int32)
    values = (packed[..., :-_BESIDE].astype(np.float32) - _MEAN) / _STD
    return np.where(mask[..., None] > 0, values, np.float32(0)), places, mask


def patch_inputs(packed: np.ndarray, kinds: Iterable[tuple[bool, int]]) -> list[np.ndarray]:
    """The parts of packed patches that a NaFlex tower's inputs take, whatever they are called.

    Args:
        packed: uint8 [batch, length, 3 · patch_size² + 5].
        kinds: for each input, whether it is floating-point, and its number of axes with the batch.

    Returns:
        The patches for floating-point inputs, the coordinates for those of three axes, the mask for the others.

    Example:
        >>> packed = packed_patches(np.zeros((32, 32, 3), np.uint8), 16, 4)[None]
        >>> [part.shape for part in patch_inputs(packed, [(True, 3), (False, 3), (False, 2)])]
        [(1, 4, 768), (1, 4, 2), (1, 4)]
    """
    patches, places, mask = unpacked_patches(packed)
    return [patches if is_float else places if axes == 3 else mask for is_float, axes in kinds]
