"""Files to pixels, and sets of files to one array."""

import contextlib
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from vit_convert.core import bundle
from vit_convert.core.errors import CalibrationError, UsageError
from vit_convert.core.progress import Progress
from vit_convert.images.decode import decode_split, pick
from vit_convert.images.noise import seeded_noise
from vit_convert.images.pixels import decode_image
from vit_convert.images.preprocess import preprocess_for
from vit_convert.images.sources import open_images

VIT_JAX = preprocess_for("vit_jax", (16, 16))


def photo(height: int = 8, width: int = 10, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def write(folder: pathlib.Path, count: int, height: int = 16, width: int = 16) -> pathlib.Path:
    for i in range(count):
        target = folder / str(i % 3) / f"{i:03d}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photo(height, width, seed=i)).save(target)
    return folder


def decode(folder: pathlib.Path, out: pathlib.Path, height: int = 16, width: int = 16, **options):
    return decode_split(open_images(folder), out / "images.npy", out / "labels.npy", height, width, VIT_JAX, **options)


def test_grey_alpha_and_palette_become_rgb(tmp_path):
    colour, grey = photo(), photo()[..., 0]
    cases = {
        "grey": (Image.fromarray(grey), np.repeat(grey[..., None], 3, axis=-1)),
        "sixteen": (Image.fromarray(grey.astype(np.uint16) * 256 + 77), np.repeat(grey[..., None], 3, axis=-1)),
        "alpha": (Image.fromarray(np.dstack([colour, grey])), colour),
        "palette": (
            Image.fromarray(colour).quantize(4),
            np.asarray(Image.fromarray(colour).quantize(4).convert("RGB")),
        ),
        "bits": (Image.fromarray(grey > 127), np.repeat(np.where(grey > 127, 255, 0)[..., None], 3, axis=-1)),
    }
    for name, (image, expected) in cases.items():
        image.save(tmp_path / f"{name}.png")
        got = decode_image(tmp_path / f"{name}.png", name)
        assert (got.dtype, got.shape) == (np.uint8, (8, 10, 3)), name
        assert np.array_equal(got, expected), name


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to view
    Image.fromarray(photo()).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(decode_image(tmp_path / "a.png", "a"), np.rot90(photo(), -1))


def test_jpeg(tmp_path):
    Image.fromarray(np.full((8, 10, 3), (200, 30, 90), np.uint8)).save(tmp_path / "a.jpg", quality=95)
    got = decode_image(tmp_path / "a.jpg", "a").astype(int)
    # a flat colour loses no more than the rounding of its three DC coefficients
    assert np.abs(got - (200, 30, 90)).max() <= 3


@pytest.mark.parametrize("name", ["a.png", "a.jpg"])
def test_truncated_and_empty_files_are_named(tmp_path, name):
    Image.fromarray(photo(64, 64)).save(tmp_path / name)
    content = (tmp_path / name).read_bytes()
    for damaged in (content[: len(content) // 2], b"", b"<html>404</html>"):
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(CalibrationError, match=f"image .*{name}: cannot be decoded") as error:
            decode(tmp_path, tmp_path)
        assert error.value.fix


def test_a_corrupt_image_leaves_nothing_half_written(tmp_path):
    write(tmp_path / "data", 40)
    (tmp_path / "data/2/038.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(CalibrationError, match=r"2/038\.png"):
        decode(tmp_path / "data", tmp_path / "out", threads=2)
    assert not list((tmp_path / "out").iterdir())


def test_decompression_bombs_are_refused(tmp_path, monkeypatch):
    Image.fromarray(photo(40, 40)).save(tmp_path / "bomb.png")
    for limit in (1000, 100):  # Pillow warns for the first, which is less than twice over, and raises for the second
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with (
            pytest.warns() if limit == 1000 else contextlib.nullcontext(),
            pytest.raises(CalibrationError, match=r"bomb\.png: refused for its size"),
        ):
            decode(tmp_path, tmp_path)


def test_split_holds_images_and_labels_in_order(tmp_path):
    split = decode(write(tmp_path / "data", 50), tmp_path / "out", threads=4)
    assert split.images.dtype == np.uint8
    assert isinstance(split.images, np.memmap)
    assert np.array_equal(np.load(tmp_path / "out/images.npy"), split.images)
    assert np.array_equal(np.load(tmp_path / "out/labels.npy"), split.labels)
    for image, label, name in zip(split.images, split.labels, split.names, strict=True):
        number = int(pathlib.Path(name).stem)
        assert label == number % 3
        assert np.array_equal(image, photo(16, 16, seed=number))


def test_mixed_sizes_are_resized(tmp_path):
    write(tmp_path / "a", 1, 30, 20)
    write(tmp_path / "a/1/1", 1, 16, 24)
    write(tmp_path / "a/2/2", 1, 5, 7)
    split = decode(tmp_path / "a", tmp_path / "out", height=16, width=24)
    assert split.images.shape == (3, 16, 24, 3)
    for image, shape in zip(split.images, [(30, 20), (16, 24), (5, 7)], strict=True):
        assert np.array_equal(image, VIT_JAX.fit(photo(*shape), 16, 24))


def test_limit_is_evenly_spaced():
    assert pick(10, 0).tolist() == pick(10, 10).tolist() == pick(10, 99).tolist() == list(range(10))
    assert pick(9, 3).tolist() == [1, 4, 7]
    assert pick(10, 1).tolist() == [5]
    chosen = pick(50_000, 512)
    assert len(set(chosen)) == 512
    assert set(np.diff(chosen)) == {97, 98}  # 50000 / 512 = 97.7


def test_limit_keeps_classes_balanced_and_names_aligned(tmp_path):
    split = decode(write(tmp_path / "data", 30), tmp_path / "out", limit=6)
    assert np.bincount(split.labels).tolist() == [2, 2, 2]
    assert [int(name.split("/")[0]) for name in split.names] == split.labels.tolist()


def test_labels_of_an_earlier_set_do_not_stay(tmp_path):
    decode(write(tmp_path / "labelled", 3), tmp_path / "out")
    assert (tmp_path / "out/labels.npy").exists()
    (tmp_path / "plain").mkdir()
    Image.fromarray(photo(16, 16)).save(tmp_path / "plain/a.png")
    assert decode(tmp_path / "plain", tmp_path / "out").labels is None
    assert not (tmp_path / "out/labels.npy").exists()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, a device whose disk is always full")
def test_a_full_disk_is_a_usage_error(tmp_path, monkeypatch):
    folder, temporary = write(tmp_path / "data", 30), tmp_path / "out/.images.npy.tmp"
    temporary.parent.mkdir()
    temporary.symlink_to("/dev/full")  # what is written under this name finds the disk full
    monkeypatch.setattr(bundle, "temporary_beside", lambda path: temporary)
    with pytest.raises(UsageError, match="no space left"):
        decode(folder, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_memory_does_not_grow_with_the_number_of_images(tmp_path):
    write(tmp_path / "data", 400, 64, 64)
    code = """
import json, pathlib, resource, sys
from vit_convert.images.decode import decode_split
from vit_convert.images.preprocess import preprocess_for
from vit_convert.images.sources import open_images
out, source = pathlib.Path(sys.argv[1]), open_images(sys.argv[1] + "/data")
preprocess, peaks = preprocess_for("vit_jax", (224, 224)), []
for limit in (40, 400):
    decode_split(source, out / "i.npy", out / "l.npy", 224, 224, preprocess, limit=limit, threads=2)
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
print(json.dumps(peaks))
"""
    few, many = json.loads(
        subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, capture_output=True, text=True).stdout
    )
    assert many < 1.15 * few  # the 400 results are 57 MiB, about as much as the interpreter with numpy


def test_progress_counts_every_image(tmp_path):
    steps = []

    class Counting(Progress):
        def bar(self, label, total=None):
            steps.append(total)
            return contextlib.nullcontext(steps.append)

    decode(write(tmp_path / "data", 7), tmp_path / "out", progress=Counting())
    assert steps == [7] + [1] * 7


def test_noise_is_seeded_image_by_image():
    images = seeded_noise(5, 48, 32, seed=3)
    assert (images.dtype, images.shape) == (np.uint8, (5, 48, 32, 3))
    assert np.array_equal(seeded_noise(2, 48, 32, seed=3), images[:2])
    assert not np.array_equal(seeded_noise(2, 48, 32, seed=4), images[:2])
    assert len({image.tobytes() for image in images}) == 5


def test_noise_is_smooth_but_not_flat():
    values = seeded_noise(4, 224, 224).astype(float)
    near, far = (np.abs(np.diff(values[:, ::step], axis=1)).mean() for step in (1, 32))
    assert near < far / 2
    assert values.std() > 30
