"""Decodes a set of images into one uint8 file, which any host reads without a decoder."""

import collections
import dataclasses
import os
import pathlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from vit_convert.core.bundle import atomic
from vit_convert.core.progress import Progress
from vit_convert.images.patches import packed_patches, packed_size
from vit_convert.images.preprocess import Preprocess
from vit_convert.images.sources import ImageSource

_AHEAD_PER_THREAD = 4


@dataclasses.dataclass(frozen=True)
class DecodedSplit:
    """A decoded split on disk.

    Attributes:
        images: uint8 [N, height, width, 3], memory-mapped.
        labels: class ids int64 [N], or None.
        names: of the selected images, in order.
    """

    images: np.ndarray
    labels: np.ndarray | None
    names: list[str]


def decode_split(
    source: ImageSource,
    images_out: pathlib.Path,
    labels_out: pathlib.Path,
    height: int,
    width: int,
    preprocess: Preprocess,
    *,
    patches: int = 0,
    limit: int = 0,
    progress: Progress | None = None,
    threads: int = 0,
) -> DecodedSplit:
    """Decodes and resizes a set of images into one `.npy` file, and its labels into another; memory does not grow with
    their number.

    Args:
        source: the images.
        images_out: file to write, uint8 [N, height, width, 3].
        labels_out: file to write, int64 [N]; removed if the source has no labels.
        height: of the model's input in pixels.
        width: of the model's input in pixels.
        preprocess: how to bring an image to that size; images that have it stay as they are.
        patches: if not 0, images of any aspect are cut into this many patches of side `height` instead, uint8 [N,
            patches, …] as `images.patches.packed_patches` returns them.
        limit: how many to take, evenly spaced over the source (which is sorted by class) and always the same; 0 takes
            all.
        progress: shows a bar.
        threads: number of decoders; 0 for one per CPU.

    Returns:
        The DecodedSplit, read from the files.

    Raises:
        CalibrationError: an image cannot be decoded.
        UsageError: the disk is full.
    """
    chosen = pick(len(source), limit)
    shape: tuple[int, ...] = (patches, packed_size(height)) if patches else (height, width, 3)

    def fit(image: np.ndarray) -> np.ndarray:
        return packed_patches(image, height, patches) if patches else preprocess.fit(image, height, width)

    threads = threads or os.cpu_count() or 1
    bar = (progress or Progress(quiet=True)).bar(f"decoding {source.path.name}", total=len(chosen))
    with atomic(images_out) as temporary, bar as advance, open(temporary, "wb") as f:
        # Rows are appended, not mapped: a full disk is then an error and not a SIGBUS, and no pages stay resident.
        header = {"descr": "|u1", "fortran_order": False, "shape": (len(chosen), *shape)}
        np.lib.format.write_array_header_1_0(f, header)
        for image in _ordered(source, chosen, fit, threads):
            f.write(image.tobytes())
            advance(1)
    if source.labels is None:
        labels_out.unlink(missing_ok=True)
    else:
        with atomic(labels_out) as temporary, open(temporary, "wb") as f:
            np.save(f, source.labels[chosen])
    labels = None if source.labels is None else source.labels[chosen]
    return DecodedSplit(np.load(images_out, mmap_mode="r"), labels, [source.names[i] for i in chosen])


def pick(count: int, limit: int) -> np.ndarray:
    """The indices of `limit` out of `count` images, each from the middle of its share, int64; all of them for 0 or too
    many."""
    if not limit or limit >= count:
        return np.arange(count)
    return (2 * np.arange(limit) + 1) * count // (2 * limit)


def _ordered(
    source: ImageSource, chosen: np.ndarray, fit: Callable[[np.ndarray], np.ndarray], threads: int
) -> Iterator[np.ndarray]:
    """Decodes a few images ahead on threads (Pillow releases the GIL) and yields them in order."""
    pending: collections.deque[Future[np.ndarray]] = collections.deque()

    def decode(i: int) -> np.ndarray:
        return source.read(i, fit)

    with ThreadPoolExecutor(threads) as pool:
        try:
            for i in chosen:
                pending.append(pool.submit(decode, int(i)))
                if len(pending) > threads * _AHEAD_PER_THREAD:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)
