"""Engine tasks: one bundle's engines built, verified and measured on one GPU, in a process of its own."""

import contextlib
import dataclasses
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from typing import IO, Any

from vit_convert.batch.devices import Device
from vit_convert.batch.outcome import EngineOutcome
from vit_convert.core.bundle import Bundle, hash_value, read_json, write_json
from vit_convert.core.errors import INTERRUPTED, HeldError
from vit_convert.core.lock import hold
from vit_convert.core.manifest import Manifest
from vit_convert.core.pair import TOWERS
from vit_convert.core.record import RecordError

COMMANDS = ("build", "verify", "benchmark")
_END_S = 10.0  # time for a task to release its bundle
_LAST_WORDS = 4000  # characters
_TICK_S = 0.25
# Dies with this process, however that ends: the kernel's setting survives exec. `-S -E -s`: no packages, for a fast
# start.
_TIED = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 9)
if os.getppid() != int(sys.argv[1]): sys.exit(130)
try: os.execvp(sys.argv[2], sys.argv[2:])
except OSError as e: print(f"error: {sys.argv[2]}: {e.strerror}\\n  --trt_python names the Python.", file=sys.stderr)
sys.exit(2)
"""


@dataclasses.dataclass(frozen=True)
class EngineSettings:
    """What to do with each bundle on a GPU.

    Attributes:
        commands: of COMMANDS, in order; none for no engines.
        python: the Python that has TensorRT and this package.
        words: further arguments of `python -m vit_convert.engine`.
        force: also redo what is there already.
        timeout_s: for all commands of one bundle; 0 for none.
        remote: the address of bundles; "" if they are in the workdir.
    """

    commands: tuple[str, ...] = ()
    python: str = sys.executable
    words: tuple[str, ...] = ()
    force: bool = False
    timeout_s: float = 0.0
    remote: str = ""

    def lines(self, bundle: str) -> list[list[str]]:
        """The command lines, in order; a single one if everything is asked for, so that an engine that misses its
        tolerance is still measured."""
        begin, end = [self.python, "-m", "vit_convert.engine"], [*self.words, "--quiet"]
        if self.commands == COMMANDS:
            return [[*begin, bundle, *end, *(["--force"] if self.force else [])]]
        force = {"build": ["--force"] if self.force else []}
        return [[*begin, command, bundle, *end, *force.get(command, [])] for command in self.commands]


class Cancelled(Exception):
    """The task was ended by `Tasks.close`."""


class Tasks:
    """The processes of this process's engine tasks; may be used from several threads."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen[bytes]] = set()
        self._closed = False

    def run(self, workdir: str, name: str, settings: EngineSettings, device: Device) -> EngineOutcome:
        """Runs one task, and turns whatever happens, except an interrupt, into an outcome.

        Args:
            workdir: holds the bundle.
            name: of the bundle.
            settings: of the batch.
            device: the GPU.

        Returns:
            The outcome; its results are in the bundle.

        Raises:
            Cancelled: `close` was called.
        """
        started, bundle = time.monotonic(), Bundle(os.path.join(workdir, name))
        begun = EngineOutcome(gpu=device.type, device=device.id, host=socket.gethostname(), attempts=1)
        deadline = started + settings.timeout_s if settings.timeout_s else None
        ended = dataclasses.replace(begun, status="done", exit_code=0)
        try:
            with hold(bundle, "python -m vit_convert.batch"):  # raised here by type, it is recognised as temporary
                pass
            for command in settings.lines(os.fspath(bundle.root)):
                if (failed := self._one(command, begun, device, deadline)) is not None:
                    ended = failed
                    break
        except HeldError as e:
            ended = dataclasses.replace(
                begun, status="failed", exit_code=e.exit_code, error=str(e), fix=e.fix, passing=True
            )
        ended = dataclasses.replace(ended, seconds=round(time.monotonic() - started, 3))
        if ended.finished:
            ended = dataclasses.replace(ended, **_measured(bundle, settings))
            keep(bundle, settings, ended)
        return ended

    def _one(
        self, command: list[str], begun: EngineOutcome, device: Device, deadline: float | None
    ) -> EngineOutcome | None:
        """Runs one command; None if it ended well."""
        with tempfile.TemporaryFile() as log:
            process = self._start(command, device, log)
            try:
                code = _waited(process, deadline)
            finally:
                _end(process)
                self._running.discard(process)
            if self._closed:
                raise Cancelled
            said = _read_end(log)
        if code == 0:
            return None
        if code is None:
            error, fix = "not done in the time that --timeout gives", "Give more by --timeout."
            return dataclasses.replace(begun, status="timeout", exit_code=INTERRUPTED, error=error, fix=fix)
        error, fix = words_of(said)
        if code < 0 or code > 128:  # of a wrapper in a shell: 128 and the signal
            how = f"its process ended by signal {_signal(-code if code < 0 else code - 128)}"
            error = f"{how}, after saying: {error}" if error else how
        return dataclasses.replace(
            begun,
            status="failed",
            exit_code=code if 0 < code < 128 else 1,
            error=error or f"exit {code}",
            fix=fix,
            passing=code < 0 or code > 128,
        )

    def _start(self, command: list[str], device: Device, log: IO[bytes]) -> "subprocess.Popen[bytes]":
        tied = [sys.executable, "-SEs", "-c", _TIED, str(os.getpid()), *command]
        process = subprocess.Popen(
            tied,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, **device.environment},
            start_new_session=True,  # Ctrl-C goes to this process, which lets the task finish its files
        )
        self._running.add(process)
        if self._closed:
            _end(process)
        return process

    def close(self) -> None:
        """Ends all running tasks for good."""
        self._closed = True
        for process in list(self._running):
            process.terminate()
        for process in list(self._running):
            _end(process)


