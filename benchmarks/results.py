"""Result files: everything that a number depends on is stored beside it, and an interrupted benchmark can be
continued."""

import importlib.metadata
import json
import os
import pathlib
import platform
import shlex
import sys
import time
from typing import Any

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = pathlib.Path(__file__).parent / "results"
# fmt: off
_PACKAGES = (
    "numpy", "jax", "jaxlib", "flax", "jax2onnx", "onnx", "onnx_ir", "onnxscript", "onnxruntime",
    "onnxruntime-gpu", "torch", "timm", "tensorrt_rtx", "safetensors", "atheris", "cosmic-ray",
)
# fmt: on


def first_paragraph(doc: str | None) -> str:
    """What a program's docstring begins with, on one line."""
    return " ".join((doc or "").split("\n\n")[0].split())


def today() -> str:
    """The date in UTC, as in a result file's name."""
    return time.strftime("%Y-%m-%d", time.gmtime())


def hardware() -> dict[str, Any]:
    """Processor, cores and memory of this machine, and its GPU if there is one."""
    from vit_convert.core.host import cpu_model
    from vit_convert.engine.backend import cuda

    gpu = cuda.gpu()
    total = next((int(line.split()[1]) for line in _lines("/proc/meminfo") if line.startswith("MemTotal")), 0)
    return {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(total / 2**20, 1),
        "system": platform.platform(),
        **({"gpu": gpu.name, "driver": gpu.driver, "cuda": gpu.cuda} if gpu else {}),
    }


def _lines(path: str) -> list[str]:
    try:
        return pathlib.Path(path).read_text().splitlines()
    except OSError:
        return []


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that the numbers depend on, as far as installed."""
    import vit_convert

    found = {"python": platform.python_version(), "vit_convert": vit_convert.__version__}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _command() -> str:
    """This process's command line, with paths relative to the repository's root."""
    return shlex.join(
        ["python", os.path.relpath(sys.argv[0], ROOT), *(word.replace(f"{ROOT}/", "") for word in sys.argv[1:])]
    )


class Results:
    """One result file, written after every measurement.

    Args:
        path: the file; measurements that it already holds are kept.
        about: what the numbers are, one sentence.
    """

    def __init__(self, path: str | os.PathLike[str], about: str):
        self.path = pathlib.Path(path)
        self.record: dict[str, Any] = json.loads(self.path.read_text()) if self.path.exists() else {}
        before = self.record["command"].split("; ") if "command" in self.record else []
        self.record = {
            "about": about,
            "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "command": "; ".join(dict.fromkeys([*before, _command()])),
            "hardware": hardware(),
            "versions": versions(),
            "runs": self.record.get("runs", []),
        }

    def has(self, **key: Any) -> bool:
        """Whether there is a run with these values."""
        return any(all(run.get(name) == value for name, value in key.items()) for run in self.record["runs"])

    def add(self, **run: Any) -> None:
        """Adds a run and writes the file."""
        self.record["runs"].append({**run, "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())})
        self.save()

    def save(self, **more: Any) -> None:
        """Writes the file, whole or not at all; `more` are further entries beside the runs."""
        self.record |= more
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.record, indent=1) + "\n")
        temporary.replace(self.path)
