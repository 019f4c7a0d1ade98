"""Where images come from: a folder, a zip archive, an `.npz` file or a list, all read by number."""

import csv
import dataclasses
import io
import os
import pathlib
import re
import string
import zipfile
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from vit_convert.bundle import hash_value
from vit_convert.errors import CalibrationError
from vit_convert.images.arrays import read_arrays
from vit_convert.images.pixels import decode_image
from vit_convert.zip_member import UNREADABLE, FileState, open_member

_SUFFIXES = (".png", ".jpg", ".jpeg")
_LABELS_FILE = "labels.csv"
_LARGEST_BYTES = 1 << 28  # of a file in an archive: an image of Pillow's limit of pixels, uncompressed
_OFFERED = "Give a folder, a .zip, an .npz with `images`, or a .txt, .csv or .tsv list."


@dataclasses.dataclass(frozen=True)
class ImageSource:
    """A set of images in a fixed order, read one at a time.

    Attributes:
        path: what was opened.
        names: one per image, for messages.
        labels: class ids int64 [images], or None where there are none.
        read: maps an image's number to uint8 [height, width, 3]; safe to call from several threads. Raises CalibrationError, which names
            the image, for one that cannot be decoded.
        fingerprint: hash of the names, labels, sizes and modification times of the files, so that a change is seen without reading them.
    """

    path: pathlib.Path
    names: Sequence[str]
    labels: np.ndarray | None
    read: Callable[[int], np.ndarray]
    fingerprint: str

    def __len__(self) -> int:
        return len(self.names)


def open_images(path: str | os.PathLike[str]) -> ImageSource:
    """Opens a set of images.

    A folder or `.zip` gives its `*.png`, `*.jpg` and `*.jpeg` at any depth, sorted by name. Labels come from a `labels.csv` in it (lines of
    `name,label`), or else from the sub-folders where every image lies in one: the numbers that they are named by, or their places in sorted
    order. An `.npz` holds `images` uint8 [N, H, W, 3] and perhaps integer `labels` [N]. A list has a path, relative to itself, and
    perhaps a label in each line.

    Args:
        path: folder or file.

    Returns:
        The ImageSource.

    Raises:
        CalibrationError: nothing is there, no image is in it, or it is malformed.
    """
    path = pathlib.Path(path)
    if not path.exists():
        raise CalibrationError(f"images {path}: no such file or folder", fix=_OFFERED)
    opener = _open_folder if path.is_dir() else _OPENERS.get(path.suffix.lower())
    if opener is None:
        raise CalibrationError(f"images {path}: neither a folder nor a kind of file that is known", fix=_OFFERED)
    source = opener(path)
    if not len(source):
        raise CalibrationError(f"images {path}: no image in it", fix=f"Images are files named {', '.join('*' + s for s in _SUFFIXES)}.")
    return source


def _open_folder(folder: pathlib.Path) -> ImageSource:
    files = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if _is_image(file.name) and file.is_file())
    labels_file = folder / _LABELS_FILE
    labels = _labels(labels_file, files, labels_file.read_bytes() if labels_file.exists() else None)
    return _open_files(folder, files, [folder / name for name in files], labels)


def _open_list(path: pathlib.Path) -> ImageSource:
    names, labels = _parse_table(path, path.read_bytes(), _SEPARATORS[path.suffix.lower()])
    files = [path.parent / name for name in names]
    for name, file in zip(names, files):
        if not os.path.isfile(file):  # False, too, for what no file can be called
            raise CalibrationError(f"images {path}: it lists {name}, and {file} does not exist", fix="Paths are relative to the list.")
    return _open_files(path, names, files, labels)


def _open_files(path: pathlib.Path, names: Sequence[str], files: Sequence[pathlib.Path], labels: np.ndarray | None) -> ImageSource:
    return ImageSource(path, names, labels, lambda i: decode_image(files[i], str(files[i])), _fingerprint(names, files, labels))


def _open_zip(path: pathlib.Path) -> ImageSource:
    try:
        state = FileState.of(path)
        with zipfile.ZipFile(path) as archive:
            members = {member.filename: member for member in archive.infolist()}
        table = _read_member(path, members[_LABELS_FILE], state) if _LABELS_FILE in members else None
    except UNREADABLE as e:
        raise CalibrationError(f"images {path}: not a readable zip archive ({e})") from e
    files = sorted(name for name in members if _is_image(pathlib.PurePosixPath(name).name))
    labels = _labels(path / _LABELS_FILE, files, table)

    def read(i: int) -> np.ndarray:
        name = f"{path}/{files[i]}"
        try:
            content = _read_member(path, members[files[i]], state)
        except UNREADABLE as e:
            raise CalibrationError(f"image {name}: cannot be read from the archive ({e})", fix="Remove or replace it.") from e
        return decode_image(io.BytesIO(content), name)

    return ImageSource(path, files, labels, read, _fingerprint(files, [path], labels))


