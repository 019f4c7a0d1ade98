"""One conversion: takes a config and writes a bundle with its report."""

import json
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import ml_collections

from vit_convert.core.bundle import Bundle, as_json, read_json, write_json
from vit_convert.core.config import as_plain, quantized
from vit_convert.core.errors import ConvertError, UsageError
from vit_convert.core.manifest import Manifest, StageRecord
from vit_convert.core.opened import opened
from vit_convert.core.pair import TOWERS, is_pair
from vit_convert.core.pipeline import Context, all_fresh, run_stages
from vit_convert.core.progress import Progress
from vit_convert.core.tower_config import given_keys
from vit_convert.report.at_end import write_at_end
from vit_convert.report.record import Report
from vit_convert.report.summary import print_summary
from vit_convert.report.write import write_report
from vit_convert.stages import stages
from vit_convert.stages.check import ANSWERS

_PACKAGE = pathlib.Path(__file__).parent
_OURS = (_PACKAGE.parent / "checkpoints", _PACKAGE / "checkpoints")  # in the repository; in an installed wheel


def convert(
    config: ml_collections.ConfigDict,
    workdir: str | os.PathLike[str],
    *,
    until: str = "",
    force: bool = False,
    quiet: bool = False,
    command: Sequence[str] = (),
    checkpoints: Sequence[str | os.PathLike[str]] = (),
    page: bool = False,
) -> dict[str, Any]:
    """Converts one checkpoint: one model, or the two towers of a pair.

    Args:
        config: a full config, from `config.complete`.
        workdir: the bundle is its sub-folder `config.name`.
        until: last stage to run; empty for all.
        force: redo fresh stages.
        quiet: print nothing.
        command: the command line, for the report.
        checkpoints: folders searched for the checkpoint before `checkpoints/`; a download goes to the first.
        page: also write `report.html`, if matplotlib and jinja2 are installed; takes a second or two.

    Returns:
        The report, as in `report.json`; written whether or not a stage failed.

    Raises:
        UsageError: another conversion is using the bundle, or the bundle cannot be written.
        ConvertError: a stage failed; finished stages are kept.
    """
    folders = (*checkpoints, "checkpoints", *_OURS)
    given: dict[str, Any] = {"until": until, "force": force, "quiet": quiet, "command": command, "page": page}
    found = _find(config, folders, quiet=quiet)
    if _is_pair(config, found):
        from vit_convert.convert_pair import convert_pair

        return convert_pair(config, workdir, convert_one, checkpoints=folders, **given)
    return convert_one(config, workdir, checkpoints=folders, found=found, **given)


