"""The files in a folder or an archive of images, without hidden files and those that operating systems leave behind."""

import dataclasses
import os
import pathlib
import stat
import zipfile
from collections.abc import Mapping, Sequence

from vit_convert.core.errors import CalibrationError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff")  # torchvision's
_DEEPEST = 64  # parts of a path; more is surely not a data set
# In a folder and all below it, so that a disk given by mistake is refused within seconds: ImageNet-21k, the largest set
# labelled by folders, has 21 841 folders and 14 197 122 images.
_MOST_FOLDERS = 200_000
_MOST_OTHERS = 200_000
_MOST_FILES = 20_000_000


@dataclasses.dataclass(frozen=True)
class Tree:
    """The names in a folder or an archive.

    Attributes:
        images: paths of the images, sorted, with "/" and relative to the root.
        folders: for each folder ("" for the root) the names of the folders in it, including those without an image.
        others: paths of all other files.
    """

    images: Sequence[str]
    folders: Mapping[str, Sequence[str]]
    others: frozenset[str]


def tree_of_folder(root: pathlib.Path) -> Tree:
    """Walks a folder, following links.

    Raises:
        CalibrationError: a folder cannot be read, a link leads back to a folder that contains it, an image's link leads
            nowhere, or there is too much in it for a data set.
    """
    paths: list[str] = []
    folders: dict[str, list[str]] = {}
    others = 0
    # with the identities of the folders above
    to_visit: list[tuple[str, frozenset[tuple[int, int]]]] = [("", frozenset())]
    while to_visit:
        inside, above = to_visit.pop()
        here = root / inside
        try:
            state = os.stat(here)
            names = sorted(name for name in os.listdir(here) if not _left_out(name))
        except OSError as e:
            raise CalibrationError(
                f"images {here}: the folder cannot be read ({e.strerror})", fix="Make it readable, or remove it."
            ) from e
        if (state.st_dev, state.st_ino) in above:
            raise CalibrationError(
                f"images {here}: a link leads back to a folder that it lies in", fix="Remove the link."
            )
        above |= {(state.st_dev, state.st_ino)}
        modes = {name: _mode(here / name) for name in names}
        folders[inside] = [name for name, mode in modes.items() if stat.S_ISDIR(mode)]
        to_visit += [(f"{inside}/{name}".lstrip("/"), above) for name in folders[inside]]
        paths += [f"{inside}/{name}".lstrip("/") for name, mode in modes.items() if stat.S_ISREG(mode)]
        others += sum(not stat.S_ISDIR(mode) and not is_image(name) for name, mode in modes.items())
        _require_data_set(root, inside, folders=len(folders) + len(to_visit), others=others, files=len(paths))
    return _tree(paths, folders)


def _require_data_set(root: pathlib.Path, inside: str, *, folders: int, others: int, files: int) -> None:
    """Refuses what is not a folder of images, such as a disk, before all of it is walked."""
    if inside.count("/") + 2 > _DEEPEST:  # the parts of a file in it
        raise CalibrationError(
            f"images {root}: {inside[:80]}… lies more than {_DEEPEST - 1} folders deep; it was not read further",
            fix="Give the folder that holds the images and nothing else.",
        )
    for found, most, what in (
        (folders, _MOST_FOLDERS, "folders"),
        (others, _MOST_OTHERS, "files that are not images"),
        (files, _MOST_FILES, "files"),
    ):
        if found > most:
            raise CalibrationError(
                f"images {root}: more than {most} {what} in it; it was not read further",
                fix="Give the folder that holds the images and nothing else.",
            )


def _mode(path: pathlib.Path) -> int:
    """The type of a file or of a link's target; 0 if the link leads nowhere and is not named like an image."""
    try:
        return os.stat(path).st_mode
    except OSError as e:
        if is_image(path.name):
            raise CalibrationError(f"image {path}: cannot be read ({e.strerror})", fix="Remove or replace it.") from e
        return 0


def tree_of_zip(members: Sequence[zipfile.ZipInfo]) -> tuple[Tree, dict[str, zipfile.ZipInfo]]:
    """The names in an archive, as in the folder that it was made from; Windows' "\\" becomes "/".

    Returns:
        The Tree, and the members by the paths in it.
    """
    paths: dict[str, zipfile.ZipInfo] = {}
    folders: dict[str, dict[str, None]] = {"": {}}
    for member in members:
        name = member.filename if "/" in member.filename else member.filename.replace("\\", "/")
        parts = [part for part in name.split("/") if part not in ("", ".")]
        if not parts or len(parts) > _DEEPEST or any(map(_left_out, parts)):
            continue
        is_folder = name.endswith("/")
        for depth in range(len(parts) if is_folder else len(parts) - 1):
            folders.setdefault("/".join(parts[:depth]), {})[parts[depth]] = None
        if not is_folder:
            paths["/".join(parts)] = member
    return _tree(list(paths), {inside: list(names) for inside, names in folders.items()}), paths


def _tree(paths: Sequence[str], folders: Mapping[str, Sequence[str]]) -> Tree:
    images = sorted(path for path in paths if is_image(path))
    return Tree(images, folders, frozenset(paths) - frozenset(images))


def is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)


def _left_out(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"
