"""The order of stages: which are fresh, which run, what each leaves in the manifest."""

import contextlib
import dataclasses
import os
import pathlib
import resource
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import ml_collections

import vit_convert
from vit_convert.bundle import Bundle, hash_value, read_json, write_json
from vit_convert.errors import ConvertError, UsageError, nearest
from vit_convert.progress import Progress, human_seconds


class Context:
    """What the stages of one conversion share.

    Args:
        config: the full, checked config.
        bundle: where the files lie.
        progress: what people and machines see.
        command: the command line, for the manifest.
        checkpoints: folders in which a checkpoint is looked for; what is fetched goes to the first.

    Attributes:
        results: what each finished stage returned, by stage name; the same after a rerun that skipped it.
        scratch: values that stages of one process pass on to avoid computing them twice; never needed for correctness.
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
        self.results: dict[str, dict[str, Any]] = {}
        self.scratch: dict[str, Any] = {}


@dataclasses.dataclass(frozen=True)
class Stage:
    """One step of the road.

    Attributes:
        name: as `--until` and the manifest call it.
        after: stages whose results it depends on.
        run: does the work and returns what the report needs, as plain JSON values.
        inputs: everything else that the result depends on (config values, file identities), as plain JSON values.
        outputs: files that must exist for the stage to be fresh.
        needed: whether this config wants the stage at all.
    """

    name: str
    after: tuple[str, ...]
    run: Callable[[Context], dict[str, Any]]
    inputs: Callable[[Context], Any]
    outputs: Callable[[Context], Iterable[pathlib.Path]] = lambda context: ()
    needed: Callable[[Context], bool] = lambda context: True


def run_stages(stages: list[Stage], context: Context, rows: list[dict[str, Any]], *, until: str = "", force: bool = False) -> None:
    """Runs the stages in order, skipping those that are fresh.

    A stage is fresh when its inputs, and those of every stage before it, hash to what they did when it last finished, and
    its files are still there. The manifest is written after every stage, so that an interrupted run continues.

    Args:
        stages: in an order that respects `after`.
        context: shared by the stages.
        rows: gets, per stage, {"name", "status": "done" | "fresh" | "failed", "seconds", "peak_rss_mib", "key", "result"}; also
            what was done before a failure.
        until: name of the last stage to run; empty for all.
        force: run fresh stages too.

    Raises:
        UsageError: `until` names no stage.
        ConvertError: from a stage; the manifest then holds the stage as failed.
    """
    names = [stage.name for stage in stages]
    if until and until not in names:
        raise UsageError(f"--until={until}: not one of {', '.join(names)}.{nearest(until, names)}")
    old = {row["name"]: row for row in (read_json(context.bundle.manifest) or {}).get("stages", [])}
    keys: dict[str, str] = {}
    for stage in stages:
        if stage.needed(context):
            before = {name: keys[name] for name in stage.after if name in keys}
            key = keys[stage.name] = hash_value([stage.name, vit_convert.__version__, before, stage.inputs(context)])
            row = _fresh(stage, key, old.get(stage.name), context) if not force else None
            if row is None:
                row = {"name": stage.name, "status": "running", "key": key}
                rows.append(row)
                _run(stage, row, context, rows, old)
            else:
                rows.append(row)
                context.results[stage.name] = row["result"]
                context.progress.event("fresh", stage=stage.name)
        if stage.name == until:
            break


def _fresh(stage: Stage, key: str, old: dict[str, Any] | None, context: Context) -> dict[str, Any] | None:
    if old is None or old.get("status") not in ("done", "fresh") or old.get("key") != key:
        return None
    if not all(path.exists() for path in stage.outputs(context)):
        return None
    return {**old, "status": "fresh"}


def _run(stage: Stage, row: dict[str, Any], context: Context, rows: list[dict[str, Any]], old: dict[str, Any]) -> None:
    context.progress.event("start", stage=stage.name)
    started = time.monotonic()
    _reset_peak_rss()
    try:
        row["result"] = context.results[stage.name] = stage.run(context)
        row["status"] = "done"
    except BaseException as e:
        row["status"], row["error"] = "failed", f"{type(e).__name__}: {e}"
        row["result"] = context.results[stage.name] = getattr(e, "result", {})
        if not isinstance(e, ConvertError | KeyboardInterrupt):
            context.progress.event("crash", stage=stage.name, error=row["error"])
        raise
    finally:
        row["seconds"] = round(time.monotonic() - started, 3)
        row["peak_rss_mib"] = round(_peak_rss_mib(), 1)
        later = [other for name, other in old.items() if name not in {r["name"] for r in rows}]
        about = {"vit_convert": vit_convert.__version__, "command": context.command, "versions": _versions()}
        write_json(context.bundle.manifest, {**about, "stages": [*rows, *later]})
        context.progress.event("end", stage=stage.name, status=row["status"], seconds=row["seconds"], peak_rss_mib=row["peak_rss_mib"])
    context.progress.say(f"{stage.name:<11} {human_seconds(row['seconds']):>9}   {row['result'].get('summary', '')}".rstrip())


def _versions() -> dict[str, str]:
    """Versions of the packages that are loaded in this process."""
    import importlib.metadata
    import sys

    packages = ("numpy", "jax", "flax", "jax2onnx", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "tensorrt", "tensorrt_rtx")
    return {name: importlib.metadata.version(name) for name in packages if name in sys.modules}


def _reset_peak_rss() -> None:
    with contextlib.suppress(OSError):
        pathlib.Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # Linux: forget the high-water mark, see man 5 proc


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