def convert_one(
    config: ml_collections.ConfigDict,
    workdir: str | os.PathLike[str],
    *,
    until: str,
    force: bool,
    quiet: bool,
    command: Sequence[str],
    checkpoints: Sequence[str | os.PathLike[str]],
    page: bool = False,
    found: Any = None,
    changes: Callable[[], None] | None = None,
    answers: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Converts one model; see `convert`.

    Args:
        config: as above.
        workdir: as above.
        until: as above.
        force: as above.
        quiet: as above.
        command: as above.
        checkpoints: all folders to search for the checkpoint.
        page: as above.
        found: where the checkpoint is, or the error of the search; None if nobody has looked yet.
        changes: for a tower of a pair: called once before a stage changes anything; not called if all are fresh.
        answers: for a tower of a pair: filled with the outputs of its graphs, if they were checked; see
            `stages.check.ANSWERS`.
    """
    _require_device(config)
    with opened(config, workdir, command, quiet=quiet, checkpoints=checkpoints) as context:
        if found is not None:
            context.scratch["found"] = found  # so that the checkpoint stage does not search or download again
        try:
            report = _convert(context, changes or (lambda: None), until=until, force=force, command=command)
        except BaseException as e:  # a failure gets a page too; an interrupt does not wait for one
            write_at_end(context.bundle, context.progress, wanted=page and isinstance(e, ConvertError))
            raise
        if answers is not None:
            answers.update(context.scratch.get(ANSWERS, {}))
        write_at_end(context.bundle, context.progress, wanted=page)
        if not quiet:
            print_summary(
                report,
                context.bundle.root,
                files=list(Manifest.read(context.bundle).files),
                whole=not until and changes is None,
            )
    return report.to_dict()


def fresh_report(
    config: ml_collections.ConfigDict,
    workdir: str | os.PathLike[str],
    *,
    until: str = "",
    checkpoints: Sequence[str | os.PathLike[str]] = (),
    page: bool = False,
) -> dict[str, Any] | None:
    """The report of a conversion that has nothing left to do; None if it has. Takes milliseconds and writes nothing,
    except for a missing page.

    Args:
        config, workdir, until, checkpoints, page: as `convert` takes them.
    """
    bundle = Bundle(os.path.join(workdir, config.name))
    report = read_json(bundle.report)
    # A user's own model is not built just to find out. A locked bundle is being changed, or its holder died while
    # changing it.
    if not report or report.get("status") != "done" or config.model is not None or bundle.lock.exists():
        return None
    if read_json(bundle.config) != json.loads(as_json(as_plain(config))):
        return None
    folders = (*checkpoints, "checkpoints", *_OURS)
    context = Context(config, bundle, Progress(quiet=True), "", folders)
    if is_pair(bundle.root) and _is_pair(config, _find(config, folders, quiet=True)):
        from vit_convert.convert_pair import is_fresh_pair

        fresh = is_fresh_pair(context, fresh_report, until=until, checkpoints=folders)
    else:
        fresh = all_fresh(stages(), context, until=until)
    if fresh and page:
        write_at_end(bundle, context.progress)
    return report if fresh else None


def _find(config: ml_collections.ConfigDict, folders: Sequence[str | os.PathLike[str]], *, quiet: bool) -> Any:
    """Where the checkpoint is, downloaded if need be, or the error; None if the config has a model instead."""
    if config.model is not None:
        return None
    from vit_convert.checkpoint.find import find_checkpoint

    try:
        return find_checkpoint(config.checkpoint, folders, progress=Progress(quiet=quiet))
    except ConvertError as e:
        return e


def _is_pair(config: ml_collections.ConfigDict, found: Any) -> bool:
    """Whether the checkpoint has two towers and the config asks for both.

    Args:
        config: the full config.
        found: from `_find`.

    Raises:
        UsageError: it has not, but the config sets keys that only towers have.
    """
    towers: Sequence[str] = ()
    if isinstance(found, ConvertError):
        return False  # the checkpoint stage raises it again, and puts it into the report
    if config.text.checkpoint:
        return True  # each tower complains itself if its file lacks it
    if found is not None:
        from vit_convert.families.load import towers_in

        path = f"{found.path}:{found.subtree}" if found.subtree else found.path
        try:
            towers = towers_in(path, family=config.family, families=config.families)
        except ConvertError:
            return False  # as above
    if len(towers) == 2:
        return True
    for tower in TOWERS:
        if keys := list(given_keys(config, tower)):
            what = f"{config.checkpoint or 'config.model'} is not a pair of towers"
            raise UsageError(f"config.{tower}.{keys[0]}: {what}", fix=f"Set config.{keys[0]}.")
    if config.tokenizer and "text" not in towers:
        raise UsageError(f"config.tokenizer={config.tokenizer!r}: the model takes no text", fix="Leave it out.")
    return False


def _require_device(config: ml_collections.ConfigDict) -> None:
    """Refuses a calibration on CUDA that this onnxruntime cannot do, before any work."""
    if config.calibration.device == "cuda" and quantized(config):
        import onnxruntime

        from vit_convert.core.ort_options import providers_for

        providers_for(onnxruntime, config.calibration.device)


def _convert(
    context: Context, changes: Callable[[], None], *, until: str, force: bool, command: Sequence[str]
) -> Report:
    rows: list[StageRecord] = []

    # Only once the manifest says that something changes: otherwise engine commands would read it with older graphs.
    def begin() -> None:
        if any(row.status == "running" for row in rows):
            changes()
        write_json(context.bundle.config, as_plain(context.config))

    try:
        run_stages(stages(), context, rows, until=until, force=force, begin=begin)
        if not context.bundle.config.is_file():  # somebody removed it on the way
            write_json(context.bundle.config, as_plain(context.config))
    finally:
        report = write_report(context, rows, command)
    return report
