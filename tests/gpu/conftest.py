"""The bundle and engines that the GPU tests share, and what they found: with VIT_CONVERT_RESULTS=path.json, written
after every test."""

import functools
import os
import pathlib
import shlex
import shutil
import sys
from typing import Any

import numpy as np
import pytest

from vit_convert.core.bundle import Bundle, write_json
from vit_convert.core.errors import BuildError
from vit_convert.engine.backend.trt import load_backend
from vit_convert.engine.commands import environment
from vit_convert.engine.handoff import describe_model, read_facts
from vit_convert.engine.runtime.engine import Engine

_OUTCOMES: dict[str, dict[str, object]] = {}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Notes how each test ended, and why where it did not pass."""
    # setup and teardown tell something only when they fail or skip
    if report.when == "call" or report.outcome != "passed":
        name = report.nodeid.rpartition("::")[2]
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr or "")
        found = {"outcome": report.outcome, "seconds": round(report.duration, 2), **dict(report.user_properties)}
        _OUTCOMES[name] = {**found, **({"reason": reason[-400:]} if reason else {})}
        if path := os.environ.get("VIT_CONVERT_RESULTS"):
            counts = {
                word: sum(row["outcome"] == word for row in _OUTCOMES.values())
                for word in ("passed", "failed", "skipped")
            }
            write_json(pathlib.Path(path), {**_about(), "counts": counts, "tests": _OUTCOMES})


@functools.cache
def _about() -> dict[str, Any]:
    bundle = os.environ.get("VIT_CONVERT_BUNDLE", "")
    try:
        host = environment(load_backend("tensorrt"))
    except BuildError:  # arrays are exchanged without it
        host = environment(None)
    command = f"VIT_CONVERT_BUNDLE={shlex.quote(bundle)} python -m pytest {shlex.join(sys.argv[1:])}"
    return {"environment": host, "command": command, "model": describe_model(Bundle(bundle))}


@pytest.fixture(scope="session")
def bundle(tmp_path_factory):
    """A copy of the bundle that is given, without what an earlier run made of it."""
    from gpu_bundle import GIVEN

    made = shutil.ignore_patterns("engines", "timing", "tune", "calibration.tensorrt-*")
    return Bundle(shutil.copytree(GIVEN, tmp_path_factory.mktemp("gpu") / pathlib.Path(GIVEN).name, ignore=made))


@pytest.fixture(scope="session")
def facts(bundle):
    """What the export side found out."""
    return read_facts(bundle)


@pytest.fixture(scope="session")
def built(bundle):
    """The fp32 and fp16 engines, by precision."""
    from gpu_bundle import BACKEND, run

    assert run("build", bundle.root, "--precision=fp32,fp16") == 0
    return {
        precision: bundle.plan(BACKEND.name, BACKEND.version, BACKEND.arch, precision) for precision in ("fp32", "fp16")
    }


@pytest.fixture
def engine(built):
    """The fp32 engine, loaded."""
    from gpu_bundle import BACKEND

    return Engine(BACKEND, built["fp32"])


@pytest.fixture(scope="session")
def reference(bundle):
    """JAX's images and outputs, by name."""
    with np.load(bundle.reference) as file:
        return {name: file[name] for name in file.files}
