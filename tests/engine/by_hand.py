"""Bundles whose files and manifest a test writes by itself, without a conversion."""

import hashlib
from collections.abc import Mapping
from typing import Any

from vit_convert.core.bundle import Bundle, write_json

COMMAND = "python -m vit_convert --config=x.py"


def conclude(
    bundle: Bundle,
    results: Mapping[str, Any],
    files: Mapping[str, Mapping[str, bytes | None]] | None = None,
    status: str = "done",
    **statuses: str,
) -> None:
    """Writes a manifest of stages with these results.

    Args:
        bundle: the bundle; its folder is made.
        results: by stage.
        files: what each stage left, name → content; None for one that lies there already.
        status: of every stage.
        statuses: of some.
    """
    bundle.root.mkdir(exist_ok=True)
    rows = []
    for name, result in results.items():
        left = []
        for path, data in (files or {}).get(name, {}).items():
            (bundle.root / path).parent.mkdir(exist_ok=True)
            if data is not None:
                (bundle.root / path).write_bytes(data)
            stat = (bundle.root / path).stat()
            digest = hashlib.sha256((bundle.root / path).read_bytes()).hexdigest()
            left.append(
                {
                    "path": path,
                    "bytes": stat.st_size,
                    "sha256": digest,
                    "stat": [stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino],
                }
            )
        rows.append({"name": name, "status": statuses.get(name, status), "key": "k", "result": result, "files": left})
    write_json(bundle.manifest, {"stages": rows, "command": COMMAND})
