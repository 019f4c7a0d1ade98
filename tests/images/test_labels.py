"""Class ids as torchvision's ImageFolder gives them, or a refusal that names what stands in the way; never another
class's number."""

import os
import pathlib
import zipfile

import numpy as np
import pytest
from PIL import Image

from vit_convert.core.errors import CalibrationError
from vit_convert.images.sources import open_images


def write(root: pathlib.Path, *names: str) -> pathlib.Path:
    for seed, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(root / name)
    return root


def zipped(folder: pathlib.Path) -> pathlib.Path:
    """The folder as `zip -r` writes it, with entries for the folders themselves."""
    path = folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, file.relative_to(folder))
    return path


def by_name(path: pathlib.Path) -> dict[str, int]:
    source = open_images(path)
    assert source.labels is not None
    return dict(zip(source.names, source.labels.tolist()))


@pytest.fixture(params=["folder", "zip"])
def both(request, tmp_path):
    """Opens a folder of the test's, or the archive made of it."""
    return lambda folder: zipped(folder) if request.param == "zip" else folder


def test_places_are_those_of_torchvision(tmp_path, torchvision_operators):
    folder = pytest.importorskip("torchvision.datasets.folder", reason="torchvision is not installed")
    root = write(tmp_path / "d", "b/1.png", "A/x.webp", "a/deep/1.png", "c1/2.bmp", "c10/1.PNG", "c2/1.jpeg")
    theirs = {os.path.relpath(path, root): label for path, label in folder.ImageFolder(str(root)).samples}
    assert by_name(root) == theirs


@pytest.mark.parametrize("suffix", ["png", "jpg", "jpeg", "webp", "bmp", "ppm", "tif", "tiff", "WEBP"])
def test_kinds_of_files(both, tmp_path, suffix):
    root = write(tmp_path / "d", "ant/1.png", f"bee/1.{suffix}", "cat/1.png")
    assert by_name(both(root)) == {"ant/1.png": 0, f"bee/1.{suffix}": 1, "cat/1.png": 2}
    source = open_images(both(root))
    assert source.read(1).shape == (8, 8, 3)


@pytest.mark.parametrize("content", [None, "notes.txt", "1.gif", "deep/"])
def test_class_without_an_image_is_refused(both, tmp_path, content):
    root = write(tmp_path / "d", "ant/1.png", "cat/1.png")
    (root / "bee").mkdir()
    if content and content.endswith("/"):
        (root / "bee" / content).mkdir()
    elif content:
        (root / "bee" / content).write_text("x")
    with pytest.raises(CalibrationError, match="no image in class folder bee"):
        open_images(both(root))
    assert open_images(both(root), labelled=False).labels is None  # for calibration nothing is the matter


def test_class_whose_images_cannot_be_reached(tmp_path):
    root = write(tmp_path / "d", "ant/1.png", "cat/1.png")
    (root / "bee").mkdir()
    (root / "bee/1.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(CalibrationError, match=r"bee/1\.png: cannot be read"):
        open_images(root)


def test_class_folder_that_cannot_be_read(tmp_path, monkeypatch):
    """As root everything can be read, so the refusal is put in the system call's place."""
    root = write(tmp_path / "d", "ant/1.png", "bee/1.png")
    real = os.listdir

    def listdir(path):
        if pathlib.Path(path).name == "bee":
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "listdir", listdir)
    with pytest.raises(CalibrationError, match=r"bee: the folder cannot be read \(Permission denied\)"):
        open_images(root)


def test_numbered_classes_need_not_be_there(both, tmp_path):
    root = write(tmp_path / "d", "0/1.png", "2/1.png", "10/1.png")
    (root / "5").mkdir()
    assert by_name(both(root)) == {"0/1.png": 0, "10/1.png": 10, "2/1.png": 2}


def test_one_number_twice(both, tmp_path):
    with pytest.raises(CalibrationError, match="folders 01, 1: two of them are the same number"):
        open_images(both(write(tmp_path / "d", "1/1.png", "01/1.png")))


def test_folder_names_of_many_digits_are_no_numbers(tmp_path):
    assert by_name(write(tmp_path / "d", f"{'9' * 30}/1.png", f"{'1' * 200}/1.png")) == {
        f"{'1' * 200}/1.png": 0,
        f"{'9' * 30}/1.png": 1,
    }