def words_of(said: str) -> tuple[str, str]:
    """The message and the advice with which one of our commands ended, or the last line that it printed.

    Example:
        >>> words_of("building\\nerror: no GPU\\n  Run it on one.")
        ('no GPU', 'Run it on one.')
    """
    match = re.search(r"(?:\A|\n)error: (.*)\Z", said.rstrip(), re.DOTALL)
    if match is None:
        lines = said.strip().splitlines()
        return (lines[-1] if lines else ""), ""
    *message, last = match[1].split("\n  ")
    return ("\n  ".join(message), last.strip()) if message else (last, "")


def _path(bundle: Bundle, gpu: str) -> pathlib.Path:
    return bundle.root / "engines" / f"batch-{re.sub(r'[^A-Za-z0-9]+', '-', gpu).strip('-') or 'gpu'}.json"


def keep(bundle: Bundle, settings: EngineSettings, outcome: EngineOutcome) -> None:
    """Notes in a bundle what was done with it on a type of GPU, and each GPU's measurements beside its engines."""
    for folder in _bundles(bundle) if "benchmark" in settings.commands else ():
        found = read_json(folder.benchmark) or {}
        place = folder.root / "engines" / f"{found.get('backend')}-{found.get('tensorrt')}-{found.get('arch')}"
        if place.is_dir():
            shutil.copyfile(folder.benchmark, place / folder.benchmark.name)
    value = {"key": _key(bundle, settings), "files": _files(bundle), "outcome": outcome.to_dict()}
    write_json(_path(bundle, outcome.gpu), value)


def kept(
    bundle: Bundle, settings: EngineSettings, gpu: str, found: Mapping[str, int] | None = None
) -> EngineOutcome | None:
    """What was done with a bundle on a type of GPU, if nothing else would be done now and its engines exist.

    Args:
        bundle: converted.
        settings: of the batch.
        gpu: the type.
        found: the existing engines, with their sizes; None to look for them.
    """
    value = read_json(_path(bundle, gpu))
    if settings.force or not value or value.get("key") != _key(bundle, settings):
        return None
    found = _files(bundle) if found is None else found
    try:
        if any(found.get(path) != size for path, size in value["files"].items()):
            return None
        return dataclasses.replace(EngineOutcome.from_dict(value["outcome"]), status="fresh", attempts=0)
    except (KeyError, TypeError, AttributeError, RecordError):  # of another version
        return None


def _key(bundle: Bundle, settings: EngineSettings) -> str:
    """The hash of a task's inputs: the bundle's files and the request."""
    files = [
        sorted((path, record.sha256) for path, record in Manifest.read(folder).files.records.items())
        for folder in _bundles(bundle)
    ]
    return hash_value([files, settings.commands, settings.words])


def _files(bundle: Bundle) -> dict[str, int]:
    """The engines of a bundle, all GPUs', with their sizes in bytes."""
    paths = [path for folder in _bundles(bundle) for path in folder.root.glob("engines/*/*.plan")]
    return {path.relative_to(bundle.root).as_posix(): path.stat().st_size for path in sorted(paths)}


def _bundles(bundle: Bundle) -> Iterator[Bundle]:
    """The bundle itself, or those of a pair's towers."""
    for folder in (bundle, *(Bundle(bundle.root / tower) for tower in TOWERS)):
        if folder.manifest.is_file():
            yield folder


def _measured(bundle: Bundle, settings: EngineSettings) -> dict[str, Any]:
    """A summary of this task's benchmark; empty for a pair, which has two."""
    found = (read_json(bundle.benchmark) or {}) if "benchmark" in settings.commands else {}
    rows = found.get("rows") or []
    if found.get("status") != "done" or not rows:
        return {}
    return {
        "gpu_name": found.get("gpu", ""),
        "recommended": (found.get("recommended") or {}).get("precision", ""),
        "images_per_second": max(row["images_per_second"] for row in rows),
    }


def _waited(process: "subprocess.Popen[bytes]", deadline: float | None) -> int | None:
    """The exit code; None after the deadline. Polls, because Ray cancels a task with an interrupt that is not a signal
    and so would not end a wait."""
    while True:
        try:
            return process.wait(_TICK_S)
        except subprocess.TimeoutExpired:
            if deadline is not None and time.monotonic() >= deadline:
                return None


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Asks a task to stop, as Ctrl-C does, and kills what is left, including children that a wrapper did not wait
    for."""
    process.terminate()  # has no effect if it has ended
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_END_S)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _read_end(log: IO[bytes]) -> str:
    log.seek(0, os.SEEK_END)
    log.seek(max(0, log.tell() - _LAST_WORDS))
    return log.read().decode(errors="replace")


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return str(number)
