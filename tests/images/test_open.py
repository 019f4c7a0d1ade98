"""What opening a set of images says of it: its kind, its names, its labels, and what changes with the files."""

import os
import zipfile

import numpy as np
import pytest
from PIL import Image

from vit_convert.core.errors import CalibrationError
from vit_convert.images import sources
from vit_convert.images.sources import open_images


def write(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)).save(path)
    return path


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "d/x/1.png", 1)
    write(tmp_path / "d/y/2.png", 2)
    return tmp_path / "d"


def archive(folder):
    with zipfile.ZipFile(folder.with_suffix(".zip"), "w") as made:
        for file in sorted(folder.rglob("*.*")):
            made.write(file, file.relative_to(folder))
    return folder.with_suffix(".zip")


def arrays(folder):
    np.savez(folder.with_suffix(".npz"), images=np.zeros((2, 4, 5, 3), np.uint8), labels=np.array([0, 1]))
    return folder.with_suffix(".npz")


def table(folder, text="x/1.png,0\ny/2.png,1\n", name="list.csv"):
    (folder / name).write_text(text)
    return folder / name


KINDS = {"folder": lambda folder: folder, "zip": archive, "npz": arrays, "list": table}


@pytest.mark.parametrize("kind", KINDS)
def test_labels_are_left_out_where_nobody_wants_them(folder, kind):
    path = KINDS[kind](folder)
    source = open_images(path)
    assert len(source) == len(source.names) == 2 and source.path == path
    assert source.labels.tolist() == [0, 1] and source.labels.dtype == np.int64
    assert list(source.labelling.folders) == (["x", "y"] if kind in ("folder", "zip") else [])
    plain = open_images(path, labelled=False)
    assert plain.labels is None and plain.labelling is None and list(plain.names) == list(source.names)


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_may_be_changed_while_it_is_read(folder, kind):
    source = open_images(KINDS[kind](folder))
    for i in range(2):
        whole = source.read(i)
        assert (whole.dtype, whole.shape) == (np.uint8, (4, 5, 3))
        assert np.array_equal(source.read(i, lambda image: image[:2]), whole[:2])


@pytest.mark.parametrize("name", ["a.NPZ", "a.Zip", "a.CSV"])
def test_endings_in_capitals(folder, name):
    kind = name.split(".")[1].lower()
    made = {"npz": arrays, "zip": archive, "csv": table}[kind](folder)
    assert len(open_images(made.rename(folder / name))) == 2


def test_names_of_arrays_are_their_numbers(folder):
    assert open_images(arrays(folder)).names == ["d.npz[0]", "d.npz[1]"]


@pytest.mark.parametrize("name", ["a.gif", "a", "a.tar", "a.png"])
def test_other_kinds_of_files(tmp_path, name):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(
        CalibrationError, match=rf"images .*{name}: neither a folder nor a kind of file that is known"
    ) as error:
        open_images(tmp_path / name)
    assert ".npz" in error.value.fix and error.value.exit_code == 6


def test_nothing_in_it(tmp_path):
    with pytest.raises(CalibrationError, match=f"images {tmp_path}: no image in it") as error:
        open_images(tmp_path)
    assert "*.png, *.jpg" in error.value.fix


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("gone", "no such file or folder"),
        ("file.txt/x", "no such file or folder"),
        ("x" * 300, "File name too long"),
        ("a\0", "null"),
    ],
)
def test_why_a_path_cannot_be_opened(tmp_path, path, why):
    (tmp_path / "file.txt").touch()
    with pytest.raises(CalibrationError, match=why) as error:
        open_images(f"{tmp_path}/{path}")
    assert ".npz" in error.value.fix


def test_a_list_of_what_is_not_there(folder):
    with pytest.raises(CalibrationError) as error:
        open_images(table(folder, "x/1.png,0\ny/3.png,1\n"))
    assert str(error.value) == f"images {folder}/list.csv: it lists y/3.png, and {folder}/y/3.png does not exist"
    assert error.value.fix == "Paths are relative to the list."