@pytest.mark.parametrize(
    "hidden",
    [".ipynb_checkpoints/1-checkpoint.png", "__MACOSX/ant/1.png", ".git/1.png", "ant/.thumbnails/1.png", "ant/._1.png"],
)
def test_hidden_names_are_no_classes_and_no_images(both, tmp_path, hidden):
    root = write(tmp_path / "d", "ant/1.png", "bee/1.png", hidden)
    assert by_name(both(root)) == {"ant/1.png": 0, "bee/1.png": 1}


@pytest.mark.parametrize("around", ["val", "data/val", "train"])
def test_folders_around_are_looked_through(both, tmp_path, around):
    root = write(tmp_path / "d", f"{around}/ant/1.png", f"{around}/bee/1.png", ".DS_Store.png")
    assert by_name(both(root)) == {f"{around}/ant/1.png": 0, f"{around}/bee/1.png": 1}


def test_labels_file_in_the_folder_around(both, tmp_path):
    root = write(tmp_path / "d", "val/a.png", "val/b.png")
    (root / "val/labels.csv").write_text("a.png,3\nb.png,5\n")
    assert by_name(both(root)) == {"val/a.png": 3, "val/b.png": 5}


def test_one_class_alone(both, tmp_path):
    assert by_name(both(write(tmp_path / "d", "ant/1.png", "ant/2.png"))) == {"ant/1.png": 0, "ant/2.png": 0}


@pytest.mark.parametrize("names", [("train", "val"), ("Test", "train", "val"), ("train", "test")])
def test_splits_are_no_classes(both, tmp_path, names):
    root = write(tmp_path / "d", *(f"{name}/{label}/1.png" for name in names for label in ("ant", "bee")))
    with pytest.raises(CalibrationError, match="are splits of a data set, not classes"):
        open_images(both(root))


def test_a_folder_inside_each_class(both, tmp_path):
    """As Tiny ImageNet has it."""
    root = write(tmp_path / "d", "n01/images/1.png", "n02/images/1.png")
    assert by_name(both(root)) == {"n01/images/1.png": 0, "n02/images/1.png": 1}


def test_links_are_followed(tmp_path):
    write(tmp_path / "store", "x/1.png", "y/1.png")
    root = tmp_path / "d"
    root.mkdir()
    (root / "ant").symlink_to(tmp_path / "store/y", target_is_directory=True)
    (root / "bee").mkdir()
    (root / "bee/1.png").symlink_to(tmp_path / "store/x/1.png")
    (root / "cat").symlink_to(tmp_path / "store/y", target_is_directory=True)
    assert by_name(root) == {"ant/1.png": 0, "bee/1.png": 1, "cat/1.png": 2}


def test_links_that_lead_in_a_circle(tmp_path):
    root = write(tmp_path / "d", "ant/1.png", "bee/1.png")
    (root / "ant/again").symlink_to(root, target_is_directory=True)
    with pytest.raises(CalibrationError, match="ant/again: a link leads back to a folder that it lies in"):
        open_images(root)


# --- a list of the head's classes -------------------------------------------------------------------------------------


def test_class_list_gives_the_numbers(both, tmp_path):
    root = write(tmp_path / "d", "val/cat/1.png", "val/ant/1.png")
    (root / "val/bee").mkdir()
    (root / "val/classes.txt").write_text("dog\ncat\nbee\nant\n\n")
    assert by_name(both(root)) == {"val/ant/1.png": 3, "val/cat/1.png": 1}
    assert open_images(both(root)).labelling.folders == ()  # so that nothing depends on how many folders there are


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ant\nbea\n", "has no line 'bee', which is a folder. Did you mean bea"),
        ("ant\nbee\nant\n", "line 3 is 'ant' for a second time"),
        ("ant\n\nbee\n", "line 2 is empty"),
        ("", "has no line 'ant'"),
    ],
)
def test_class_list_with_mistakes(both, tmp_path, text, message):
    root = write(tmp_path / "d", "ant/1.png", "bee/1.png")
    (root / "classes.txt").write_text(text)
    with pytest.raises(CalibrationError, match=message):
        open_images(both(root))


def test_how_many_folders_there_are_is_known(both, tmp_path):
    root = write(tmp_path / "d", "ant/1.png", "bee/1.png")
    assert open_images(both(root)).labelling.folders == ["ant", "bee"]


