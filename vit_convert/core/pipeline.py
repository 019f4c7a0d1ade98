"""Runs the stages that are not fresh, in order, and records each in the manifest."""

import contextlib
import dataclasses
import os
import pathlib
import resource
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import ml_collections

from vit_convert.core.bundle import Bundle, folder_errors, hash_value, write_json
from vit_convert.core.errors import ConvertError, UsageError, nearest
from vit_convert.core.leftovers import remove_leftovers
from vit_convert.core.manifest import FINISHED, FileRecord, Manifest, StageRecord
from vit_convert.core.progress import Progress, human_seconds
from vit_convert.core.record import RecordError, StageResult
from vit_convert.core.results import Results
from vit_convert.core.version import __version__


class Context:
    """What the stages of one conversion share.

    Args:
        config: the full, checked config.
        bundle: where the files lie.
        progress: what people and machines see.
        command: the command line, for the manifest.
        checkpoints: folders to search for a checkpoint; a download goes to the first.

    Attributes:
        results: what each finished stage returned, as records; also if a rerun skipped it.
        scratch: values that stages pass on within a process to avoid computing them twice; never needed for
            correctness.
    """

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        bundle: Bundle,
        progress: Progress,
        command: str = "",
        checkpoints: Sequence[str | os.PathLike[str]] = ("checkpoints",),
    ):
        self.config = config
        self.checkpoints = checkpoints
        self.command = command
        self.bundle = bundle
        self.progress = progress
        self.results = Results()
        self.scratch: dict[str, Any] = {}


@dataclasses.dataclass(frozen=True)
class Stage:
    """One step of a conversion.

    Attributes:
        name: as `--until` and the manifest call it.
        after: stages whose results it depends on.
        result: the record that `run` returns.
        run: does the work and returns what later stages and the report need.
        inputs: everything else that the result depends on (config values, file identities), as plain JSON values.
        outputs: every file that it may write. Those that it writes are recorded, and the stage is fresh only while they
            are unchanged; those that it does not write this time are removed.
        needed: whether this config needs the stage.
        companions: files that later commands add to (an engine's sidecar); the stage is fresh only if they exist.
    """

    name: str
    after: tuple[str, ...]
    result: type[StageResult]
    run: Callable[[Context], StageResult]
    inputs: Callable[[Context], Any]
    outputs: Callable[[Context], Iterable[pathlib.Path]] = lambda context: ()
    needed: Callable[[Context], bool] = lambda context: True
    companions: Callable[[Context], Iterable[pathlib.Path]] = lambda context: ()


def run_stages(
    stages: list[Stage],
    context: Context,
    rows: list[StageRecord],
    *,
    until: str = "",
    force: bool = False,
    begin: Callable[[], None] = lambda: None,
) -> None:
    """Runs the stages in order, skipping those that are fresh; for the holder of the bundle's lock.

    A stage is fresh if its inputs, the files of the stages before it, and its own files have not changed since it last
    finished. The manifest says "running" before a stage touches a file and "done" after the last one, so that a killed
    stage is run again. The stages after it are "stale" from then on, until each is found to be fresh.

    Args:
        stages: in an order that respects `after`.
        context: shared by the stages.
        rows: receives the manifest's record of each stage ("done", "fresh" or "failed"), also after a failure.
        until: name of the last stage to run; empty for all.
        force: run fresh stages too.
        begin: called once: before the first stage that runs touches anything, or at the end if all are fresh.

    Raises:
        UsageError: `until` names no stage.
        ConvertError: from a stage; the manifest then holds the stage as failed.
    """
    names = [stage.name for stage in stages]
    if until and until not in names:
        raise UsageError(f"--until={until}: not one of {', '.join(names)}.{nearest(until, names)}")
    run = _Run(context, rows, begin)
    last = names.index(until) if until else len(stages)
    for stage in stages[: last + 1]:
        if not stage.needed(context):
            continue
        key = run.key(stage)
        if (row := None if force else run.fresh(stage, key)) is None:
            run.run(stage, key)
        else:
            rows.append(row)
            context.results.put(stage.name, stage.result.from_dict(row.result or {}))
            context.progress.event("fresh", stage=stage.name)
    run.finish(stages[last + 1 :])