def test_lists_may_name_an_image_elsewhere(folder, tmp_path):
    path = table(folder, f"{write(tmp_path / 'e/3.png', 3)}\n../e/3.png\nx/1.png\n")
    first, second, third = (open_images(path).read(i).tolist() for i in range(3))
    assert first == second != third


@pytest.mark.parametrize(("most", "fits"), [(20, True), (19, False)])
def test_a_list_that_is_none(folder, monkeypatch, most, fits):
    monkeypatch.setattr(sources, "_LARGEST_BYTES", most)
    path = table(folder, "x/1.png,0\ny/2.png,1\n")
    assert path.stat().st_size == 20
    if fits:
        assert len(open_images(path)) == 2
    else:
        with pytest.raises(CalibrationError, match=r"list\.csv: has 20 bytes, which is not a list of images"):
            open_images(path)


def test_a_member_of_the_largest_size(folder, monkeypatch):
    path = archive(folder)
    size = (folder / "x/1.png").stat().st_size
    monkeypatch.setattr(sources, "_LARGEST_BYTES", size)
    assert open_images(path).read(0).shape == (4, 5, 3)
    monkeypatch.setattr(sources, "_LARGEST_BYTES", size - 1)
    with pytest.raises(
        CalibrationError, match=rf"image {path}/x/1\.png: cannot be read \({size} bytes, the limit is {size - 1}\)"
    ):
        open_images(path).read(0)


def test_tables_that_cannot_be_read(folder):
    path = table(folder, name="labels.csv")
    path.unlink()
    path.symlink_to("/proc/self/mem")  # a file of which no byte at its start can be read
    if not os.path.exists("/proc/self/mem"):
        pytest.skip("Linux's /proc")
    with pytest.raises(CalibrationError, match=r"labels\.csv: cannot be read \(.*error\)"):
        open_images(folder)


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_one_folder_around_all_of_it(folder, kind):
    table(folder, "1.png,4\n", "x/labels.csv")
    (folder / "y/2.png").unlink()
    (folder / "y").rmdir()
    assert open_images(KINDS[kind](folder)).labels.tolist() == [4]
    (folder / "x/labels.csv").write_text("2.png,4\n")
    with pytest.raises(CalibrationError, match=r"x/labels\.csv: no label for 1\.png"):
        open_images(KINDS[kind](folder))


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_a_list_of_classes_in_it(folder, kind):
    table(folder, "y\nx\n", "classes.txt")
    source = open_images(KINDS[kind](folder))
    assert source.labels.tolist() == [1, 0] and list(source.labelling.folders) == []
    (folder / "classes.txt").write_text("y\n")
    with pytest.raises(CalibrationError, match=rf"{KINDS[kind](folder)}/classes\.txt: has no line 'x'"):
        open_images(KINDS[kind](folder))


def touch(path):
    os.utime(path, ns=(0, 12 * 10**17))


CHANGES = {
    "time": lambda folder: touch(folder / "x/1.png"),
    "size": lambda folder: (folder / "x/1.png").write_bytes(b"x"),
    "name": lambda folder: (folder / "x/1.png").rename(folder / "x/0.png"),
    "class": lambda folder: (folder / "x").rename(folder / "w"),
    "labels": lambda folder: table(folder, "x/1.png,5\ny/2.png,1\n", "labels.csv"),
    "what they rest on": lambda folder: table(folder, "x\ny\n", "classes.txt"),
    "one more": lambda folder: write(folder / "y/3.png"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_a_change_shows_in_the_fingerprint(folder, change, kind):
    for file in folder.rglob("*.png"):
        os.utime(file, ns=(0, 10**18))

    def fingerprint():
        path = KINDS[kind](folder)
        if kind == "zip":
            os.utime(path, ns=(0, 10**18))
        return open_images(path).fingerprint

    before = fingerprint()
    assert fingerprint() == before
    CHANGES[change](folder)
    if (kind, change) == ("zip", "time"):
        touch(folder.with_suffix(".zip"))
        assert open_images(folder.with_suffix(".zip")).fingerprint != before
    else:
        assert fingerprint() != before


def test_labels_alone_show_in_the_fingerprint(folder):
    assert open_images(folder).fingerprint != open_images(folder, labelled=False).fingerprint
