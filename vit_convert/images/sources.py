"""Sources of images: a folder, a zip archive, an `.npz` file or a list, all read by index."""

import dataclasses
import io
import os
import pathlib
import zipfile
from collections.abc import Callable, Sequence

import numpy as np

from vit_convert.core.bundle import hash_value
from vit_convert.core.errors import CalibrationError
from vit_convert.core.zip_member import UNREADABLE, FileState, open_member
from vit_convert.images.arrays import read_arrays
from vit_convert.images.labels import (
    CLASSES_FILE,
    LABELS_FILE,
    SEPARATORS,
    class_root,
    labels_by_folder,
    labels_by_table,
    parse_table,
)
from vit_convert.images.pixels import decode_image
from vit_convert.images.tree import SUFFIXES, Tree, tree_of_folder, tree_of_zip

# bytes of a file in an archive, or of a table: an uncompressed image with Pillow's limit of pixels
_LARGEST_BYTES = 1 << 28
_OFFERED = "Give a folder, a .zip, an .npz with `images`, or a .txt, .csv or .tsv list."

Transform = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Labels:
    """Class ids, and their basis.

    Attributes:
        ids: int64 [images].
        folders: names of the class folders if the ids are just their positions in sorted order; otherwise empty.
    """

    ids: np.ndarray
    folders: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class ImageSource:
    """A set of images in a fixed order, read one at a time.

    Attributes:
        path: what was opened.
        names: one per image, for messages.
        labelling: class ids, or None.
        read: maps an image's index, and perhaps a function to apply to its pixels, to uint8 [height, width, 3]; safe to
            call from several threads. Raises CalibrationError, which names the image, if it cannot be decoded.
        fingerprint: hash of the files' names, labels, sizes and modification times, which reveals changes without
            reading them.
    """

    path: pathlib.Path
    names: Sequence[str]
    labelling: Labels | None
    read: "Reader"
    fingerprint: str

    def __len__(self) -> int:
        return len(self.names)

    @property
    def labels(self) -> np.ndarray | None:
        """Class ids int64 [images], or None."""
        return None if self.labelling is None else self.labelling.ids


class Reader:
    """Reads one image by its index.

    Args:
        decode: maps an index and a function of the pixels to the result.
    """

    def __init__(self, decode: Callable[[int, Transform | None], np.ndarray]):
        self._decode = decode

    def __call__(self, i: int, then: Transform | None = None) -> np.ndarray:
        return self._decode(i, then)


def open_images(path: str | os.PathLike[str], *, labelled: bool = True) -> ImageSource:
    """Opens a set of images.

    A folder or `.zip` gives its images at any depth, sorted by name; hidden files and folders are skipped, links are
    followed. Labels come from a `labels.csv` in it (lines of `name,label`), or else from sub-folders if every image is
    in one: the numbers in their names, or their lines in a `classes.txt`, or their positions in sorted order. A single
    folder around all of that is ignored. An `.npz` holds `images` uint8 [N, H, W, 3] and perhaps integer `labels` [N].
    A list has a path per line, relative to the list, and perhaps a label.

    Args:
        path: folder or file.
        labelled: False if labels are not needed, so that bad ones are not refused.

    Returns:
        The ImageSource.

    Raises:
        CalibrationError: it does not exist, has no image or is malformed, or a label is uncertain.
    """
    path = pathlib.Path(path)
    try:
        is_folder = path.is_dir()
        os.stat(path)
    except (OSError, ValueError) as e:
        why = (
            "no such file or folder"
            if isinstance(e, FileNotFoundError | NotADirectoryError)
            else getattr(e, "strerror", None) or str(e)
        )
        raise CalibrationError(f"images {path}: {why}", fix=_OFFERED) from e
    opener = _open_folder if is_folder else _OPENERS.get(path.suffix.lower())
    if opener is None:
        raise CalibrationError(f"images {path}: neither a folder nor a kind of file that is known", fix=_OFFERED)
    source = opener(path, labelled)
    if not len(source):
        raise CalibrationError(
            f"images {path}: no image in it", fix=f"Images are files named {', '.join('*' + s for s in SUFFIXES)}."
        )
    return source


def _open_folder(folder: pathlib.Path, labelled: bool) -> ImageSource:
    tree = tree_of_folder(folder)
    labels = _labels(folder, tree, lambda name: _content(folder / name)) if labelled else None
    return _open_files(folder, tree.images, [folder / name for name in tree.images], labels)


