"""Image resizing with the semantics of tf.image.resize, on which the JAX families were trained and evaluated.

Only what a window of the result needs is read and computed, so that a strip of 1 x 3000 pixels, whose full enlargement
would take gigabytes, costs no more than a photograph.
"""

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

Taps = list[tuple[np.ndarray, np.ndarray]]  # per tap: source index int64 [out], weight float32 [out]
Window = tuple[int, int, int, int]  # top, left, height, width in pixels of the whole result

_WHOLE_PIXELS = 1 << 24  # pixels: a result up to this size is made by one call of Pillow, and then cropped
# ratio up to which the widened filter is ours; beyond it Pillow's is used, which rounds instead of truncating, in
# bounded time
_MOST_SHRINKING = 64
_BETWEEN_PIXELS = 1 << 26  # size of the image between Pillow's two passes
_FLOAT32_NOISE = 2.0**-10  # a sum of float32 products that should be a whole level is at most this far below it


def resize(
    image: np.ndarray,
    height: int,
    width: int,
    method: str = "bilinear",
    antialias: bool = False,
    *,
    truncate: bool = False,
    window: Window | None = None,
) -> np.ndarray:
    """Resizes one image, with half-pixel centres.

    Args:
        image: uint8 [h, w, 3].
        height: of the result in pixels.
        width: of the result in pixels.
        method: "bilinear", "area", or "bicubic" (a = -0.5, always antialiased).
        antialias: whether "bilinear" widens its filter when the image shrinks; otherwise each output is a mean of 2x2
            input pixels.
        truncate: truncate values, as tf.cast to uint8 does, instead of rounding to the nearest of the 256 levels; not
            for "bicubic".
        window: the part of the result that is wanted; None for all of it.

    Returns:
        uint8 [height, width, 3], or of the window's size.
    """
    top, left, rows, columns = window or (0, 0, height, width)
    smooth = method == "bilinear" and antialias
    if method == "bicubic" or (
        smooth and (not truncate or max(image.shape[0] / height, image.shape[1] / width) > _MOST_SHRINKING)
    ):
        return _pillow(image, height, width, method, (top, left, rows, columns))
    taps = _area_taps if method == "area" else _triangle_taps if antialias else _bilinear_taps
    image, down = _only_read(image, taps(image.shape[0], height, top, rows), axis=0)
    image, across = _only_read(image, taps(image.shape[1], width, left, columns), axis=1)
    if image.shape[0] <= 64 * max(rows, columns):
        values = _resample(_resample(image, across, axis=1), down, axis=0)
    else:  # so tall and narrow that resizing columns first would enlarge the image many times
        values = _resample(_resample(image, down, axis=0), across, axis=1)
    return (np.floor(values + _FLOAT32_NOISE) if truncate else np.rint(values)).astype(np.uint8)


def _only_read(image: np.ndarray, taps: Taps, axis: int) -> tuple[np.ndarray, Taps]:
    """Drops rows (axis 0) or columns (axis 1) that no tap reads."""
    read = np.unique(np.concatenate([index for index, _ in taps]))
    if len(read) == image.shape[axis]:
        return image, taps
    return np.take(image, read, axis), [(np.searchsorted(read, index), weight) for index, weight in taps]


def _resample(image: np.ndarray, taps: Taps, axis: int) -> np.ndarray:
    """Weighted sum of shifted views along one axis: float32."""
    shape = [1, 1, 1]
    shape[axis] = -1
    index, weight = taps[0]
    total = np.take(image, index, axis) * weight.reshape(shape)
    for index, weight in taps[1:]:
        total += np.take(image, index, axis) * weight.reshape(shape)
    return total


def _bilinear_taps(old: int, new: int, start: int, count: int) -> Taps:
    """Output i samples at (i + 0.5) old / new - 0.5 between its two neighbours, the border repeated."""
    position = np.clip((np.arange(start, start + count) + 0.5) * (old / new) - 0.5, 0, old - 1)
    low = np.floor(position).astype(np.int64)
    high = np.minimum(low + 1, old - 1)
    share = (position - low).astype(np.float32)
    return [(low, 1 - share), (high, share)]


