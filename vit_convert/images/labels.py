"""Class ids of images: from a table of labels, or from their folders, numbered as in torchvision's ImageFolder."""

import csv
import io
import re
from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np

from vit_convert.core.errors import CalibrationError, nearest
from vit_convert.images.tree import is_image

LABELS_FILE = "labels.csv"
CLASSES_FILE = "classes.txt"
SEPARATORS = {".csv": ",", ".tsv": "\t", ".txt": ""}
_SPLITS = ("train", "training", "val", "valid", "validation", "dev", "test", "testing", "eval", "evaluation")
_SHOWN = 8


def labels_by_folder(
    where: str, files: Sequence[str], folders: Sequence[str], classes: bytes | None
) -> tuple[np.ndarray, bool] | None:
    """Numbers the images by their folders.

    If a folder's name is a number, that is its class. Otherwise the class is the folder's line in `classes.txt`, or
    without such a file its position among the sorted folders.

    Args:
        where: what was opened, for messages.
        files: paths of the images, relative to it.
        folders: the folders directly in it, including those without images.
        classes: content of `classes.txt`, or None.

    Returns:
        int64 [images], and whether they are positions in sorted order, which are meaningful only if every class has a
        folder; None if an image is in no folder.

    Raises:
        CalibrationError: a class folder has no image, so that sorted positions would be shifted; or its name is a
            number, but not its position; or the folders are splits, not classes; or `classes.txt` lacks one.
    """
    if not files or not all("/" in name for name in files):
        return None
    used = [name.split("/", 1)[0] for name in files]
    names = sorted({*folders, *used})
    if len(names) > 1 and all(name.lower() in _SPLITS for name in names):
        raise CalibrationError(
            f"images {where}: {_few(names)} are splits of a data set, not classes", fix="Give one of them."
        )
    if classes is not None:
        numbers = _class_list(where, classes)
        if missing := [name for name in names if name not in numbers]:
            raise CalibrationError(
                f"{where}/{CLASSES_FILE}: has no line {missing[0]!r}, which is a folder.{nearest(missing[0], numbers)}",
                fix="It lists the classes of the head in their order, one folder name a line.",
            )
        return np.array([numbers[name] for name in used], np.int64), False
    if all(_is_label(name) for name in names):  # "10" sorts before "2", and a class may have no image
        if len({int(name) for name in names}) < len(names):
            raise CalibrationError(
                f"images {where}: folders {_few(names)}: two of them are the same number", fix="Rename one."
            )
        return np.array([int(name) for name in used], np.int64), False
    if empty := sorted(set(names) - set(used)):
        raise CalibrationError(
            f"images {where}: no image in class folder {_few(empty)}, so every class behind it would get another's "
            "number",
            fix="Put an image into it or remove it; or name the folders by class number, or list the classes in "
            f"{CLASSES_FILE}.",
        )
    place = {name: i for i, name in enumerate(names)}
    if wrong := [name for name in names if _is_label(name) and int(name) != place[name]]:
        raise CalibrationError(
            f"images {where}: folder {wrong[0]} is number {place[wrong[0]]} of {len(names)} in sorted order, because "
            f"{next(name for name in names if not _is_label(name))} is no number",
            fix=f"Name all folders by class number, or list the classes in {CLASSES_FILE}.",
        )
    return np.array([place[name] for name in used], np.int64), True


def labels_by_table(path: str, files: Sequence[str], table: bytes) -> np.ndarray:
    """Class ids from a `labels.csv`: int64 [images].

    Raises:
        CalibrationError: it is malformed, or an image has no label, or two.
    """
    names, labels = parse_table(path, table, ",")
    if labels is None:
        raise CalibrationError(f"{path}: no labels in it", fix="Each line is `name,label`.")
    ids: dict[str, int] = {}
    for name, label in zip(names, labels.tolist()):
        if ids.setdefault(name, label) != label:
            raise CalibrationError(
                f"{path}: labels {name} twice, {ids[name]} and {label}", fix="Leave one of the lines."
            )
    for name in files:
        if name not in ids:
            raise CalibrationError(
                f"{path}: no label for {name}", fix="List every image by its path in the folder, or remove the file."
            )
    return np.array([ids[name] for name in files], np.int64)