def _open_list(path: pathlib.Path, labelled: bool) -> ImageSource:
    names, ids = parse_table(str(path), _content(path), SEPARATORS[path.suffix.lower()])
    files = [path.parent / name for name in names]
    for name, file in zip(names, files):
        if not os.path.isfile(file):
            raise CalibrationError(
                f"images {path}: it lists {name}, and {file} does not exist", fix="Paths are relative to the list."
            )
    return _open_files(path, names, files, Labels(ids) if labelled and ids is not None else None)


def _open_files(
    path: pathlib.Path, names: Sequence[str], files: Sequence[pathlib.Path], labels: Labels | None
) -> ImageSource:
    def read(i: int, then: Transform | None) -> np.ndarray:
        return decode_image(files[i], str(files[i]), then)

    return ImageSource(path, names, labels, Reader(read), _fingerprint(names, files, labels))


def _open_zip(path: pathlib.Path, labelled: bool) -> ImageSource:
    try:
        state = FileState.of(path)
        with zipfile.ZipFile(path) as archive:
            tree, members = tree_of_zip(archive.infolist())
    except UNREADABLE as e:
        raise CalibrationError(f"images {path}: not a readable zip archive ({e})") from e

    def content(name: str) -> bytes:
        if (size := members[name].file_size) > _LARGEST_BYTES:
            raise CalibrationError(
                f"image {path}/{name}: cannot be read ({size} bytes, the limit is {_LARGEST_BYTES})", fix="Remove it."
            )
        try:
            # not through `archive`, because threads must not share a handle
            with open_member(path, members[name], state) as stream:
                return stream.read()
        except UNREADABLE as e:
            raise CalibrationError(
                f"image {path}/{name}: cannot be read from the archive ({e})", fix="Remove or replace it."
            ) from e

    def read(i: int, then: Transform | None) -> np.ndarray:
        name = tree.images[i]
        return decode_image(io.BytesIO(content(name)), f"{path}/{name}", then)

    labels = _labels(path, tree, content) if labelled else None
    return ImageSource(path, tree.images, labels, Reader(read), _fingerprint(tree.images, [path], labels))


def _open_npz(path: pathlib.Path, labelled: bool) -> ImageSource:
    images, ids = read_arrays(path)
    names = [f"{path.name}[{i}]" for i in range(len(images))]
    labels = Labels(ids) if labelled and ids is not None else None

    def read(i: int, then: Transform | None) -> np.ndarray:
        return np.asarray(images[i]) if then is None else then(np.asarray(images[i]))

    return ImageSource(path, names, labels, Reader(read), _fingerprint(names, [path], labels))


_OPENERS: dict[str, Callable[[pathlib.Path, bool], ImageSource]] = {
    ".zip": _open_zip,
    ".npz": _open_npz,
    **dict.fromkeys(SEPARATORS, _open_list),
}


def _labels(path: pathlib.Path, tree: Tree, content: Callable[[str], bytes]) -> Labels | None:
    """Class ids from a labels.csv if it exists, otherwise from the folders."""
    prefix = class_root(tree.images, tree.folders, tree.others)
    files, where = [name.removeprefix(prefix) for name in tree.images], f"{path}/{prefix}".rstrip("/")
    if (table := f"{prefix}{LABELS_FILE}") in tree.others:
        return Labels(labels_by_table(f"{path}/{table}", files, content(table)))
    folders = tree.folders[prefix.rstrip("/")]
    listed = f"{prefix}{CLASSES_FILE}"
    found = labels_by_folder(where, files, folders, content(listed) if listed in tree.others else None)
    if found is None:
        return None
    ids, are_places = found
    return Labels(ids, sorted(folders) if are_places else ())


def _content(path: pathlib.Path) -> bytes:
    try:
        if (size := path.stat().st_size) > _LARGEST_BYTES:
            raise CalibrationError(f"{path}: has {size} bytes, which is not a list of images")
        return path.read_bytes()
    except OSError as e:
        raise CalibrationError(f"{path}: cannot be read ({e.strerror})", fix="Make it readable.") from e


def _fingerprint(names: Sequence[str], files: Sequence[pathlib.Path], labels: Labels | None) -> str:
    stats = [file.stat() for file in files]
    labelling = None if labels is None else [labels.ids, list(labels.folders)]
    return hash_value([list(names), [[stat.st_size, stat.st_mtime_ns] for stat in stats], labelling])
