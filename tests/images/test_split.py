"""A split on the disk, made of a source of the test's own: which images, in which order, how many at once."""

import contextlib
import os
import pathlib
import threading

import numpy as np
import pytest

from vit_convert.core.errors import CalibrationError
from vit_convert.core.progress import Progress
from vit_convert.images import decode
from vit_convert.images.decode import decode_split, pick
from vit_convert.images.preprocess import preprocess_for
from vit_convert.images.sources import ImageSource, Labels, Reader

RECORD = preprocess_for("vit_jax", (4, 6))


def image(i: int) -> np.ndarray:
    return np.full((4, 6, 3), i % 256, np.uint8)


def source(count, *, labelled=True, read=None) -> ImageSource:
    labels = Labels(np.arange(count) % 3) if labelled else None
    reader = Reader(read or (lambda i, then: then(image(i))))
    return ImageSource(pathlib.Path("d"), [f"{i}.png" for i in range(count)], labels, reader, "f")


def split(folder, images, **options):
    return decode_split(images, folder / "i.npy", folder / "l.npy", 4, 6, RECORD, **options)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("count", [1, 2, 9, 50])
def test_images_lie_in_their_order(tmp_path, count, threads):
    found = split(tmp_path, source(count), threads=threads)
    assert np.array_equal(found.images, np.stack([image(i) for i in range(count)])) and isinstance(
        found.images, np.memmap
    )
    assert np.array_equal(np.load(tmp_path / "i.npy"), found.images) and found.images.dtype == np.uint8
    assert found.labels.tolist() == np.load(tmp_path / "l.npy").tolist() == [i % 3 for i in range(count)]
    assert found.names == [f"{i}.png" for i in range(count)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["i.npy", "l.npy"]


@pytest.mark.parametrize(
    ("limit", "taken"),
    [(0, range(10)), (3, [1, 5, 8]), (10, range(10)), (99, range(10)), (1, [5]), (9, [0, 1, 2, 3, 5, 6, 7, 8, 9])],
)
def test_some_of_them(tmp_path, limit, taken):
    """Each from the middle of its share of ten: 10/6 = 1.7, 30/6 = 5, 50/6 = 8.3."""
    found = split(tmp_path, source(10), limit=limit)
    assert found.images[:, 0, 0, 0].tolist() == pick(10, limit).tolist() == list(taken)
    assert found.names == [f"{i}.png" for i in taken] and found.labels.tolist() == [i % 3 for i in taken]


def test_images_are_brought_to_the_size_of_the_model(tmp_path):
    asked = []
    found = split(
        tmp_path, source(2, read=lambda i, then: asked.append(then) or then(np.full((9, 11, 3), i, np.uint8)))
    )
    assert found.images.shape == (2, 4, 6, 3) and found.images[:, 0, 0, 0].tolist() == [0, 1] and len(asked) == 2


def test_labels_of_an_earlier_split_are_removed(tmp_path):
    split(tmp_path, source(2))
    assert split(tmp_path, source(2, labelled=False)).labels is None
    assert [path.name for path in tmp_path.iterdir()] == ["i.npy"]
    split(tmp_path, source(2, labelled=False))  # nor is one missed


@pytest.mark.parametrize("bad", [0, 7, 49])
def test_an_image_that_cannot_be_decoded_leaves_nothing(tmp_path, bad):
    def read(i, then):
        if i == bad:
            raise CalibrationError(f"image {i}: cannot be decoded")
        return then(image(i))

    with pytest.raises(CalibrationError, match=f"image {bad}: cannot"):
        split(tmp_path, source(50, read=read), threads=2)
    assert not list(tmp_path.iterdir())


def test_what_follows_a_bad_image_is_not_decoded(tmp_path, monkeypatch):
    """One thread: it may have begun the next image by the time that the bad one is seen, and those behind are given
    up."""
    begun, given_up = [], threading.Event()

    class Pool(decode.ThreadPoolExecutor):
        def shutdown(self, wait=True, *, cancel_futures=False):
            super().shutdown(wait=False, cancel_futures=cancel_futures)
            given_up.set()
            super().shutdown(wait=wait)

    def read(i, then):
        begun.append(i)
        if i == 0:
            raise CalibrationError("bad")
        assert given_up.wait(30)
        return then(image(i))

    monkeypatch.setattr(decode, "ThreadPoolExecutor", Pool)
    with pytest.raises(CalibrationError, match="bad"):
        split(tmp_path, source(50, read=read), threads=1)
    assert begun in ([0], [0, 1])


@pytest.mark.parametrize("threads", [1, 3])
def test_no_more_are_decoded_than_memory_is_meant_for(tmp_path, threads):
    """Four for each thread wait for their turn, and one is written."""
    lock, begun, written, most = threading.Lock(), [0], [0], [0]

    def read(i, then):
        with lock:
            begun[0] += 1
            most[0] = max(most[0], begun[0] - written[0])
        return then(image(i))

    class Counting(Progress):
        def bar(self, label, total=None):
            def advance(count):
                with lock:
                    written[0] += count

            return contextlib.nullcontext(advance)

    split(tmp_path, source(60, read=read), threads=threads, progress=Counting())
    assert written == [60] and begun == [60]
    assert most[0] <= 4 * threads + 2


@pytest.mark.parametrize("threads", [2, 4])
def test_threads_decode_at_once(tmp_path, threads):
    """Each of the first few waits until as many are in work; one after the other, the first would wait in vain."""
    together = threading.Barrier(threads, timeout=30)

    def read(i, then):
        if i < threads:
            together.wait()
        return then(image(i))

    assert len(split(tmp_path, source(20, read=read), threads=threads).names) == 20


@pytest.mark.parametrize(("processors", "asked", "expected"), [(3, 0, 3), (None, 0, 1), (3, 2, 2)])
def test_as_many_threads_as_processors(tmp_path, monkeypatch, processors, asked, expected):
    made, pool = [], decode.ThreadPoolExecutor
    monkeypatch.setattr(os, "cpu_count", lambda: processors)
    monkeypatch.setattr(decode, "ThreadPoolExecutor", lambda count: made.append(count) or pool(count))
    split(tmp_path, source(2), threads=asked)
    assert made == [expected]


def test_nothing_is_shown_where_nobody_asked(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(decode, "Progress", lambda **options: made.append(options) or Progress(**options))
    split(tmp_path, source(2))
    assert made == [{"quiet": True}]


def test_progress_is_told_of_each(tmp_path):
    told = []

    class Telling(Progress):
        def bar(self, label, total=None):
            told.append((label, total))
            return contextlib.nullcontext(told.append)

    split(tmp_path, source(7), limit=3, progress=Telling())
    assert told == [("decoding d", 3), 1, 1, 1]