def parse_table(path: str, table: bytes, separator: str) -> tuple[list[str], np.ndarray | None]:
    """Reads a list of images; the first line is a header if it has a word where others have a number.

    Args:
        path: the file, for messages.
        table: its content.
        separator: between a path and its label; "" for white space.

    Returns:
        The paths and, if every line has one, the labels: int64 [lines].

    Raises:
        CalibrationError: it is not text, or its lines differ in form.
    """
    try:
        rows = [row for row in _rows(table.decode("utf-8-sig"), separator) if row]
    except (UnicodeDecodeError, csv.Error) as e:
        raise CalibrationError(f"{path}: not a table of text ({e})", fix="Save it as UTF-8.") from e
    if len(rows) > 1 and len(rows[0]) == len(rows[1]) == 2 and _is_header(*rows[0]) and _is_label(rows[1][1]):
        rows = rows[1:]
    for row in rows:
        if len(row) != len(rows[0]) or len(row) > 2 or (len(row) == 2 and not _is_label(row[1])):
            raise CalibrationError(
                f"{path}: line {separator.join(row)[:200]!r} is not like the others",
                fix="Each line is a path, and in all lines or none a class id >= 0.",
            )
    labels = np.array([int(row[1]) for row in rows], np.int64) if rows and len(rows[0]) == 2 else None
    return [row[0] for row in rows], labels


def class_root(files: Sequence[str], folders: Mapping[str, Sequence[str]], others: Collection[str]) -> str:
    """The folder that contains the class folders: "val/" if an archive or a copy put a folder around the data set,
    otherwise "".

    Args:
        files: paths of the images, relative to what was opened.
        folders: for each folder ("" for the root) the names of the folders in it.
        others: paths of the files that are not images.

    Returns:
        A prefix of all files; the search stops at a `labels.csv`, or before the class folders or the images.
    """
    prefix = ""
    while f"{prefix}{LABELS_FILE}" not in others and len(inside := folders.get(prefix.rstrip("/"), ())) == 1:
        deeper = f"{prefix}{inside[0]}/"
        if not all(name.startswith(deeper) for name in files):
            break
        if f"{deeper}{LABELS_FILE}" not in others and not any("/" in name[len(deeper) :] for name in files):
            break  # the single folder contains only images: it is a class
        prefix = deeper
    return prefix


def _class_list(where: str, classes: bytes) -> dict[str, int]:
    try:
        lines = [line.strip() for line in classes.decode("utf-8-sig").splitlines()]
    except UnicodeDecodeError as e:
        raise CalibrationError(f"{where}/{CLASSES_FILE}: not text ({e})", fix="Save it as UTF-8.") from e
    while lines and not lines[-1]:
        lines.pop()
    numbers: dict[str, int] = {}
    for i, line in enumerate(lines):
        if not line or numbers.setdefault(line, i) != i:
            raise CalibrationError(
                f"{where}/{CLASSES_FILE}: line {i + 1} is {'empty' if not line else f'{line!r} for a second time'}",
                fix="It lists the classes of the head in their order, one folder name a line.",
            )
    return numbers


def _rows(text: str, separator: str) -> Iterator[list[str]]:
    if separator:
        yield from ([cell.strip() for cell in row] for row in csv.reader(io.StringIO(text), delimiter=separator))
        return
    for line in map(str.strip, text.splitlines()):  # a path may hold spaces, so only a number at the end is split off
        path = line.rstrip("0123456789")
        if path and path != line and (path[-1] == "," or path[-1].isspace()):
            yield [cell for cell in (path.rstrip(", \t"), line[len(path) :]) if cell]
        else:
            yield [line] if line else []


def _is_header(name: str, label: str) -> bool:
    """Whether a line names columns; an image with an invalid label (-1, 2.0, one too large, none) must not be mistaken
    for a header."""
    try:
        float(label)
    except ValueError:
        return bool(label) and not is_image(name)
    return False


def _is_label(cell: str) -> bool:
    return re.fullmatch("[0-9]{1,18}", cell) is not None  # more digits do not fit int64


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
