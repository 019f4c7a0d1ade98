"""Ranks what each layer loses in INT8 or FP8, as a table and a picture, from a bundle's `sensitivity.json`; nothing is
run again.

python -m vit_convert.report.sensitivity out/vit_b32
python -m vit_convert.report.sensitivity --by=top1 --plot=layers.png out/vit_b32
"""

import dataclasses
import os
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags

from vit_convert.core.bundle import read_json
from vit_convert.core.check_results import RankedLayer
from vit_convert.core.errors import UsageError, nearest
from vit_convert.core.picture import draw
from vit_convert.core.program import Program
from vit_convert.core.record import RecordError
from vit_convert.core.sensitivity_record import SensitivityRecord

# Columns to rank by, with the sign that puts the most harmful first.
COLUMNS = {"error": 1, "max_rel": 1, "cosine": -1, "agreement": -1, "top1": -1}
_TITLES = ("1 - cosine", "worst cosine", "of scale", "same class", "top-1", "points")


@dataclasses.dataclass(frozen=True)
class Ranking:
    """Units and blocks by what each loses when only it is quantized, the most harmful first.

    Attributes:
        units: without those that have not been measured yet.
        blocks: the same for whole blocks.
    """

    units: list[RankedLayer]
    blocks: list[RankedLayer]


def ranking(record: SensitivityRecord, by: str = "error") -> Ranking:
    """Ranks units and blocks.

    Args:
        record: of `sensitivity.json`.
        by: one of COLUMNS.

    Raises:
        UsageError: an unknown column, or no labels for top1.
    """
    if by not in COLUMNS:
        raise UsageError(f"--by={by}: not one of {', '.join(COLUMNS)}.{nearest(by, COLUMNS)}")
    if by == "top1" and not record.labelled:
        raise UsageError(
            "--by=top1: the images had no labels", fix="Rank by agreement, or give config.evaluation.data with labels."
        )
    measured = {frozenset(row.quantized): row for row in record.measured}
    blocks: dict[str, list[str]] = {}
    for name in record.units:
        blocks.setdefault(name.rpartition("/")[0], []).append(name)
    fp32 = measured.get(frozenset())

    def rows(sets: Mapping[str, Sequence[str]]) -> list[RankedLayer]:
        found = []
        for name, names in sets.items():
            if (row := measured.get(frozenset(names))) is not None:
                before = fp32.top1 if fp32 is not None else None
                change = None if row.top1 is None or before is None else row.top1 - before
                columns = {column: getattr(row, column) for column in COLUMNS}
                found.append(RankedLayer(name=name, **columns, top1_change=change))
        return sorted(found, key=lambda row: COLUMNS[by] * getattr(row, by), reverse=True)

    return Ranking(rows({name: [name] for name in record.units}), rows(blocks))


def print_ranking(record: SensitivityRecord, by: str = "error") -> None:
    """Prints both rankings.

    Args:
        record: of `sensitivity.json`.
        by: one of COLUMNS.
    """
    from rich.console import Console
    from rich.table import Table

    console = Console(soft_wrap=True)
    console.print(
        f"One at a time in {record.precision}, the rest in {record.rest}; against fp32 on "
        f"{record.scan_images} {record.source}{'' if record.labelled else ' without labels'}"
    )
    found = ranking(record, by)
    for what, rows in (("unit", found.units), ("block", found.blocks)):
        table = Table(what, *_TITLES, box=None, header_style="dim")
        for row in rows:
            top1 = ("", "") if row.top1_change is None else (f"{row.top1:.2f} %", f"{row.top1_change:+.2f}")
            numbers = (f"{row.error:.2g}", f"{row.cosine:.6f}", f"{row.max_rel:.2g}", f"{row.agreement:.2f} %")
            table.add_row(row.name, *numbers, *top1)
        console.print(table)


def plot_ranking(record: SensitivityRecord, path: str | os.PathLike[str]) -> str:
    """Draws the mean of 1 - cosine: a group of bars for each block, a bar for each kind of layer and one for the whole
    block.

    Args:
        record: of `sensitivity.json`.
        path: the `.png` or `.svg` to write.

    Returns:
        "", or why nothing was drawn.
    """
    found = ranking(record)
    errors = {row.name: row.error for row in found.units}
    errors |= {f"{row.name}/whole block": row.error for row in found.blocks}
    blocks = sorted({name.rpartition("/")[0] for name in errors})
    kinds = [*dict.fromkeys(name.rpartition("/")[2] for name in record.units), "whole block"]

    def paint(axes: Any) -> None:
        for i, kind in enumerate(kinds):
            places = [x + (i - (len(kinds) - 1) / 2) * 0.8 / len(kinds) for x in range(len(blocks))]
            heights = [errors.get(f"{block}/{kind}", 0.0) for block in blocks]
            axes.bar(places, heights, 0.8 / len(kinds), label=kind, color="0.75" if kind == "whole block" else None)
        title = f"One layer at a time in {record.precision}, {record.scan_images} {record.source}"
        axes.set(ylabel="1 - cosine to fp32, mean", yscale="log", title=title)
        axes.set_xticks(range(len(blocks)), blocks, rotation=90, fontsize=8)

    return draw(path, (max(6.0, 0.22 * len(blocks) * len(kinds)), 4), paint)


def load_record(bundle: str | os.PathLike[str]) -> SensitivityRecord:
    """Reads a bundle's sensitivity.

    Raises:
        UsageError: there is none, or the file is damaged.
    """
    path = pathlib.Path(bundle) / "sensitivity.json"
    found = read_json(path)
    try:
        if not found or "measured" not in found:
            raise RecordError("not there")
        return SensitivityRecord.from_dict(found)
    except RecordError as e:
        raise UsageError(f"{path}: missing or damaged", fix="Convert with --config.sensitivity=True first.") from e


_PROGRAM = Program(__doc__, when_interrupted="nothing was changed")
flags.DEFINE_enum("by", "error", list(COLUMNS), "What to rank by.", flag_values=_PROGRAM.flags)
flags.DEFINE_string("plot", "", "A .png or .svg to draw.", flag_values=_PROGRAM.flags)


def main(argv: Sequence[str]) -> int:
    """Runs the command line; returns the exit code."""
    return _PROGRAM.main(argv, _run)


def _run(argv: Sequence[str]) -> int:
    words, wanted = _PROGRAM.parse(argv[1:]), _PROGRAM.flags
    if len(words) != 1:
        raise UsageError(f"{len(words)} arguments, expected one: the bundle's folder", fix="For example out/vit_b32.")
    record = load_record(words[0])
    print_ranking(record, wanted.by)
    if wanted.plot and (missing := plot_ranking(record, wanted.plot)):
        raise UsageError(f"--plot={wanted.plot}: {missing}", fix="pip install matplotlib")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
