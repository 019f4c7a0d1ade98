"""The conversion of two towers: each becomes a bundle of its own within the pair's folder."""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_collections

from vit_convert.core import config as configs
from vit_convert.core.bundle import Bundle, read_json, write_json
from vit_convert.core.errors import CheckError, UsageError
from vit_convert.core.manifest import FINISHED, Manifest, StageRecord
from vit_convert.core.opened import opened
from vit_convert.core.pair import TOWERS
from vit_convert.core.pipeline import Context, Stage, all_fresh, run_stages
from vit_convert.report.at_end import write_at_end
from vit_convert.report.pair import print_pair_summary, write_pair_report
from vit_convert.report.record import PairReport
from vit_convert.stages.pair import pair_stages, tower_context
from vit_convert.stages.text import require_files

Convert = Callable[..., dict[str, Any]]


def convert_pair(
    config: ml_collections.ConfigDict,
    workdir: str | os.PathLike[str],
    convert_tower: Convert,
    *,
    until: str = "",
    quiet: bool = False,
    command: Sequence[str] = (),
    **options: Any,
) -> dict[str, Any]:
    """Converts both towers of a checkpoint, and checks them as a pair.

    Args:
        config: the full config.
        workdir: the pair is its sub-folder `config.name`, with `image/`, `text/` and `pair.json` in it.
        convert_tower: converts one model; it must call its argument `changes` before it changes anything, and put the
            outputs of its graphs into `answers`.
        until: last stage of the towers to run; empty for all.
        quiet: print nothing.
        command: the command line, for the report.
        options: passed on to `convert_tower`.

    Returns:
        The report of the pair, as in its `report.json`.

    Raises:
        UsageError: another conversion is using the folder, or it cannot be written; or a tower is asked for no
            embedding.
        CalibrationError: a file of prompts, or the tokenizer, is not there.
        ConvertError: a stage of a tower or of the pair failed. If one tower misses a tolerance, the other is still
            converted first.
    """
    towers = {tower: configs.of_tower(config, tower) for tower in TOWERS}
    for tower, own in towers.items():
        if own.outputs != configs.AUTO and "embedding" not in configs.read_outputs(own.outputs):
            raise UsageError(
                f"config.outputs={own.outputs!r} of the {tower} tower: a pair is compared by its embeddings",
                fix=f"Set config.{tower}.outputs='embedding,{own.outputs}', or convert the tower alone.",
            )
    require_files(towers["text"])  # or they would be missed only when the image tower is done
    with opened(config, workdir, command, quiet=quiet) as context:
        bundle, progress = context.bundle, context.progress
        missed = None
        answers: dict[str, dict[str, Any]] = {tower: {} for tower in TOWERS}
        for tower, own in towers.items():
            progress.say(f"{config.name}: {tower} tower")
            given = {"until": until, "quiet": quiet, "command": command, "changes": lambda: _invalidate(bundle)}
            try:
                convert_tower(own, bundle.root, answers=answers[tower], **given, **options)
            except CheckError as e:  # a failed check of one tower says nothing about the other
                missed = missed or e
        if missed is not None:
            raise missed
        report = _as_pair(context, towers, command, answers, force=bool(options.get("force")))
        write_at_end(bundle, progress, wanted=bool(options.get("page")))
        if not quiet:
            print_pair_summary(report, bundle)
    return report.to_dict()


def is_fresh_pair(context: Context, fresh_report: Callable[..., Any], *, until: str, **options: Any) -> bool:
    """Whether a conversion of a pair has nothing left to do.

    Args:
        context: of the pair.
        fresh_report: gives the report of one model, or None if there is something to do.
        until: last stage of the towers to run; empty for all.
        options: passed on to `fresh_report`.
    """
    for tower in TOWERS:
        own = configs.of_tower(context.config, tower)
        if fresh_report(own, context.bundle.root, until=until, **options) is None:
            return False
        context.scratch[tower] = tower_context(context, own, tower)
    return all_fresh(_possible_stages(context), context, until="")


def _invalidate(bundle: Bundle) -> None:
    """Marks a pair's own files as stale, because its towers are about to change."""
    manifest = read_json(bundle.manifest)
    if manifest is not None:
        rows = [row for row in manifest.get("stages", ()) if isinstance(row, dict)]
        stale = [{**row, "status": "stale" if row.get("status") in FINISHED else row.get("status")} for row in rows]
        write_json(bundle.manifest, {**manifest, "stages": stale})
    bundle.report.unlink(missing_ok=True)


def _as_pair(
    context: Context,
    towers: Mapping[str, Any],
    command: Sequence[str],
    answers: Mapping[str, Mapping[str, Any]],
    *,
    force: bool,
) -> PairReport:
    """Runs those of the pair's own stages that its towers are far enough for, and writes its report."""
    rows: list[StageRecord] = []
    for tower, own in towers.items():
        context.scratch[tower] = tower_context(context, own, tower, answers[tower])

    def begin() -> None:
        write_json(context.bundle.config, configs.as_plain(context.config))

    try:
        run_stages(_possible_stages(context), context, rows, force=force, begin=begin)
    finally:
        report = write_pair_report(context, rows, command)
    return report


def _possible_stages(context: Context) -> list[Stage]:
    """The stages whose needs both towers meet by now."""
    done = [Manifest.read(context.scratch[tower].bundle) for tower in TOWERS]
    needed = zip(pair_stages(), ("export", "check"))
    return [stage for stage, needs in needed if all(manifest.finished(needs) for manifest in done)]
