"""The table that ends a conversion."""

import pathlib
from collections.abc import Sequence

from vit_convert.core.progress import human_bytes, human_seconds
from vit_convert.report.record import Report


def print_summary(report: Report, root: pathlib.Path, *, files: Sequence[pathlib.Path], whole: bool) -> None:
    """Prints stages, checks, accuracy and files of a finished conversion.

    Args:
        report: of the conversion.
        root: the bundle's folder.
        files: written by the finished stages.
        whole: whether all stages were requested, without --until.
    """
    from rich.console import Console
    from rich.table import Column, Table

    console = Console(soft_wrap=True)
    checkpoint = report.checkpoint
    assert checkpoint is not None  # the conversion finished
    console.print(
        f"\n[bold]{report.name}[/bold]: {checkpoint.family} {checkpoint.variant}, {checkpoint.num_params:,} parameters"
    )

    stages = Table("stage", "status", "time", "peak memory", box=None, header_style="dim")
    for row in report.stages:
        stages.add_row(row.name, row.status, human_seconds(row.seconds), human_bytes(row.peak_rss_mib * 2**20))
    console.print(stages)

    if report.checks:
        checks = Table(
            "graph", "checked against JAX", "max abs", "of scale", "cosine", "top-1", box=None, header_style="dim"
        )
        if report.accuracy.get("jax") is not None:
            checks.add_row("JAX", "", "", "", "", _percent(report.accuracy["jax"]))
        for precision, check in report.checks.items():
            said = "[green]passed[/green]" if check.passed else "[red]FAILED[/red]"
            numbers = (f"{check.max_abs:.2g}", f"{check.max_rel:.2g}", f"{check.cosine:.7f}")
            checks.add_row(f"ONNX {precision}", said, *numbers, _percent(check.top1))
        console.print(checks)
        for verdict in report.verdicts.values():
            console.print(
                f" {verdict.text}{'' if verdict.accurate is not False else ': [red]not accurate enough[/red]'}"
            )
    if report.calibration is not None and (left_out := report.calibration.left_out):
        named = "; ".join(f"{', '.join(row.sites)} {row.error:.2g}" for row in left_out)
        console.print(
            f" not in int8, as it costs the product more than {left_out[0].max_error:g} at every threshold: {named}"
        )
    if report.calibration is not None and (share := report.calibration.output_share) and share.products:
        console.print(
            f" not in int8, as it costs the output most for its time: {', '.join(row.site for row in share.products)}; "
            f"smallest cosine {share.cosine_before:.4f} → {share.cosine:.4f}"
        )

    table = Table(Column(f"file in {root}", overflow="fold"), "size", "", box=None, header_style="dim")
    recommended = report.engine.path if report.engine is not None else ""
    for engine in report.engines:
        note = f"built in {human_seconds(engine.build_seconds)}" + (
            ", recommended" if engine.path == recommended else ""
        )
        table.add_row(engine.path, human_bytes(engine.bytes), note)
    graphs = sorted((path for path in files if path.suffix == ".onnx"), key=lambda path: (path.parent != root, path))
    page = root / "report.html"
    for path in (*graphs, root / "report.json", *([page] if page.is_file() else [])):
        data = path.with_name(path.name + ".data")
        with_weights = data in files
        size = path.stat().st_size + (data.stat().st_size if with_weights else 0)
        table.add_row(str(path.relative_to(root)), human_bytes(size), "with its weights" if with_weights else "")
    console.print(table)
    if whole and not report.engines:
        console.print(
            f"No engine was built. On its host, with this folder there: python -m vit_convert.engine {root.name}"
        )
    if all(row.status == "fresh" for row in report.stages):
        console.print("Nothing changed: every stage was fresh.")


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.2f} %"
