"""Folders, archives, arrays and lists, with real files."""

import io
import os
import pathlib
import zipfile

import numpy as np
import pytest
from PIL import Image

from vit_convert.core.errors import CalibrationError
from vit_convert.images import sources
from vit_convert.images.sources import ImageSource, open_images


def photo(height: int = 8, width: int = 10, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def write_png(path: pathlib.Path, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(photo(seed=seed)).save(path)


def write_tree(root: pathlib.Path, *names: str) -> None:
    for seed, name in enumerate(names):
        write_png(root / name, seed)


def label_list(source: ImageSource) -> list[int]:
    assert source.labels is not None
    return source.labels.tolist()


def pixels(source: ImageSource) -> list[bytes]:
    return [source.read(i).tobytes() for i in range(len(source))]


def test_folder_is_recursive_and_sorted(tmp_path):
    write_tree(tmp_path, "b.png", "a/deep/x.PNG", "c.jpeg", "notes.txt.png")
    (tmp_path / "readme.md").write_text("no image")
    (tmp_path / "._c.png").write_text("what macOS leaves behind")
    source = open_images(tmp_path)
    assert list(source.names) == ["a/deep/x.PNG", "b.png", "c.jpeg", "notes.txt.png"]
    assert source.labels is None  # some images lie in no class folder
    assert np.array_equal(source.read(1), photo(seed=0))


def test_class_folders_give_labels_by_sorted_place(tmp_path):
    write_tree(tmp_path, "n02/1.png", "n01/1.png", "n01/2.png")
    source = open_images(tmp_path)
    assert list(source.names) == ["n01/1.png", "n01/2.png", "n02/1.png"]
    assert source.labels is not None
    assert (source.labels.tolist(), source.labels.dtype) == ([0, 0, 1], np.int64)


def test_numbered_class_folders_are_their_numbers(tmp_path):
    write_tree(tmp_path, "10/1.png", "2/1.png")
    assert label_list(open_images(tmp_path)) == [10, 2]


@pytest.mark.parametrize("header", ["", "name,label\n"])
def test_labels_file_wins_over_folders(tmp_path, header):
    write_tree(tmp_path, "x/1.png", "y/2, of two.png")
    (tmp_path / "labels.csv").write_text(header + '"y/2, of two.png",7\nx/1.png,3\n')
    assert label_list(open_images(tmp_path)) == [3, 7]


def test_labels_file_must_name_every_image(tmp_path):
    write_tree(tmp_path, "1.png", "2.png")
    (tmp_path / "labels.csv").write_text("1.png,3\n")
    with pytest.raises(CalibrationError, match=r"labels\.csv: no label for 2\.png"):
        open_images(tmp_path)


def test_zip_is_read_as_the_folder_that_it_holds(tmp_path):
    write_tree(tmp_path / "folder", "3/a.png", "3/b.png", "5/c.png")
    with zipfile.ZipFile(tmp_path / "folder.zip", "w") as archive:
        for file in (tmp_path / "folder").rglob("*.png"):
            archive.write(file, file.relative_to(tmp_path / "folder"))
    folder, archived = open_images(tmp_path / "folder"), open_images(tmp_path / "folder.zip")
    assert list(archived.names) == list(folder.names)
    assert label_list(archived) == label_list(folder) == [3, 3, 5]
    assert pixels(archived) == pixels(folder)


def test_damaged_zip_names_the_image(tmp_path):
    png = io.BytesIO()
    Image.fromarray(photo()).save(png, "PNG")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("x.png", png.getvalue())
    content = bytearray((tmp_path / "a.zip").read_bytes())
    content[60] ^= 255
    (tmp_path / "a.zip").write_bytes(content)
    with pytest.raises(CalibrationError, match=r"a\.zip/x\.png.*CRC"):
        open_images(tmp_path / "a.zip").read(0)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays(tmp_path, save):
    images = np.stack([photo(seed=i) for i in range(3)])
    save(tmp_path / "a.npz", labels=np.array([1, 0, 2], np.uint8), images=images)
    source = open_images(tmp_path / "a.npz")
    assert label_list(source) == [1, 0, 2]
    assert pixels(source) == [image.tobytes() for image in images]


def test_uncompressed_arrays_stay_on_the_disk(tmp_path):
    from vit_convert.images.arrays import read_arrays

    np.savez(tmp_path / "a.npz", images=photo()[None])
    assert isinstance(read_arrays(tmp_path / "a.npz")[0], np.memmap)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"pictures": photo()[None]}, "holds .*pictures.*not `images`"),
        ({"images": photo()[None].astype(np.float32)}, r"float32 \[1, 8, 10, 3\].*uint8"),
        ({"images": photo()}, r"uint8 \[8, 10, 3\].*\[N, H, W, 3\]"),
        ({"images": photo()[None], "labels": np.zeros(2, int)}, r"int64 \[2\].*integers \[1\]"),
        ({"images": np.array([object()])}, "pickle"),
        ({"images": np.zeros((0, 8, 8, 3), np.uint8)}, "no image in it"),
    ],
)
def test_arrays_of_the_wrong_kind(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(CalibrationError, match=message):
        open_images(tmp_path / "a.npz")


@pytest.mark.parametrize(
    ("name", "text", "labels"),
    [
        ("list.txt", "one 1.png\nsub/2.png\n", None),
        ("list.txt", "one 1.png 4\n\nsub/2.png\t5\n", [4, 5]),
        ("list.csv", "path,label\none 1.png,4\nsub/2.png,5\n", [4, 5]),
        ("list.txt", "one 1.png, 4\nsub/2.png , \t5\n", [4, 5]),
        ("list.csv", "\ufeffone 1.png\r\nsub/2.png\r\n", None),
        ("list.tsv", "one 1.png\t4\nsub/2.png\t5\n", [4, 5]),
    ],
)
def test_lists_are_relative_to_themselves(tmp_path, monkeypatch, name, text, labels):
    write_tree(tmp_path / "data", "one 1.png", "sub/2.png")
    (tmp_path / "data" / name).write_bytes(text.encode())
    monkeypatch.chdir(tmp_path)
    source = open_images(os.path.join("data", name))
    assert list(source.names) == ["one 1.png", "sub/2.png"]  # in the order of the list
    assert (None if source.labels is None else source.labels.tolist()) == labels
    assert np.array_equal(source.read(1), photo(seed=1))


@pytest.mark.parametrize(
    "text",
    [
        *("a.png,1\nb.png\n", "a.png,1\nb.png,cat\n", "a.png,1\nb.png,-1\n", "a.png,1,2\nb.png,3,4\n"),
        # no headers, though a first line with a word for a label is one: an image would be lost without a word
        *(
            "a.png,-1\nb.png,1\n",
            "a.png,1.0\nb.png,1\n",
            "a.png,\nb.png,1\n",
            "a.png,cat\nb.png,1\n",
            f"a.png,{10**19}\nb.png,1\n",
        ),
    ],
)
def test_uneven_lists_are_refused(tmp_path, text):
    write_tree(tmp_path, "a.png", "b.png")
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(CalibrationError, match=r"list\.csv: line '[ab]\.png"):
        open_images(tmp_path / "list.csv")


def test_lists_in_another_encoding_are_refused(tmp_path):
    (tmp_path / "list.csv").write_bytes("ä.png,1\n".encode("utf-16"))
    with pytest.raises(CalibrationError, match=r"list\.csv: not a table of text.*utf-8"):
        open_images(tmp_path / "list.csv")


def test_list_with_a_missing_file(tmp_path):
    (tmp_path / "list.txt").write_text("gone.png\n")
    with pytest.raises(CalibrationError, match=r"lists gone\.png, and .* does not exist"):
        open_images(tmp_path / "list.txt")


def test_nothing_there(tmp_path):
    with pytest.raises(CalibrationError, match="missing: no such file") as error:
        open_images(tmp_path / "missing")
    assert error.value.exit_code == 6
    with pytest.raises(CalibrationError, match="no image in it"):
        open_images(tmp_path)
    (tmp_path / "a.zip").write_text("not an archive")
    with pytest.raises(CalibrationError, match="not a readable zip"):
        open_images(tmp_path / "a.zip")
    (tmp_path / "a.npz").write_text("not an archive")
    with pytest.raises(CalibrationError, match=r"not a readable \.npz"):
        open_images(tmp_path / "a.npz")
    (tmp_path / "a.hdf5").touch()
    with pytest.raises(CalibrationError, match="neither a folder nor a kind"):
        open_images(tmp_path / "a.hdf5")


def test_more_than_any_image_needs_is_not_inflated(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.png", bytes(5000))
    monkeypatch.setattr(sources, "_LARGEST_BYTES", 4999)
    with pytest.raises(CalibrationError, match=r"a\.zip/x\.png: cannot be read .*5000 bytes, the limit is 4999"):
        open_images(tmp_path / "a.zip").read(0)


def test_fingerprint_follows_the_files(tmp_path):
    write_tree(tmp_path, "a/1.png", "b/2.png")
    before = open_images(tmp_path).fingerprint
    assert open_images(tmp_path).fingerprint == before
    write_png(tmp_path / "b/2.png", seed=9)
    os.utime(tmp_path / "b/2.png", ns=(1, 1))
    changed = open_images(tmp_path).fingerprint
    (tmp_path / "labels.csv").write_text("a/1.png,1\nb/2.png,0\n")
    assert len({before, changed, open_images(tmp_path).fingerprint}) == 3
