"""The report of a pair of towers, made from its towers' reports and its own stages."""

import shlex
import time
from collections.abc import Mapping, Sequence
from typing import Any

from vit_convert.core.bundle import Bundle
from vit_convert.core.manifest import StageRecord
from vit_convert.core.pair import TOWERS, PairFacts
from vit_convert.core.pipeline import Context
from vit_convert.core.version import __version__
from vit_convert.report.record import (
    PairCheckpoint,
    PairReport,
    Report,
    Samples,
    StageRow,
    TowerCheck,
    TowerReport,
    read,
    read_report,
    write,
)


def write_pair_report(context: Context, rows: Sequence[StageRecord], command: Sequence[str]) -> PairReport:
    """Gathers what the towers and the pair's own stages found, and writes it.

    Args:
        context: of the pair.
        rows: of the pipeline, one for each stage of the pair.
        command: the command line.

    Returns:
        The report.
    """
    bundle, pair, similarity = context.bundle, context.results.get("pair"), context.results.get("similarity")
    towers = {tower: read_report(Bundle(bundle.root / tower)) or Report.from_dict({}) for tower in TOWERS}
    zero_shot = similarity.zero_shot if similarity else None
    old = read(bundle, PairReport) if all(row.status == "fresh" for row in rows) else None
    report = PairReport(
        name=context.config.name,
        vit_convert=__version__,
        command=shlex.join(command),
        date=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        status="done" if all(row.finished for row in rows) else "failed",
        pair=PairFacts.part_of(pair) if pair else None,
        checkpoint=_checkpoint(towers),
        towers={tower: _in_short(tower, found) for tower, found in towers.items()},
        stages=tuple(StageRow.of(row) for row in rows),
        similarity=Samples(source=similarity.source) if similarity else None,
        checks=similarity.checks if similarity else {},
        zero_shot=zero_shot,
        accuracy=_accuracy(zero_shot.jax, similarity.checks) if zero_shot else {},
        engines=old.engines if old else {},  # results of a GPU host for these graphs
    )
    write(bundle, report)
    return report


def _accuracy(jax: float, checks: Mapping[str, Any]) -> dict[str, float | None]:
    return {"jax": jax, **{precision: check.zero_shot for precision, check in checks.items()}}


def _checkpoint(towers: Mapping[str, Report]) -> PairCheckpoint | None:
    image, text = (towers[tower].checkpoint for tower in TOWERS)
    if image is None or text is None:
        return None
    return PairCheckpoint(
        path=image.path,
        sha256=image.sha256,
        family=image.family,
        variant=image.variant,
        image_size=image.image_size,
        num_params=image.num_params + text.num_params,
    )


def _in_short(tower: str, found: Report) -> TowerReport:
    return TowerReport(
        bundle=tower,
        report=f"{tower}/report.json",
        status=found.status,
        engine=found.engine,
        verdicts=found.verdicts,
        checks={precision: TowerCheck.part_of(check) for precision, check in found.checks.items()},
    )


def print_pair_summary(report: PairReport, bundle: Bundle) -> None:
    """Prints what a conversion of a pair found.

    Args:
        report: of the pair.
        bundle: the pair's folder.
    """
    from rich.console import Console
    from rich.table import Table

    console = Console(soft_wrap=True)
    compared = report.pair.similarity if report.pair else "not described yet"
    console.print(f"\n[bold]{report.name}[/bold]: a pair of towers, {compared}")
    if report.checks:
        columns = ("pair", "against JAX", "cosine", "prob.", "same first", "in first 5", "zero-shot")
        table = Table(*columns, box=None, header_style="dim")
        if report.zero_shot is not None:
            table.add_row("JAX", "", "", "", "", "", f"{report.zero_shot.jax:.2f} %")
        for name, row in report.checks.items():
            verdict = "[green]passed[/green]" if row.passed else "[red]FAILED[/red]"
            numbers = (f"{row.max_cosine_error:.2g}", f"{row.max_probability_error:.2g}")
            shares = (f"{row.top1:.2f} %", f"{row.recall:.2f} %")
            top1 = "" if row.zero_shot is None else f"{row.zero_shot:.2f} %"
            table.add_row(f"ONNX {name}", verdict, *numbers, *shares, top1)
        console.print(table)
    if not any((bundle.root / tower / "engines").is_dir() for tower in TOWERS):
        console.print(
            f"No engine was built. On its host, with this folder there: python -m vit_convert.engine {bundle.root.name}"
        )
    console.print(f" {bundle.root}: image/ and text/, each with its report; pair.json; report.json of both together")
