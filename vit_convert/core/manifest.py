"""The manifest of a bundle: what each stage did, and which files it left."""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from vit_convert.core.bundle import Bundle, hash_file, read_json
from vit_convert.core.record import Record, RecordError, optional

FINISHED = ("done", "fresh")  # nothing is known about the files of a stage with another status


@dataclasses.dataclass(frozen=True)
class FileRecord(Record):
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

    def __post_init__(self) -> None:
        if not (self.path and self.sha256 and len(self.stat) == 3):
            raise RecordError(f"FileRecord: {self.path!r} lacks its name, its sha256 or its times")

    @classmethod
    def of(cls, root: pathlib.Path, path: pathlib.Path) -> "FileRecord":
        """Describes a file of the bundle at `root` as it is now."""
        size, *stat = _stat(path)
        return cls(path.relative_to(root).as_posix(), size, hash_once(path), (stat[0], stat[1], stat[2]))

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
    """The sha256 of a file; this process reads the file again only if it changed, since hashing a large model takes
    seconds."""
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
        """The record of a file; None if no finished stage left it."""
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
class StageRecord(Record):
    """What the manifest says of one stage.

    Attributes:
        name: as `--until` calls it.
        status: "done", "fresh", "failed", "running" (or killed while running) or "stale" (left by an earlier
            conversion; whether it still holds is not known).
        key: a hash of everything that its result depends on.
        files: those that it left; None if another version listed them in another form.
        error: why it failed.
        result: the record that it returned, as JSON; {} if it failed before it had measured anything.
        seconds: wall time.
        peak_rss_mib: largest resident memory of the process while it ran.
    """

    name: str
    status: str
    key: str
    files: tuple[FileRecord, ...] | None
    error: str | None = optional()
    result: Mapping[str, Any] | None = optional()
    seconds: float | None = optional()
    peak_rss_mib: float | None = optional()

    @classmethod
    def read(cls, row: Any) -> "StageRecord | None":
        """Reads an entry of a manifest of this or another version; None if it is damaged."""
        for found in (row, {**row, "files": None}) if isinstance(row, Mapping) else ():
            try:
                return cls.from_dict(found)
            except RecordError:  # retry without the files, then give up
                continue
        return None

    @property
    def finished(self) -> bool:
        """Whether it did its work in this conversion."""
        return self.status in FINISHED


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What `manifest.json` holds.

    Attributes:
        root: the bundle's folder.
        rows: by stage name, in order.
        command: the last command line that ran a stage.
        versions: of the packages that stages ran with.
    """

    root: pathlib.Path
    rows: Mapping[str, StageRecord]
    command: str = ""
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @classmethod
    def read(cls, bundle: Bundle) -> "Manifest":
        """Reads a bundle's manifest; a missing or damaged one has no rows."""
        value = read_json(bundle.manifest)
        value = value if isinstance(value, dict) else {}
        listed = value.get("stages")
        rows = filter(None, map(StageRecord.read, listed if isinstance(listed, list) else ()))
        versions = value.get("versions")
        return cls(
            bundle.root,
            {row.name: row for row in rows if row.name},
            str(value.get("command", "")),
            versions if isinstance(versions, dict) else {},
        )

    def finished(self, name: str) -> bool:
        """Whether a stage finished in this conversion."""
        row = self.rows.get(name)
        return row is not None and row.finished

    def result(self, name: str) -> dict[str, Any]:
        """What a stage returned, or had measured when it failed; {} for one that did not run in this conversion."""
        row = self.rows.get(name)
        return dict(row.result or {}) if row and (row.finished or row.status == "failed") else {}

    @property
    def files(self) -> Files:
        """The files that the finished stages left."""
        finished = [row for row in self.rows.values() if row.finished]
        found = {record.path: (record, row.name) for row in finished for record in row.files or ()}
        return Files(
            self.root,
            {path: record for path, (record, _) in found.items()},
            {path: name for path, (_, name) in found.items()},
        )