def all_fresh(stages: list[Stage], context: Context, *, until: str = "") -> bool:
    """Whether `run_stages` would find nothing to do; nothing is written, and no lock is needed.

    Args:
        stages, context, until: as `run_stages` takes them.
    """
    rows: list[StageRecord] = []
    run = _Run(context, rows, lambda: None)
    for stage in stages:
        try:
            if stage.needed(context):
                if (row := run.fresh(stage, run.key(stage))) is None:
                    return False
                rows.append(row)
                context.results.put(stage.name, stage.result.from_dict(row.result or {}))
        except (ConvertError, KeyError, OSError):  # reporting what is wrong is up to a run
            return False
        if stage.name == until:
            break
    return True


class _Run:
    """One run of the stages, which keeps the manifest up to date.

    Args:
        context: of the stages.
        rows: of the stages decided so far, in order.
        begin: see `run_stages`.
    """

    def __init__(self, context: Context, rows: list[StageRecord], begin: Callable[[], None]):
        self._context, self._rows, self._begin = context, rows, begin
        manifest = Manifest.read(context.bundle)
        self._old, self._command, self._versions = dict(manifest.rows), manifest.command, dict(manifest.versions)
        self._begun = False

    def key(self, stage: Stage) -> str:
        """A hash of what a stage depends on: its inputs, and for each stage before it the key and the content of its
        files."""
        before = {row.name: _left(row) for row in self._rows if row.name in stage.after}
        return hash_value([stage.name, __version__, before, stage.inputs(self._context)])

    def fresh(self, stage: Stage, key: str) -> StageRecord | None:
        """The row of a stage that need not run, with its files as they are now; None if it has to run."""
        row = self._old.get(stage.name)
        if row is None or not _whole(row) or row.key != key or row.result is None or row.files is None:
            return None
        try:
            stage.result.from_dict(row.result)
        except RecordError:  # by another version, or damaged
            return None
        root = self._context.bundle.root
        if not all(path.is_file() for path in stage.companions(self._context)):
            return None
        found = [record.found(root) for record in row.files]
        if None in found or not {record.path for record in row.files} <= {
            _relative(root, path) for path in stage.outputs(self._context)
        }:
            return None
        return dataclasses.replace(row, status="fresh", files=tuple(filter(None, found)))

    def run(self, stage: Stage, key: str) -> None:
        """Runs a stage, and writes the manifest before and after."""
        context = self._context
        self._rows.append(StageRecord(stage.name, "running", key, ()))
        with folder_errors(context.bundle.root):
            if not self._begun:
                context.bundle.report.unlink(missing_ok=True)  # it describes what is about to change
            self._command = context.command
            self._write()
            if not self._begun:
                self._begun = True
                self._begin()
        context.progress.event("start", stage=stage.name)
        started = time.monotonic()
        _reset_peak_rss()
        status = "failed"
        try:
            with folder_errors(context.bundle.root):
                result = stage.run(context)
                self._keep(result)
                paths = [path for path in dict.fromkeys(stage.outputs(context)) if path.is_file()]
                self._change(files=tuple(FileRecord.of(context.bundle.root, path) for path in paths))
            status = "done"
        except BaseException as e:
            error = f"{type(e).__name__}: {e}"
            self._change(error=error)
            self._keep(e.result if isinstance(e, ConvertError) else None)
            if not isinstance(e, ConvertError | KeyboardInterrupt):
                context.progress.event("crash", stage=stage.name, error=error)
                if isinstance(e, Exception):
                    self._require_kept(e)
            raise
        finally:
            seconds, peak = round(time.monotonic() - started, 3), round(_peak_rss_mib(), 1)
            self._change(status=status, seconds=seconds, peak_rss_mib=peak)
            self._close()
            context.progress.event("end", stage=stage.name, status=status, seconds=seconds, peak_rss_mib=peak)
        context.progress.say(f"{stage.name:<11} {human_seconds(seconds):>9}   {result.summary}".rstrip())

    def _change(self, **fields: Any) -> None:
        """Updates the row of the stage that is running."""
        self._rows[-1] = dataclasses.replace(self._rows[-1], **fields)

    def _keep(self, result: StageResult | None) -> None:
        self._change(result=result.to_dict() if result is not None else {})
        if result is not None:
            self._context.results.put(self._rows[-1].name, result)

    def _close(self) -> None:
        try:
            self._write()
        except BaseException:  # the manifest still says "running"
            self._change(status="failed")
            raise

    def _require_kept(self, cause: Exception | None = None) -> None:
        """Refuses to go on if somebody removed what a stage left: others cannot read it, and the bundle is not whole.

        Raises:
            UsageError: names the file.
        """
        root = self._context.bundle.root
        for record in (record for row in self._rows for record in row.files or ()):
            if not (root / record.path).is_file():
                raise UsageError(
                    f"{root / record.path}: was removed while the command worked in its folder", fix="Run it again."
                ) from cause

    def finish(self, later: list[Stage]) -> None:
        """Finds out which stages after the last one are fresh under this config, and removes files that none of its
        stages wrote.

        Raises:
            UsageError: a file of the stages is gone.
        """
        self._require_kept()
        decided, results = len(self._rows), self._context.results.copy()
        try:
            self._look_at(later)
            kept = self._rows[decided:]
        finally:
            del self._rows[decided:]
            self._context.results = results
        with folder_errors(self._context.bundle.root):
            self._write(kept)
            if not self._begun:
                self._begin()
            remove_leftovers(self._context.bundle, Manifest.read(self._context.bundle).files)

    def _look_at(self, later: list[Stage]) -> None:
        unknown: set[str] = set()
        for stage in later:
            try:
                if not unknown & {*stage.after} and not stage.needed(self._context):
                    continue
                row = None if unknown & {*stage.after} else self.fresh(stage, self.key(stage))
            # for example images that are gone, or a TensorRT that is not installed here
            except (ConvertError, KeyError, OSError):
                row = None
            if row is None:
                unknown.add(stage.name)
            else:
                self._rows.append(row)
                self._context.results.put(stage.name, stage.result.from_dict(row.result or {}))

    def _write(self, kept: Iterable[StageRecord] | None = None) -> None:
        """Writes the manifest: the rows decided so far, then `kept`; None keeps all rows of an earlier run, as
        stale."""
        if kept is None:
            old = [row for row in self._old.values() if row.name not in {row.name for row in self._rows}]
            kept = [dataclasses.replace(row, status="stale") for row in old if _whole(row)]
        about = {"vit_convert": __version__, "command": self._command, "versions": {**self._versions, **_versions()}}
        write_json(self._context.bundle.manifest, {**about, "stages": [row.to_dict() for row in (*self._rows, *kept)]})


