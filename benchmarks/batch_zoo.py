"""A zoo to convert, intact or with broken files, and what a batch of it may leave behind."""

import contextlib
import dataclasses
import json
import os
import pathlib
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from vit_convert.families.random import write_random_checkpoint

QUICK = ("--config.precision=fp32", "--config.engine.backend=none", "--config.check.num_images=2")
ROOT = pathlib.Path(__file__).parents[1]

# A family that kills its process, as the system does when memory runs out.
_KILLER = """
import os, signal

os.kill(os.getpid(), signal.SIGKILL)
"""


def write_zoo(folder: pathlib.Path, count: int) -> list[pathlib.Path]:
    """Writes mu/16 checkpoints at 32x32, each with weights of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"mu{i:04d}.npz" for i in range(count)]
    for seed, path in enumerate(paths):
        if not path.exists():
            write_random_checkpoint(path, "mu/16", image_size=(32, 32), num_classes=10, seed=seed)
    return paths


@dataclasses.dataclass(frozen=True)
class Breakage:
    """One way in which a job fails.

    Attributes:
        name: of the way.
        exit_code: of its outcome.
        apply: breaks the file at a path, and returns the keys of its row; gets the row's bundle as well.
    """

    name: str
    exit_code: int
    apply: Callable[[pathlib.Path, pathlib.Path], dict[str, Any]]


def _truncated(path: pathlib.Path, bundle: pathlib.Path) -> dict[str, Any]:
    os.truncate(path, path.stat().st_size // 3)
    return {}


def _changed(path: pathlib.Path, change: Callable[[dict[str, np.ndarray]], None]) -> dict[str, Any]:
    with np.load(path) as file:
        leaves = {name: file[name].copy() for name in file.files}
    change(leaves)
    path.unlink()  # it may be a link to the zoo's
    np.savez(path, **leaves)
    return {}


def _not_a_number(path: pathlib.Path, bundle: pathlib.Path) -> dict[str, Any]:
    return _changed(path, lambda leaves: leaves["head/kernel"].__setitem__((0, 0), np.nan))


def _wrong_variant(path: pathlib.Path, bundle: pathlib.Path) -> dict[str, Any]:
    return {"variant": "B/32"}


def _missing(path: pathlib.Path, bundle: pathlib.Path) -> dict[str, Any]:
    path.unlink()
    return {}


def _pickle(path: pathlib.Path, bundle: pathlib.Path) -> dict[str, Any]:
    path.unlink()
    path.write_bytes(pickle.dumps({"head/kernel": np.zeros(3)}))
    return {}


def _unreadable(path: pathlib.Path, bundle: pathlib.Path) -> dict[str, Any]:
    path.unlink()
    path.symlink_to(path)  # root may read what has no permissions, but follows no link to itself
    return {}


def _another_head(path: pathlib.Path, bundle: pathlib.Path) -> dict[str, Any]:
    return {"num_classes": 21843}


def _name_is_taken(path: pathlib.Path, bundle: pathlib.Path) -> dict[str, Any]:
    bundle.parent.mkdir(parents=True, exist_ok=True)
    bundle.write_text("a file of the user's")
    return {}


def _full_disk(path: pathlib.Path, bundle: pathlib.Path) -> dict[str, Any]:
    bundle.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(bundle)], check=True)
    return {}


def _killed(path: pathlib.Path, bundle: pathlib.Path) -> dict[str, Any]:
    family = path.parent / "killer.py"
    family.write_text(_KILLER)
    return {"families": f"('{family}:FAMILY',)"}


BREAKAGES = (
    Breakage("truncated", 3, _truncated),
    Breakage("NaN", 3, _not_a_number),
    Breakage("wrong variant", 3, _wrong_variant),
    Breakage("missing", 3, _missing),
    Breakage("pickle", 3, _pickle),
    Breakage("unreadable", 3, _unreadable),
    Breakage("another head", 2, _another_head),
    Breakage("its name is taken by a file", 2, _name_is_taken),
    Breakage("full disk", 2, _full_disk),
    Breakage("killed for memory", 1, _killed),
)


def can_mount() -> bool:
    """Whether this process may mount a file system, which is needed to simulate a full disk for a single bundle."""
    return (
        os.geteuid() == 0
        and subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode == 0
    )


def write_table(
    path: pathlib.Path, checkpoints: Sequence[pathlib.Path], workdir: pathlib.Path, broken: dict[int, Breakage]
) -> None:
    """Writes a table of jobs for copies of these files beside it, and breaks those with the given numbers.

    Args:
        path: the `.jsonl`.
        checkpoints: what to convert; they stay as they are.
        workdir: of the batch.
        broken: by place in the table.
    """
    rows = []
    for i, checkpoint in enumerate(checkpoints):
        copy = path.parent / checkpoint.name
        copy.write_bytes(checkpoint.read_bytes())
        row = {"name": checkpoint.stem, "checkpoint": str(copy)}
        if i in broken:
            row |= broken[i].apply(copy, workdir / checkpoint.stem)
        rows.append(row)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _heed_interrupts() -> None:
    """A shell's background jobs ignore Ctrl-C, and what they start does too."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Batch:
    """A batch in a process of its own, which may be killed.

    Args:
        words: of the command line.
        workdir: its --workdir.
    """

    def __init__(self, words: Sequence[str], workdir: pathlib.Path):
        self.workdir = workdir
        self._command = [sys.executable, "-m", "vit_convert.batch", *words, f"--workdir={workdir}", "--nopage"]
        self._env = {
            **os.environ,
            "PYTHONPATH": os.environ.get("PYTHONPATH", str(ROOT)),
            "PYTHONDONTWRITEBYTECODE": "1",
        }

    def start(self) -> "subprocess.Popen[str]":
        """Starts it."""
        return subprocess.Popen(
            self._command,
            env=self._env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            preexec_fn=_heed_interrupts,
        )

    def run(self) -> tuple[int, str]:
        """Runs it to its end; returns its exit code and what it printed."""
        process = self.start()
        said, _ = process.communicate()
        return process.returncode, said

    def jobs(self) -> dict[str, dict[str, Any]]:
        """The rows of batch.json by name."""
        return {job["name"]: job for job in json.loads((self.workdir / "batch.json").read_text())["jobs"]}

    def finished(self) -> dict[str, tuple[int, ...]]:
        """The identity of model.onnx and of the report of every whole bundle."""
        found = {}
        for report in self.workdir.glob("*/report.json"):
            if json.loads(report.read_text())["status"] == "done":
                stats = [file.stat() for file in (report, report.with_name("model.onnx"))]
                found[report.parent.name] = tuple(part for stat in stats for part in (stat.st_ino, stat.st_mtime_ns))
        return found

    def left_behind(self) -> list[str]:
        """Locks and unfinished files, also in the bundles."""
        return [str(path) for path in self.workdir.rglob(".*")]


def workers_of(parent: int) -> list[int]:
    """Processes on this machine that are workers of a batch."""
    found = []
    for entry in pathlib.Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
        except (OSError, ValueError):
            continue
        if b"vit_convert.batch.worker" in words and str(parent).encode() in words:
            found.append(int(entry.name))
    return found


def wait_for(condition: Callable[[], bool], seconds: float) -> bool:
    """Waits until a condition holds; whether it does."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def kill(process: "subprocess.Popen[str]", whom: str, number: int = signal.SIGKILL) -> list[int]:
    """Kills a running batch or a part of it.

    Args:
        process: the batch.
        whom: "worker", "parent" or "everything".
        number: the signal.

    Returns:
        The workers that there were.
    """
    workers = workers_of(process.pid)
    targets = {"worker": workers[:1], "parent": [process.pid], "everything": [process.pid, *workers]}[whom]
    for pid in targets:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
    return workers
