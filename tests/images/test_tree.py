"""What lies in a folder or an archive of images: names, folders and files, without opening one of them."""

import os
import zipfile

import pytest

from vit_convert.core.errors import CalibrationError
from vit_convert.images import tree as tree_module
from vit_convert.images.tree import Tree, is_image, tree_of_folder, tree_of_zip

NAMES = ["b.png", "a/2.JPG", "a/1.webp", "a/deep/er/x.tif", "z/notes.txt", "a/labels.csv", "empty/"]
EXPECTED = Tree(
    ["a/1.webp", "a/2.JPG", "a/deep/er/x.tif", "b.png"],
    {"": ["a", "empty", "z"], "a": ["deep"], "a/deep": ["er"], "a/deep/er": [], "z": [], "empty": []},
    frozenset({"z/notes.txt", "a/labels.csv"}),
)


def make(root, *names):
    for name in names:
        path = root / name
        (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
        if not name.endswith("/"):
            path.write_bytes(b"x")
    return root


def members(*names):
    return [zipfile.ZipInfo(name) for name in names]


def normal(tree):
    """Folders that hold none need not be listed, and the order in which an archive names them says nothing."""
    return tree.images, {inside: sorted(names) for inside, names in tree.folders.items() if names}, tree.others


def test_a_folder(tmp_path):
    assert tree_of_folder(make(tmp_path, *NAMES)) == EXPECTED


def test_an_archive():
    tree, paths = tree_of_zip(members(*NAMES))
    assert normal(tree) == normal(EXPECTED)
    assert {path: member.filename for path, member in paths.items()} == {
        name: name for name in NAMES if not name.endswith("/")
    }


def test_nothing_at_all(tmp_path):
    assert tree_of_folder(tmp_path) == tree_of_zip([])[0] == Tree([], {"": []}, frozenset())


@pytest.mark.parametrize(
    "name", [".a.png", ".git/a.png", "x/.cache/y/a.png", "__MACOSX/a.png", "x/__MACOSX/a.png", "x/._a.png"]
)
def test_what_is_left_out(tmp_path, name):
    make(tmp_path, name, "x/b.png", "x__MACOSX/c.png")
    wanted = (["x/b.png", "x__MACOSX/c.png"], {"": ["x", "x__MACOSX"]}, frozenset())
    assert normal(tree_of_folder(tmp_path)) == wanted
    assert normal(tree_of_zip(members(name, "x/b.png", "x__MACOSX/c.png"))[0]) == wanted


@pytest.mark.parametrize("suffix", ["png", "jpg", "jpeg", "webp", "bmp", "ppm", "pgm", "tif", "tiff"])
def test_what_an_image_is_called(suffix):
    """The list of torchvision's ImageFolder."""
    assert is_image(f"a.{suffix}") and is_image(f"a.{suffix.upper()}")
    assert not is_image(f"a.{suffix}x") and not is_image(suffix) and not is_image(f"a.{suffix}.txt")


def test_other_kinds_are_no_images():
    assert not any(map(is_image, ("a.gif", "a.svg", "a.npy", "a", "", "a.pngz")))


# --- folders ----------------------------------------------------------------------------------------------------------


def test_links_are_followed(tmp_path):
    make(tmp_path / "store", "a.png", "b/c.png")
    root = make(tmp_path / "d", "ant/1.png")
    (root / "bee").symlink_to(tmp_path / "store", target_is_directory=True)
    (root / "cat").symlink_to(tmp_path / "store/b", target_is_directory=True)
    (root / "e.png").symlink_to(tmp_path / "store/a.png")
    tree = tree_of_folder(root)
    assert list(tree.images) == ["ant/1.png", "bee/a.png", "bee/b/c.png", "cat/c.png", "e.png"]
    assert list(tree.folders[""]) == ["ant", "bee", "cat"]


@pytest.mark.parametrize("target", [".", "..", "../.."])
def test_links_in_a_circle(tmp_path, target):
    root = make(tmp_path / "d", "ant/deep/1.png")
    (root / "ant/deep/again").symlink_to(target, target_is_directory=True)
    with pytest.raises(CalibrationError, match="again: a link leads back to a folder that it lies in") as error:
        tree_of_folder(root)
    assert error.value.fix == "Remove the link."


def test_links_that_lead_nowhere(tmp_path):
    root = make(tmp_path, "1.png")
    (root / "notes.txt").symlink_to("gone.txt")
    (root / "class").symlink_to("gone", target_is_directory=True)
    assert tree_of_folder(root) == Tree(["1.png"], {"": []}, frozenset())
    (root / "2.png").symlink_to("gone.png")
    with pytest.raises(
        CalibrationError, match=rf"image {root}/2\.png: cannot be read \(No such file or directory\)"
    ) as error:
        tree_of_folder(root)
    assert error.value.fix


def test_what_is_neither_file_nor_folder(tmp_path):
    root = make(tmp_path, "1.png")
    os.mkfifo(root / "pipe.png")
    assert tree_of_folder(root) == Tree(["1.png"], {"": []}, frozenset())


def test_a_folder_that_cannot_be_read(tmp_path):
    with pytest.raises(
        CalibrationError, match=r"gone: the folder cannot be read \(No such file or directory\)"
    ) as error:
        tree_of_folder(tmp_path / "gone")
    assert error.value.fix


@pytest.mark.parametrize(
    ("limit", "names", "what"),
    [
        ("_MOST_FOLDERS", ["a/1.png", "b/1.png", "c/1.png", "d/1.png"], "3 folders"),  # and the root
        ("_MOST_OTHERS", ["a/1", "b/2.txt", "c/3.npy", "c/4", "c/5.txt", "c/6.png"], "3 files that are not images"),
        ("_MOST_FILES", ["a/1.png", "b/2.png", "b/3.png", "c/4.png", "d/notes.txt"], "3 files"),
    ],
)
def test_what_is_too_much_for_a_data_set(tmp_path, monkeypatch, limit, names, what):
    """A disk that is given by mistake is not walked to its end."""
    make(tmp_path / "d", *names)
    monkeypatch.setattr(tree_module, limit, 5)
    assert len(tree_of_folder(tmp_path / "d").folders) == 1 + len({name[0] for name in names})
    monkeypatch.setattr(tree_module, limit, 3)
    read, listdir = [], os.listdir
    monkeypatch.setattr(tree_module.os, "listdir", lambda path: read.append(path) or listdir(path))
    with pytest.raises(CalibrationError, match=f"{tmp_path}/d: more than {what} in it; it was not read") as error:
        tree_of_folder(tmp_path / "d")
    assert "Give the folder that holds the images" in error.value.fix
    assert tmp_path / "d/a" not in read  # which comes last


def test_as_much_as_a_data_set_may_have(tmp_path, monkeypatch):
    """Exactly as many as allowed, and what is known of the largest: ImageNet-21k's folders and images."""
    assert tree_module._MOST_FOLDERS > 21_841 and tree_module._MOST_FILES > 14_197_122
    make(tmp_path, "a/1.png", "a/2.png", "b/3.txt")
    for limit, most in (("_MOST_FOLDERS", 3), ("_MOST_OTHERS", 1), ("_MOST_FILES", 3)):
        monkeypatch.setattr(tree_module, limit, most)
    assert list(tree_of_folder(tmp_path).images) == ["a/1.png", "a/2.png"]


@pytest.mark.parametrize(("folders", "kept"), [(62, True), (63, True), (64, False)])
def test_folders_deeper_than_any_data_set(tmp_path, folders, kept):
    """As deep as an archive's may be; links that lead on and on are refused so, too."""
    make(tmp_path, "a/" * folders + "1.png")
    if kept:
        assert list(tree_of_folder(tmp_path).images) == ["a/" * folders + "1.png"]
        return
    with pytest.raises(CalibrationError, match="lies more than 63 folders deep; it was not read further"):
        tree_of_folder(tmp_path)


# --- archives ---------------------------------------------------------------------------------------------------------


def windows(name):
    member = zipfile.ZipInfo("x")
    member.filename = name  # ZipInfo itself would cut or change it
    return member


def test_names_of_windows_become_ours():
    tree, paths = tree_of_zip([windows("val\\ant\\1.png"), windows("val\\bee\\")])
    assert tree == Tree(["val/ant/1.png"], {"": ["val"], "val": ["ant", "bee"]}, frozenset())
    assert list(paths) == ["val/ant/1.png"]
    tree, _ = tree_of_zip([windows("val/a\\b.png")])  # whoever writes "/" may mean the other as itself
    assert list(tree.images) == ["val/a\\b.png"]


def test_names_are_made_plain():
    tree, _ = tree_of_zip(members("./a//b/./1.png", "/c/2.png", "./", "/"))
    assert (list(tree.images), tree.folders) == (["a/b/1.png", "c/2.png"], {"": ["a", "c"], "a": ["b"]})


def test_folders_are_listed_once_and_in_their_order():
    tree, _ = tree_of_zip(members("b/", "b/1.png", "a/c/2.png", "a/3.png", "b/4.png"))
    assert tree.folders[""] == ["b", "a"] and tree.folders["a"] == ["c"]


@pytest.mark.parametrize(("folders", "kept"), [(62, True), (63, True), (64, False), (65, False)])
def test_depths_that_no_data_set_has(folders, kept):
    """Of 64 parts; beyond that a list of all folders around would grow with the square."""
    tree, _ = tree_of_zip(members("a/" * folders + "1.png", "b.png"))
    assert len(tree.images) == 1 + kept


def test_the_last_of_two_members_of_one_name_counts():
    """As unpacking would leave it."""
    first, second = members("a.png", "./a.png")
    tree, paths = tree_of_zip([first, second])
    assert list(tree.images) == ["a.png"] and paths["a.png"] is second
