"""One conversion: takes a config, leaves a bundle with its report."""

import json
import os
import pathlib
import shlex
import sys
from collections.abc import Sequence
from typing import Any

import ml_collections

from vit_convert.core.bundle import Bundle, as_json, read_json, utf8_path, write_json
from vit_convert.core.config import as_plain
from vit_convert.core.leftovers import remove_temporaries
from vit_convert.core.lock import hold
from vit_convert.core.manifest import Manifest
from vit_convert.core.pipeline import Context, all_fresh, run_stages
from vit_convert.core.progress import Progress
from vit_convert.report.summary import print_summary
from vit_convert.report.write import write_report
from vit_convert.stages import stages

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
) -> dict[str, Any]:
    """Converts one checkpoint.

    Args:
        config: a full config, from `config.complete`.
        workdir: gets the folder `config.name`.
        until: last stage to run; empty for all.
        force: redo fresh stages.
        quiet: print nothing.
        command: the command line, for the report.
        checkpoints: folders in which a checkpoint is looked for before `checkpoints/`; it is fetched to the first.

    Returns:
        The report, as in `report.json`; written whether or not a stage failed.

    Raises:
        UsageError: another conversion works on the bundle, or the bundle cannot be written.
        ConvertError: a stage failed; finished stages are kept.
    """
    bundle = Bundle(os.path.join(workdir, config.name))
    utf8_path(bundle.root.absolute())
    bundle.require_writable()
    line = shlex.join(command or sys.argv)
    with hold(bundle, line):
        remove_temporaries(bundle)
        progress = Progress(bundle.events, quiet=quiet)
        progress.event("command", argv=list(command or sys.argv), name=config.name)
        context = Context(config, bundle, progress, line, (*checkpoints, "checkpoints", *_OURS))
        report = _convert(context, until=until, force=force, command=command)
        if not quiet:
            print_summary(report, bundle.root, files=list(Manifest.read(bundle).files), whole=not until)
    return report


def fresh_report(
    config: ml_collections.ConfigDict,
    workdir: str | os.PathLike[str],
    *,
    until: str = "",
    checkpoints: Sequence[str | os.PathLike[str]] = (),
) -> dict[str, Any] | None:
    """The report of a conversion that would find nothing to do; None where it would do something. Takes milliseconds
    and writes nothing.

    Args:
        config, workdir, until, checkpoints: as `convert` takes them.
    """
    bundle = Bundle(os.path.join(workdir, config.name))
    report = read_json(bundle.report)
    # An own model is not made to find out; and what a lock names is being changed, or was when its holder died.
    if not report or report.get("status") != "done" or config.model is not None or bundle.lock.exists():
        return None
    if read_json(bundle.config) != json.loads(as_json(as_plain(config))):
        return None
    context = Context(config, bundle, Progress(quiet=True), "", (*checkpoints, "checkpoints", *_OURS))
    return report if all_fresh(stages(), context, until=until) else None


def _convert(context: Context, *, until: str, force: bool, command: Sequence[str]) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []

    # not before the manifest says that something changes: engine commands would read it beside other graphs
    def begin() -> None:
        write_json(context.bundle.config, as_plain(context.config))

    try:
        run_stages(stages(), context, rows, until=until, force=force, begin=begin)
    finally:
        report = write_report(context, rows, command)
    return report
