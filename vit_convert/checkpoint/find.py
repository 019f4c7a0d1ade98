"""Where a checkpoint is: a path, or an address, which is downloaded unless a folder holds its file already."""

import contextlib
import dataclasses
import os
import pathlib
import urllib.parse
from collections.abc import Iterator, Sequence

from vit_convert.checkpoint.containers import split_subtree
from vit_convert.checkpoint.fetch import fetch, is_address, local_name
from vit_convert.checkpoint.published import Published, published_at
from vit_convert.core.bundle import atomic
from vit_convert.core.errors import CheckpointError, UsageError
from vit_convert.core.progress import Progress, human_bytes

FOLDER = "checkpoints"


@dataclasses.dataclass(frozen=True)
class Found:
    """A checkpoint file, and what is known of it.

    Attributes:
        path: the file.
        subtree: the part of it to use, as in `file.npz:img`; "" for all.
        address: where it was published; "" for a plain path.
        published: the table's entry for that address; None if there is none.
        sha256: given in the address, in hex; "" if none is.
    """

    path: pathlib.Path
    subtree: str = ""
    address: str = ""
    published: Published | None = None
    sha256: str = ""

    def require_sha256(self, found: str) -> None:
        """Compares the file's sha256 with that of the first download, which is stored beside the file.

        Args:
            found: the file's sha256, in hex.

        Raises:
            CheckpointError: they differ.
        """
        if not self.address:
            return
        beside = self.path.with_name(self.path.name + ".sha256")  # in sha256sum's format, so that `sha256sum -c` works
        try:
            kept = beside.read_text(encoding="utf-8").split()[0]
        except (OSError, ValueError, IndexError):
            kept = ""
        for expected, source in ((self.sha256, "the address says"), (kept, f"{beside} says")):
            if expected and expected.lower() != found:
                raise CheckpointError(
                    f"{self.path}: sha256 {found}, {source} {expected.lower()}",
                    fix=f"The file changed. Remove it and {beside.name}; the next run downloads it again.",
                )
        if not kept:
            with contextlib.suppress(OSError, UsageError), atomic(beside) as temporary:  # the folder may be read-only
                temporary.write_text(f"{found}  {self.path.name}\n", encoding="utf-8")


def find_checkpoint(
    given: str, folders: Sequence[str | os.PathLike[str]] = (FOLDER,), *, progress: Progress | None = None
) -> Found:
    """Finds a checkpoint, and downloads it if it is nowhere.

    A path is used as it is; a relative one that does not exist is also looked for in the folders. For an address, each
    folder is searched for the file's own name (only if `PUBLISHED` knows the file's size, head and resolution), for the
    name that a download gets, and for the whole path without `gs://`.

    Args:
        given: a path, or an `https://`, `http://` or `gs://bucket/path` address; `#sha256=<hex>` at its end is
            verified, and a sub-tree such as `:img` may follow the file.
        folders: where to look; a download goes to the first.
        progress: shows a bar, and says which files were skipped.

    Returns:
        The file; a path that does not exist is returned as it is.

    Raises:
        CheckpointError, UsageError: see `fetch`.
    """
    progress = progress or Progress(quiet=True)
    if not is_address(given):
        name, subtree = split_subtree(given)
        places = [pathlib.Path(folder, name) for folder in ("", *folders)]
        return Found(next((path for path in places if os.path.exists(path)), places[0]), subtree)
    address, _, fragment = given.partition("#")
    address, subtree = split_subtree(address)
    sha256 = urllib.parse.parse_qs(fragment).get("sha256", [""])[0]
    published = None if sha256 else published_at(address)
    accepts = published.may_have if published else lambda num_bytes: True
    passed_over = []
    for path in _candidates(address, folders, published):
        if accepts(size := path.stat().st_size):
            return Found(path, subtree, address, published, sha256)
        listed = published.size if published else ""
        passed_over.append(f"{path} has {human_bytes(size)}, {address} {listed}: it is another file, or incomplete")
    for text in passed_over:
        progress.warn(text)
    kept_as = published.name if published else ""
    path = fetch(address, folders[0], sha256=sha256, accepts=accepts, kept_as=kept_as, progress=progress)
    return Found(path, subtree, address, published, sha256)


def _candidates(
    address: str, folders: Sequence[str | os.PathLike[str]], published: Published | None
) -> Iterator[pathlib.Path]:
    whole = pathlib.PurePosixPath(urllib.parse.unquote(address.partition("://")[2]))
    names = [*([published.name] if published else []), local_name(address)]
    if not {"..", "/"} & set(whole.parts):
        names.append(str(whole))
    for folder in folders:
        for name in names:
            if os.path.isfile(path := pathlib.Path(folder) / name):
                yield path
