"""Image resizing with the semantics of tf.image.resize, on which the JAX families were trained and evaluated."""

import numpy as np

Taps = list[tuple[np.ndarray, np.ndarray]]  # per tap: source index int64 [out], weight float32 [out]


def resize(image: np.ndarray, height: int, width: int, method: str = "bilinear", antialias: bool = False) -> np.ndarray:
    """Resizes one image, with half-pixel centres, to the nearest of the 256 levels.

    Args:
        image: uint8 [h, w, 3].
        height: of the result in pixels.
        width: of the result in pixels.
        method: "bilinear", "area", or "bicubic" (a = -0.5, always antialiased).
        antialias: whether "bilinear" widens its filter when it shrinks; without, each output is a mean of 2x2 input pixels.

    Returns:
        uint8 [height, width, 3].
    """
    if method == "bicubic" or (method == "bilinear" and antialias):
        from PIL import Image

        filters = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
        return np.asarray(Image.fromarray(image).resize((width, height), filters[method]))
    taps = _area_taps if method == "area" else _bilinear_taps
    columns = _resample(image, taps(image.shape[1], width), axis=1)
    rows = _resample(columns, taps(image.shape[0], height), axis=0)
    return np.rint(rows).astype(np.uint8)


def _resample(image: np.ndarray, taps: Taps, axis: int) -> np.ndarray:
    """Weighted sum of shifted views along one axis: float32."""
    shape = [1, 1, 1]
    shape[axis] = -1
    index, weight = taps[0]
    total = np.take(image, index, axis) * weight.reshape(shape)
    for index, weight in taps[1:]:
        total += np.take(image, index, axis) * weight.reshape(shape)
    return total


def _bilinear_taps(old: int, new: int) -> Taps:
    """Output i samples at (i + 0.5) old / new - 0.5 between its two neighbours, the border repeated."""
    position = np.clip((np.arange(new) + 0.5) * (old / new) - 0.5, 0, old - 1)
    low = np.floor(position).astype(np.int64)
    high = np.minimum(low + 1, old - 1)
    share = (position - low).astype(np.float32)
    return [(low, 1 - share), (high, share)]


def _area_taps(old: int, new: int) -> Taps:
    """Output i is the mean over [i, i + 1) old / new, a pixel on the edge counted by the part of it inside.

    Pillow's BOX counts such a pixel wholly or not at all, which is another image unless the ratio is an integer.
    """
    edges = np.arange(new + 1) * (old / new)
    start, stop = edges[:-1], edges[1:]
    first = np.floor(start).astype(np.int64)
    taps = []
    for tap in range(int(np.ceil(old / new)) + 1):
        overlap = np.clip(np.minimum(stop, first + tap + 1) - np.maximum(start, first + tap), 0, None)
        taps.append((np.minimum(first + tap, old - 1), (overlap * (new / old)).astype(np.float32)))
    return taps