# --- tables -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.png,1\nb.png,2\na.png,3\n", r"labels a\.png twice, 1 and 3"),
        ("a.png,1\n", r"no label for b\.png"),
        ("a.png,1\nb.png,-1\n", r"line 'b\.png,-1' is not like the others"),
        ("a.png,1\nb.png," + "9" * 30 + "\n", "is not like the others"),
        ("a.png,1\nb.png," + "9" * 5000 + "\n", "is not like the others"),
        ("a.png,1.0\nb.png,2.0\n", "is not like the others"),
        ("a.png\nb.png\n", "no labels in it"),
        ("", "no labels in it"),
        ("a.png,\0\nb.png,1\n", r"no label for a\.png|not a table|not like the others"),  # Python 3.10 has other rules
    ],
)
def test_tables_with_mistakes(both, tmp_path, text, message):
    root = write(tmp_path / "d", "a.png", "b.png")
    (root / "labels.csv").write_text(text)
    with pytest.raises(CalibrationError, match=message):
        open_images(both(root))


def test_a_line_twice_says_nothing_else(both, tmp_path):
    root = write(tmp_path / "d", "a.png")
    (root / "labels.csv").write_text("a.png,1\na.png,1\n")
    assert by_name(both(root)) == {"a.png": 1}


def test_lists_with_long_blanks_are_read_at_once(tmp_path):
    """Split by a pattern, a line of n blanks takes n² steps: this one would take hours."""
    write(tmp_path, "a.png")
    (tmp_path / "list.txt").write_text("a" + " " * 200_000 + "b\n")
    with pytest.raises(CalibrationError, match="it lists"):
        open_images(tmp_path / "list.txt")


@pytest.mark.parametrize(
    "path", ["x" * 300, "a\0b", "file.png/inside"], ids=["too long", "with a zero", "inside a file"]
)
def test_paths_that_no_file_can_have(tmp_path, path):
    write(tmp_path, "file.png")
    with pytest.raises(CalibrationError, match="images "):
        open_images(f"{tmp_path}/{path}")


def test_member_of_an_archive_that_claims_too_much(tmp_path, monkeypatch):
    from vit_convert.images import sources

    path = zipped(write(tmp_path / "d", "a.png"))
    monkeypatch.setattr(sources, "_LARGEST_BYTES", 100)
    with pytest.raises(CalibrationError, match=r"a\.png: .* bytes, the limit is 100"):
        open_images(path).read(0)


def test_names_of_windows(tmp_path):
    write(tmp_path, "1.png")
    with zipfile.ZipFile(tmp_path / "d.zip", "w") as archive:
        for name in ("val\\ant\\1.png", "val\\bee\\1.png"):
            member = zipfile.ZipInfo("x")
            member.filename = name  # ZipInfo itself would cut or change it
            archive.writestr(member, (tmp_path / "1.png").read_bytes())
    assert list(by_name(tmp_path / "d.zip").values()) == [0, 1]


# --- huge images ------------------------------------------------------------------------------------------------------


def test_huge_images_are_decoded_one_at_a_time(tmp_path, monkeypatch):
    import threading
    from concurrent.futures import ThreadPoolExecutor

    from vit_convert.images import pixels

    root = write(tmp_path / "d", *(f"{i}.png" for i in range(6)))
    monkeypatch.setattr(pixels, "_HUGE_PIXELS", 8)
    source, at_once, most = open_images(root), [], []
    lock = threading.Lock()

    def then(image):
        with lock:
            at_once.append(1)
            most.append(len(at_once))
        threading.Event().wait(0.01)
        with lock:
            at_once.pop()
        return image

    with ThreadPoolExecutor(6) as pool:
        results = list(pool.map(lambda i: source.read(i, then), range(6)))
    assert max(most) == 1
    assert [result.shape for result in results] == [(8, 8, 3)] * 6


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of TIFF files
@pytest.mark.parametrize("position", range(8, 80, 5))
def test_damaged_images_are_named(tmp_path, position):
    """Pillow's readers raise whatever they trip over."""
    root = write(tmp_path / "d", "a.png", "b.webp", "c.tiff", "e.jpg", "f.bmp")
    for file in root.iterdir():
        content = bytearray(file.read_bytes())
        content[position : position + 4] = b"\xff\xff\xff\xff"
        file.write_bytes(content)
    source = open_images(root)
    for i, name in enumerate(source.names):
        try:
            assert source.read(i).ndim == 3  # pixels may have changed, and that cannot be told
        except CalibrationError as e:
            assert name in str(e)
