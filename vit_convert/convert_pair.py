"""The conversion of two towers: each a bundle of its own in the pair's folder, and what they are together."""

import os
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_collections

from vit_convert.core import config as configs
from vit_convert.core.bundle import Bundle, read_json, write_json
from vit_convert.core.errors import CheckError
from vit_convert.core.manifest import FINISHED, Manifest
from vit_convert.core.opened import opened
from vit_convert.core.pair import TOWERS
from vit_convert.core.pipeline import Context, Stage, all_fresh, run_stages
from vit_convert.core.version import __version__
from vit_convert.stages.pair import pair_stages, tower_context

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
        workdir: gets the folder `config.name`, with `image/`, `text/` and `pair.json` in it.
        convert_tower: converts one model; is given `changes`, which it calls before it changes anything.
        until: last stage of the towers to run; empty for all.
        quiet: print nothing.
        command: the command line, for the report.
        options: passed on to `convert_tower`.

    Returns:
        The report of the pair, as in its `report.json`.

    Raises:
        UsageError: another conversion works on the folder, or it cannot be written.
        ConvertError: a stage of a tower or of the pair failed. Where a tower misses a tolerance, the other is converted
            before.
    """
    towers = {tower: configs.of_tower(config, tower) for tower in TOWERS}
    with opened(config, workdir, command, quiet=quiet) as context:
        bundle, progress = context.bundle, context.progress
        missed = None
        for tower, own in towers.items():
            progress.say(f"{config.name}: {tower} tower")
            given = {"until": until, "quiet": quiet, "command": command, "changes": lambda: _invalidate(bundle)}
            try:
                convert_tower(own, bundle.root, **given, **options)
            except CheckError as e:  # what was proved to be wrong of one tower says nothing of the other
                missed = missed or e
        if missed is not None:
            raise missed
        report = _as_pair(context, towers, command, force=bool(options.get("force")))
        if not quiet:
            _print_summary(report, bundle)
    return report


def is_fresh_pair(context: Context, fresh_report: Callable[..., Any], *, until: str, **options: Any) -> bool:
    """Whether a conversion of a pair would find nothing to do.

    Args:
        context: of the pair.
        fresh_report: of one model, None where it would do something.
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
    """Says that what stands in a pair's folder need not be of its towers any more, which are about to change."""
    manifest = read_json(bundle.manifest)
    if manifest is not None:
        rows = [row for row in manifest.get("stages", ()) if isinstance(row, dict)]
        stale = [{**row, "status": "stale" if row.get("status") in FINISHED else row.get("status")} for row in rows]
        write_json(bundle.manifest, {**manifest, "stages": stale})
    bundle.report.unlink(missing_ok=True)


def _as_pair(context: Context, towers: Mapping[str, Any], command: Sequence[str], *, force: bool) -> dict[str, Any]:
    """Runs the pair's own stages, as far as its towers were converted, and writes its report."""
    rows: list[dict[str, Any]] = []
    for tower, own in towers.items():
        context.scratch[tower] = tower_context(context, own, tower)

    def begin() -> None:
        write_json(context.bundle.config, configs.as_plain(context.config))

    try:
        run_stages(_possible_stages(context), context, rows, force=force, begin=begin)
    finally:
        report = _write_report(context, rows, command)
    return report


def _possible_stages(context: Context) -> list[Stage]:
    """The stages for which both towers were converted far enough."""
    done = [Manifest.read(context.scratch[tower].bundle) for tower in TOWERS]
    needed = zip(pair_stages(), ("export", "check"))
    return [stage for stage, needs in needed if all(manifest.finished(needs) for manifest in done)]


def _write_report(context: Context, rows: Sequence[dict[str, Any]], command: Sequence[str]) -> dict[str, Any]:
    """Gathers what the towers and the pair's own stages found."""
    bundle, pair, similarity = context.bundle, context.results.get("pair"), context.results.get("similarity")
    towers = {tower: read_json(Bundle(bundle.root / tower).report) or {} for tower in TOWERS}
    report: dict[str, Any] = {
        "name": context.config.name,
        "vit_convert": __version__,
        "command": shlex.join(command),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "status": "done" if all(row["status"] in FINISHED for row in rows) else "failed",
        "pair": {key: value for key, value in pair.to_dict().items() if key != "summary"} if pair else {},
        "checkpoint": _checkpoint(towers),
        "towers": {tower: _of_tower(tower, found) for tower, found in towers.items()},
        "stages": [
            {key: row[key] for key in ("name", "status", "seconds", "peak_rss_mib", "error") if key in row}
            for row in rows
        ],
        "similarity": {"source": similarity.source} if similarity else {},
        "checks": similarity.to_dict()["checks"] if similarity else {},
    }
    if similarity and similarity.zero_shot is not None:
        measured = {name: row.zero_shot for name, row in similarity.checks.items()}
        report["zero_shot"] = {**similarity.zero_shot.to_dict(), **measured}
        report["accuracy"] = {"jax": similarity.zero_shot.jax, **measured}
    if all(row["status"] == "fresh" for row in rows):
        old = read_json(bundle.report) or {}
        report |= {key: old[key] for key in ("engines",) if key in old}  # what a GPU host found out
    write_json(bundle.report, report)
    return report


def _checkpoint(towers: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What both towers come from, with the parameters of both."""
    both = [found.get("checkpoint") or {} for found in towers.values()]
    image = {key: both[0][key] for key in ("path", "sha256", "family", "variant", "image_size") if key in both[0]}
    return {**image, "num_params": sum(found.get("num_params", 0) for found in both)}


def _of_tower(tower: str, found: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: found[key] for key in ("status", "engine", "verdicts") if key in found}
    checks = {name: {key: check.get(key) for key in ("passed", "max_rel", "cosine")} for name, check in _checks(found)}
    return {"bundle": tower, "report": f"{tower}/report.json", **kept, "checks": checks}


def _checks(found: Mapping[str, Any]) -> Sequence[tuple[str, Mapping[str, Any]]]:
    return list((found.get("checks") or {}).items())


def _print_summary(report: Mapping[str, Any], bundle: Bundle) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(soft_wrap=True)
    pair = report["pair"]
    console.print(f"\n[bold]{report['name']}[/bold]: a pair of towers, {pair.get('similarity', 'not described yet')}")
    if checks := report["checks"]:
        columns = ("pair", "against JAX", "cosine", "prob.", "same first", "in first 5", "zero-shot")
        table = Table(*columns, box=None, header_style="dim")
        if "zero_shot" in report:
            table.add_row("JAX", "", "", "", "", "", f"{report['zero_shot']['jax']:.2f} %")
        for name, row in checks.items():
            verdict = "[green]passed[/green]" if row["passed"] else "[red]FAILED[/red]"
            numbers = (f"{row['max_cosine_error']:.2g}", f"{row['max_probability_error']:.2g}")
            shares = (f"{row['top1']:.2f} %", f"{row['recall']:.2f} %")
            top1 = f"{row['zero_shot']:.2f} %" if "zero_shot" in row else ""
            table.add_row(f"ONNX {name}", verdict, *numbers, *shares, top1)
        console.print(table)
    if not any((bundle.root / tower / "engines").is_dir() for tower in TOWERS):
        console.print(
            f"No engine was built. On its host, with this folder there: python -m vit_convert.engine {bundle.root.name}"
        )
    console.print(f" {bundle.root}: image/ and text/, each with its report; pair.json; report.json of both together")