def _triangle_taps(old: int, new: int, start: int, count: int) -> Taps:
    """Output i is the mean around (i + 0.5) old / new, weighted by a triangle of half-width max(1, old / new), without
    what lies outside the image."""
    support = max(1.0, old / new)
    centre = (np.arange(start, start + count) + 0.5) * (old / new)
    first = np.floor(centre - support).astype(np.int64)
    indices = first[:, None] + np.arange(2 * math.ceil(support) + 2)
    weights = np.clip(1 - np.abs(indices + 0.5 - centre[:, None]) / support, 0, None) * (
        (indices >= 0) & (indices < old)
    )
    weights /= weights.sum(axis=1, keepdims=True)
    return [(np.clip(index, 0, old - 1), weight.astype(np.float32)) for index, weight in zip(indices.T, weights.T)]


def _area_taps(old: int, new: int, start: int, count: int) -> Taps:
    """Output i is the mean over [i, i + 1) old / new, with a pixel on the edge counted in proportion to its part
    inside.

    Pillow's BOX counts a pixel on the edge either wholly or not at all, which gives a different image unless the ratio
    is an integer.
    """
    edges = np.arange(start, start + count + 1) * (old / new)
    begin, stop = edges[:-1], edges[1:]
    first = np.floor(begin).astype(np.int64)
    taps = []
    for tap in range(int(np.ceil(old / new)) + 1):
        overlap = np.clip(np.minimum(stop, first + tap + 1) - np.maximum(begin, first + tap), 0, None)
        taps.append((np.minimum(first + tap, old - 1), (overlap * (new / old)).astype(np.float32)))
    return taps


def _pillow(image: np.ndarray, height: int, width: int, method: str, window: Window) -> np.ndarray:
    """Pillow's antialiased filters; if most of the result would be cropped away, only the remainder is computed."""
    from PIL import Image

    resampling = Image.Resampling.BICUBIC if method == "bicubic" else Image.Resampling.BILINEAR
    top, left, rows, columns = window
    if height * width <= _WHOLE_PIXELS:
        whole = (0.0, 0.0, float(image.shape[1]), float(image.shape[0]))
        return _two_passes(Image.fromarray(image), height, width, whole, resampling)[
            top : top + rows, left : left + columns
        ]
    support = 2 if method == "bicubic" else 1
    y, y_end, y0, y1 = _source(image.shape[0], height, top, rows, support)
    x, x_end, x0, x1 = _source(image.shape[1], width, left, columns, support)
    return _two_passes(Image.fromarray(image[y:y_end, x:x_end]), rows, columns, (x0, y0, x1, y1), resampling)


def _source(old: int, new: int, start: int, count: int, support: int) -> tuple[int, int, float, float]:
    """The pixels [first, end) that a window reads along one axis, and the window's ends counted from `first`.

    Pillow stores a box in float32, which is too coarse for numbers in the millions, so the box is relative to the crop
    and not to the image.
    """
    scale = old / new
    reach = support * max(scale, 1.0) + 1
    begin, stop = start * scale, (start + count) * scale
    first, end = max(0, math.floor(begin - reach)), min(old, math.ceil(stop + reach))
    return first, end, begin - first, min(stop - first, end - first)


def _two_passes(
    image: "Image.Image",
    height: int,
    width: int,
    box: tuple[float, float, float, float],
    resampling: "Image.Resampling",
) -> np.ndarray:
    """Resizes a box of an image: columns first, as in Pillow, but rows first if that would otherwise enlarge a tall and
    narrow image."""
    if image.height * width > _BETWEEN_PIXELS:
        image = image.resize((image.width, height), resampling, (0, box[1], image.width, box[3]))
        box = (box[0], 0, box[2], height)
    return np.asarray(image.resize((width, height), resampling, box))
