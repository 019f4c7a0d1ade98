"""Changes a bundle as another conversion would have: its manifest names the new files as its own."""

import pathlib

from vit_convert.core.bundle import Bundle, read_json, write_json
from vit_convert.core.manifest import FileRecord, StageRecord


def as_left(path: pathlib.Path, *names: str) -> None:
    """Enters files as they are now into the rows of the stages that left them, new ones into that of the export.

    Args:
        path: the bundle.
        names: relative to it.
    """
    bundle = Bundle(path)
    manifest = read_json(bundle.manifest)
    listed = [StageRecord.from_dict(row).files or () for row in manifest["stages"]]
    known = {record.path for records in listed for record in records}
    for row, records in zip(manifest["stages"], listed):
        new = [FileRecord.of(path, path / name) for name in names if name not in known and row["name"] == "export"]
        kept = [FileRecord.of(path, path / old.path) if old.path in names else old for old in records]
        row["files"] = [record.to_dict() for record in (*kept, *new)]
    write_json(bundle.manifest, manifest)


def convert_another_model(path: pathlib.Path) -> None:
    """Gives model.onnx another weight, as a later conversion that exported and checked it."""
    data = path / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:-4] + b"\x01\x02\x03\x04")
    as_left(path, data.name)