def _whole(row: StageRecord) -> bool:
    return row.status in (*FINISHED, "stale")


def _left(row: StageRecord) -> list[Any]:
    return [row.key, {file.path: file.sha256 for file in row.files or ()}]


def _relative(root: pathlib.Path, path: pathlib.Path) -> str:
    return path.relative_to(root).as_posix()


def _versions() -> dict[str, str]:
    """Versions of the packages that are loaded in this process."""
    import importlib.metadata
    import sys

    packages = (
        "numpy",
        "jax",
        "flax",
        "jax2onnx",
        "onnx",
        "onnx_ir",
        "onnxscript",
        "onnxruntime",
        "tensorrt",
        "tensorrt_rtx",
    )
    return {name: importlib.metadata.version(name) for name in packages if name in sys.modules}


def _reset_peak_rss() -> None:
    with contextlib.suppress(OSError):
        # Linux: resets the high-water mark, see man 5 proc
        pathlib.Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def _peak_rss_mib() -> float:
    try:
        status = pathlib.Path("/proc/self/status").read_text(encoding="utf-8", errors="replace")
        return int(status.split("VmHWM:")[1].split()[0]) / 1024
    except (OSError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def file_identity(path: str | os.PathLike[str]) -> list[Any]:
    """Size and modification time of a file: enough to see that it changed, without reading gigabytes."""
    stat = os.stat(path)
    return [os.fspath(path), stat.st_size, stat.st_mtime_ns]
