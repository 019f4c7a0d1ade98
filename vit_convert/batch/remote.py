"""A workdir in an object store (`gs://`, `s3://`, whatever fsspec reads): bundles are uploaded whole, and committed by
a final file.

A bundle `<workdir>/<name>/` exists once `<name>/commit.json` does: it lists every file with its size and sha256, and is
removed before any of them changes. What a killed upload left is not a bundle, and the next upload replaces it.
"""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence

from vit_convert.batch.outcome import Outcome
from vit_convert.core.bundle import Bundle, as_json, hash_file
from vit_convert.core.errors import PassingError, UsageError
from vit_convert.core.record import Record, RecordError, optional

COMMIT = "commit.json"
_SCHEMA = "vit_convert.commit/1"
_AT_A_TIME = 256  # commits read concurrently


class StoreError(PassingError, UsageError):
    """An object store failed; it may work later."""

    exit_code = UsageError.exit_code


@dataclasses.dataclass(frozen=True)
class StoredFile(Record):
    """A file of a committed bundle.

    Attributes:
        bytes: its size.
        sha256: of its content, in hex.
    """

    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class CheckpointIdentity(Record):
    """What identifies a checkpoint's content: of a file the first three, of a folder the fourth, otherwise the last.

    Attributes:
        bytes: its size.
        mtime_ns: when it was changed.
        sha256: of its content, in hex.
        files: a hash of the names, sizes and times of a folder's files.
        address: of a checkpoint that is not on this machine.
    """

    bytes: int | None = optional()
    mtime_ns: int | None = optional()
    sha256: str | None = optional()
    files: str | None = optional()
    address: str | None = optional()


@dataclasses.dataclass(frozen=True)
class Commit(Record):
    """What `commit.json` holds.

    Attributes:
        schema: names this form.
        key: the hash of what was converted and how.
        checkpoint: what identifies the checkpoint's content.
        files: of the bundle, by their path in it.
        outcome: of the conversion.
    """

    schema: str
    key: str
    checkpoint: CheckpointIdentity
    files: Mapping[str, StoredFile]
    outcome: Outcome


def is_remote(workdir: str) -> bool:
    """Whether a workdir is an address.

    Example:
        >>> is_remote("gs://bucket/out"), is_remote("out")
        (True, False)
    """
    return re.match(r"[a-z][a-z0-9+.-]*://", workdir) is not None