def _read_member(path: pathlib.Path, member: zipfile.ZipInfo, state: FileState) -> bytes:
    if member.file_size > _LARGEST_BYTES:
        raise zipfile.BadZipFile(f"{member.filename} has {member.file_size} bytes, the limit is {_LARGEST_BYTES}")
    with open_member(path, member, state) as stream:  # not through a ZipFile: threads must not share a handle
        return stream.read()


def _open_npz(path: pathlib.Path) -> ImageSource:
    images, labels = read_arrays(path)
    names = [f"{path.name}[{i}]" for i in range(len(images))]
    return ImageSource(path, names, labels, lambda i: np.asarray(images[i]), _fingerprint(names, [path], labels))


_SEPARATORS = {".csv": ",", ".tsv": "\t", ".txt": ""}
_OPENERS: dict[str, Callable[[pathlib.Path], ImageSource]] = {
    ".zip": _open_zip,
    ".npz": _open_npz,
    **dict.fromkeys(_SEPARATORS, _open_list),
}


def _is_image(name: str) -> bool:
    return name.lower().endswith(_SUFFIXES) and not name.startswith(".")


def _labels_by_folder(files: Sequence[str]) -> np.ndarray | None:
    if not files or not all("/" in name for name in files):
        return None
    folders = [name.split("/", 1)[0] for name in files]
    classes = sorted(set(folders))
    numbered = all(_is_label(name) for name in classes)  # "10" sorts before "2", and a class may have no image
    ids = {name: int(name) if numbered else i for i, name in enumerate(classes)}
    return np.array([ids[name] for name in folders], np.int64)


def _labels(path: pathlib.Path, files: Sequence[str], table: bytes | None) -> np.ndarray | None:
    """Class ids from a labels.csv where there is one, else from the folders."""
    if table is None:
        return _labels_by_folder(files)
    names, labels = _parse_table(path, table, ",")
    if labels is None:
        raise CalibrationError(f"{path}: no labels in it", fix="Each line is `name,label`.")
    ids = dict(zip(names, labels))
    for name in files:
        if name not in ids:
            raise CalibrationError(f"{path}: no label for {name}", fix="List every image by its path in the folder, or remove the file.")
    return np.array([ids[name] for name in files], np.int64)


def _parse_table(path: pathlib.Path, table: bytes, separator: str) -> tuple[list[str], np.ndarray | None]:
    """Names and, where every line has one, labels; a first line with a word where others have a number is a header."""
    try:
        rows = [row for row in _rows(table.decode("utf-8-sig"), separator) if row]
    except (UnicodeDecodeError, csv.Error) as e:
        raise CalibrationError(f"{path}: not a table of text ({e})", fix="Save it as UTF-8.") from e
    if len(rows) > 1 and len(rows[0]) == len(rows[1]) == 2 and _is_header(*rows[0]) and _is_label(rows[1][1]):
        rows = rows[1:]
    for row in rows:
        if len(row) != len(rows[0]) or len(row) > 2 or (len(row) == 2 and not _is_label(row[1])):
            raise CalibrationError(
                f"{path}: line {separator.join(row)!r} is not like the others",
                fix="Each line is a path, and in all lines or none a class id >= 0.",
            )
    labels = np.array([int(row[1]) for row in rows], np.int64) if rows and len(rows[0]) == 2 else None
    return [row[0] for row in rows], labels


def _rows(text: str, separator: str) -> Iterator[list[str]]:
    if separator:
        yield from ([cell.strip() for cell in row] for row in csv.reader(io.StringIO(text), delimiter=separator))
        return
    for line in text.splitlines():  # a path may hold spaces, so only a number at the end is split off
        name = line.strip().rstrip(string.digits)
        label, cut = line.strip()[len(name) :], name.rstrip(string.whitespace + ",")
        yield [cell for cell in ((cut, label) if label and cut != name else (name + label,)) if cell]


def _is_header(name: str, label: str) -> bool:
    """Whether a line names columns; an image with a label that is none (-1, 2.0, one too large, none) must not pass for one."""
    try:
        float(label)
    except ValueError:
        return bool(label) and not _is_image(name)
    return False


def _is_label(cell: str) -> bool:
    return re.fullmatch("[0-9]{1,18}", cell) is not None  # more digits are no int64


def _fingerprint(names: Sequence[str], files: Sequence[pathlib.Path], labels: np.ndarray | None) -> str:
    stats = [file.stat() for file in files]
    return hash_value([list(names), [[stat.st_size, stat.st_mtime_ns] for stat in stats], labels])
