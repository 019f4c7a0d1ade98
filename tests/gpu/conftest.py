"""Keeps what the tests found on this GPU: with VIT_CONVERT_RESULTS=path.json, outcomes with hardware, versions, command and date."""

import os
import pathlib
import shlex
import sys

import pytest

from vit_convert.bundle import read_json, write_json
from vit_convert.engine.stages import environment
from vit_convert.engine.trt import load_backend
from vit_convert.errors import BuildError

_OUTCOMES: dict[str, dict[str, object]] = {}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Notes how each test ended, and why where it did not pass."""
    if report.when == "call" or report.outcome != "passed":  # setup and teardown tell something only when they fail or skip
        name = report.nodeid.rpartition("::")[2]
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr or "")
        found = {"outcome": report.outcome, "seconds": round(report.duration, 2), **dict(report.user_properties)}
        _OUTCOMES[name] = {**found, **({"reason": reason[-400:]} if reason else {})}


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Writes the file."""
    path, bundle = os.environ.get("VIT_CONVERT_RESULTS"), os.environ.get("VIT_CONVERT_BUNDLE", "")
    if not path or not _OUTCOMES:
        return
    try:
        about = environment(load_backend("tensorrt"))
    except BuildError as e:
        about = {"gpu": "", "unknown": str(e)}
    manifest = read_json(pathlib.Path(bundle) / "manifest.json") or {"stages": []}
    checkpoint: dict[str, object] = next((row["result"] for row in manifest["stages"] if row["name"] == "checkpoint"), {})
    counts = {outcome: sum(row["outcome"] == outcome for row in _OUTCOMES.values()) for outcome in ("passed", "failed", "skipped")}
    command = f"VIT_CONVERT_BUNDLE={shlex.quote(bundle)} python -m pytest {shlex.join(sys.argv[1:])}"
    model = {key: checkpoint.get(key) for key in ("variant", "sha256", "summary")}
    write_json(pathlib.Path(path), {"environment": about, "command": command, "checkpoint": model, "counts": counts, "tests": _OUTCOMES})