class Remote:
    """A folder in an object store.

    Args:
        address: `s3://bucket/path`.

    Raises:
        UsageError: fsspec, or what it needs for this kind of address, is not installed.
    """

    def __init__(self, address: str):
        self.address = address.rstrip("/")
        try:
            import fsspec

            protocol = fsspec.utils.get_protocol(address)
            # Other stores create folders implicitly; cached listings would be outdated after an upload.
            options = {"auto_mkdir": True} if protocol in ("file", "local") else {"use_listings_cache": False}
            self._fs, root = fsspec.core.url_to_fs(self.address, **options)
        except (ImportError, ValueError) as e:  # the latter for an unknown kind of address
            raise UsageError(
                f"--workdir={address}: {e}", fix="pip install 'vit_convert[s3]' or 'vit_convert[gs]'"
            ) from e
        self._root = str(root).rstrip("/")

    def path(self, *parts: str) -> str:
        """The full name of a file."""
        return "/".join((self._root, *parts))

    def read(self, name: str) -> bytes | None:
        """The content of a file; None if it is not there."""
        with self._errors(name):
            try:
                return bytes(self._fs.cat_file(self.path(name)))
            except FileNotFoundError:
                return None

    def write(self, name: str, content: bytes) -> None:
        """Writes a file."""
        with self._errors(name):
            self._fs.pipe_file(self.path(name), content)

    def remove(self, name: str) -> None:
        """Removes a file, if it is there."""
        with self._errors(name), contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(self.path(name))

    def commits(self, names: Sequence[str]) -> dict[str, Commit]:
        """The commits of the bundles that are whole.

        Args:
            names: of bundles.
        """
        found: dict[str, Commit] = {}
        for begin in range(0, len(names), _AT_A_TIME):
            paths = {self.path(name, COMMIT): name for name in names[begin : begin + _AT_A_TIME]}
            with self._errors(COMMIT):
                texts = self._fs.cat([*paths], on_error="omit") if paths else {}
            for path, text in texts.items():
                if (commit := _commit(text)) is not None:
                    found[paths[path]] = commit
        return found

    def push(self, bundle: Bundle, key: str, checkpoint: CheckpointIdentity, outcome: Outcome) -> None:
        """Uploads a bundle, and commits it when every file is there; files of an earlier one are removed, or kept if
        they are the same.

        Args:
            bundle: whole.
            key, checkpoint, outcome: for its `Commit`.

        Raises:
            StoreError: the store refused a file.
        """
        name = bundle.root.name
        files = {path.relative_to(bundle.root).as_posix(): path for path in sorted(_files(bundle))}
        stored = {part: StoredFile(path.stat().st_size, hash_file(path)) for part, path in files.items()}
        earlier = self.commits([name]).get(name)
        there = earlier.files if earlier else {}
        self.remove(f"{name}/{COMMIT}")
        for part, path in files.items():
            if there.get(part) == stored[part]:
                continue
            with self._errors(f"{name}/{part}"):
                self._fs.put_file(os.fspath(path), self.path(name, part))
        for part in self._names(name) - files.keys():
            self.remove(f"{name}/{part}")
        commit = Commit(_SCHEMA, key, checkpoint, stored, outcome)
        self.write(f"{name}/{COMMIT}", (as_json(commit) + "\n").encode())

    def pull(
        self, name: str, folder: pathlib.Path, commit: Commit, *, of: Callable[[str], bool] = lambda part: True
    ) -> None:
        """Downloads a committed bundle; files that are there already stay.

        Args:
            name: of the bundle.
            folder: to download to.
            commit: from `commits`.
            of: selects its files.

        Raises:
            StoreError: a file differs from the committed one.
        """
        for part, stored in commit.files.items():
            path = folder / part
            if not of(part) or _is(path, stored):
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            with self._errors(f"{name}/{part}"):
                self._fs.get_file(self.path(name, part), os.fspath(path))
            if not _is(path, stored):
                raise StoreError(f"{self.address}/{name}/{part}: is not the file that was committed")

    def _names(self, name: str) -> set[str]:
        """The names below a folder."""
        root = self.path(name) + "/"
        with self._errors(name):
            try:
                return {str(path).removeprefix(root) for path in self._fs.find(root)}
            except FileNotFoundError:
                return set()

    @contextlib.contextmanager
    def _errors(self, name: str) -> Iterator[None]:
        """Adds the file's name to errors; all of a store's errors count as temporary, because their classes do not
        say."""
        try:
            yield
        except UsageError:
            raise
        except FileNotFoundError as e:
            raise UsageError(f"{self.address}/{name}: is not there ({e})", fix="Is that the name of the bucket?") from e
        except PermissionError as e:
            raise UsageError(
                f"{self.address}/{name}: refused ({e})", fix="Check the credentials of this machine."
            ) from e
        except Exception as e:
            raise StoreError(f"{self.address}/{name}: {type(e).__name__}: {' '.join(str(e).split())[:300]}") from e


@functools.cache
def remote_at(address: str) -> Remote:
    """The store at an address; one connection per process."""
    return Remote(address)


def _commit(text: bytes) -> Commit | None:
    try:
        value = json.loads(text)
        return Commit.from_dict(value) if value.get("schema") == _SCHEMA else None
    except (ValueError, AttributeError, RecordError):  # damaged, or another program's
        return None


def _files(bundle: Bundle) -> Iterator[pathlib.Path]:
    """All files of a bundle except locks and unfinished ones."""
    return (path for path in bundle.root.rglob("*") if path.is_file() and not path.name.startswith("."))


def _is(path: pathlib.Path, stored: StoredFile) -> bool:
    return path.is_file() and path.stat().st_size == stored.bytes and hash_file(path) == stored.sha256


def forget(bundle: Bundle) -> None:
    """Removes the local copy of a bundle that is committed."""
    shutil.rmtree(bundle.root, ignore_errors=True)
