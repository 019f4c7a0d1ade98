"""The manifest of a bundle: what each stage did, and which files it left."""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from vit_convert.core.bundle import Bundle, hash_file, read_json

FINISHED = ("done", "fresh")  # of what a stage of another status left, nothing is known


@dataclasses.dataclass(frozen=True)
class FileRecord:
    """A file that a stage left, and how to recognise it.

    Attributes:
        path: relative to the bundle.
        bytes: its size.
        sha256: of its content, in hex.
        stat: (mtime_ns, ctime_ns, inode) when it was hashed; while they are the same, the file is not read again.
    """

    path: str
    bytes: int
    sha256: str
    stat: tuple[int, int, int]

    @classmethod
    def of(cls, root: pathlib.Path, path: pathlib.Path) -> "FileRecord":
        """Describes a file of the bundle at `root` as it is now."""
        size, *stat = _stat(path)
        return cls(path.relative_to(root).as_posix(), size, hash_once(path), (stat[0], stat[1], stat[2]))

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> "FileRecord":
        """Reads one entry of a manifest.

        Raises:
            KeyError, TypeError, ValueError: it is not an entry.
        """
        mtime, ctime, inode = map(int, value["stat"])
        return cls(str(value["path"]), int(value["bytes"]), str(value["sha256"]), (mtime, ctime, inode))

    def found(self, root: pathlib.Path) -> "FileRecord | None":
        """The record of the file as it is now; None if it is missing or has other content. A copy has another
        `stat`."""
        try:
            size, *stat = _stat(root / self.path)
            if size != self.bytes:
                return None
            if tuple(stat) == self.stat:
                return self
            now = FileRecord.of(root, root / self.path)
        except OSError:
            return None
        return now if now.sha256 == self.sha256 else None


def _stat(path: pathlib.Path) -> tuple[int, int, int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino


def hash_once(path: str | os.PathLike[str]) -> str:
    """The sha256 of a file, which this process reads again only if it changed: hashing a large model takes seconds."""
    return _hash(os.fspath(path), _stat(pathlib.Path(path)))


@functools.lru_cache(maxsize=256)
def _hash(path: str, stat: tuple[int, int, int, int]) -> str:
    return hash_file(path)


@dataclasses.dataclass(frozen=True)
class Files:
    """The files that the finished stages of a bundle left; no other file of it may be read.

    Attributes:
        root: the bundle's folder.
        records: by path relative to it.
        makers: the stage that left each.
    """

    root: pathlib.Path
    records: Mapping[str, FileRecord]
    makers: Mapping[str, str]

    def __contains__(self, path: object) -> bool:
        return self._name(path) in self.records

    def __iter__(self) -> Iterator[pathlib.Path]:
        return (self.root / name for name in self.records)

    def record(self, path: str | os.PathLike[str]) -> FileRecord | None:
        """The record of a file, None if no finished stage left it."""
        return self.records.get(self._name(path))

    def wrong(self, path: str | os.PathLike[str]) -> str:
        """Why a file may not be read as one of this conversion's; "" if it may."""
        record = self.record(path)
        if record is None:
            return f"{os.fspath(path)}: no finished stage of this conversion made it"
        if not (self.root / record.path).is_file():
            return f"{os.fspath(path)}: there is no such file, which stage {self.makers[record.path]} left"
        if record.found(self.root) is None:
            return (
                f"{os.fspath(path)}: is not the file that stage {self.makers[record.path]} left ({record.sha256[:12]}…)"
            )
        return ""

    def graph_hashes(self, path: str | os.PathLike[str]) -> dict[str, str]:
        """The hashes of a graph and its weights, as sidecars of engines hold them; {} if no finished stage left the
        graph."""
        graph, data = self.record(path), self.record(f"{os.fspath(path)}.data")
        if graph is None:
            return {}
        return {"sha256": graph.sha256} | ({"data_sha256": data.sha256} if data else {})

    def wrong_graph(self, path: str | os.PathLike[str]) -> str:
        """Why a graph or its weights may not be read; "" if they may."""
        data = f"{os.fspath(path)}.data"
        return self.wrong(path) or (self.wrong(data) if data in self or os.path.exists(data) else "")

    def _name(self, path: Any) -> str:
        path = pathlib.Path(path)
        return path.relative_to(self.root).as_posix() if path.is_relative_to(self.root) else path.as_posix()


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What `manifest.json` holds.

    Attributes:
        root: the bundle's folder.
        rows: by stage name, in order: status, key, result, files, …; the status is "done", "fresh", "failed", "running"
            (or killed while running) or "stale" (left by an earlier conversion; whether it still holds is not known).
        command: the last command line that ran a stage.
        versions: of the packages that stages ran with.
    """

    root: pathlib.Path
    rows: Mapping[str, Mapping[str, Any]]
    command: str = ""
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @classmethod
    def read(cls, bundle: Bundle) -> "Manifest":
        """Reads a bundle's manifest; a missing or damaged one has no rows."""
        value = read_json(bundle.manifest)
        value = value if isinstance(value, dict) else {}
        listed = value.get("stages")
        rows = [row for row in listed if isinstance(row, dict)] if isinstance(listed, list) else []
        versions = value.get("versions")
        return cls(
            bundle.root,
            {str(row["name"]): row for row in rows if "name" in row},
            str(value.get("command", "")),
            versions if isinstance(versions, dict) else {},
        )

    def finished(self, name: str) -> bool:
        """Whether a stage finished in this conversion."""
        return self.rows.get(name, {}).get("status") in FINISHED

    def result(self, name: str) -> dict[str, Any]:
        """What a stage returned, or had measured when it failed; {} for one that did not run in this conversion."""
        row = self.rows.get(name, {})
        return dict(row.get("result") or {}) if row.get("status") in (*FINISHED, "failed") else {}

    @property
    def files(self) -> Files:
        """The files that the finished stages left."""
        finished = {name: records_of(row) for name, row in self.rows.items() if self.finished(name)}
        found = {record.path: (record, name) for name, records in finished.items() for record in records or ()}
        return Files(
            self.root,
            {path: record for path, (record, _) in found.items()},
            {path: name for path, (_, name) in found.items()},
        )


def records_of(row: Mapping[str, Any]) -> list[FileRecord] | None:
    """The files that a row of a manifest names; None if it names none in this version's form."""
    try:
        return [FileRecord.from_dict(value) for value in row["files"]]
    except (KeyError, TypeError, ValueError):
        return None


def as_rows(records: Iterable[FileRecord]) -> list[dict[str, Any]]:
    """The files as a row of a manifest names them."""
    return [dataclasses.asdict(record) for record in records]
