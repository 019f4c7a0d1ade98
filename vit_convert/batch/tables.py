"""Jobs from tables: CSV, JSON lines, and the index of AugReg's checkpoints."""

import ast
import csv
import dataclasses
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vit_convert.batch.draft import Draft, draft_of, stem_of
from vit_convert.batch.where import Where
from vit_convert.core.errors import UsageError

# "How to train your ViT?": gs://vit_models/augreg/index.csv has a row for each fine-tuned file, with the pretrained
# file that it started from.
_AUGREG_COLUMNS = {"filename", "adapt_filename", "ds"}
_AUGREG = "gs://vit_models/augreg/{}.npz"
_FINE_TUNED = "adapt_filename"


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of a table: its place, and its cells."""

    origin: str
    cells: Mapping[str, Any]


def drafts_of_table(path: str, *, where: str = "", column: str = "") -> list[Draft]:
    """Reads a table of jobs.

    Args:
        path: `.csv` with a header, or `.jsonl` with one object per line: `name`, `checkpoint`, and any config key.
            Columns whose name begins with "_" are only for people and `where`. The index of AugReg is recognised by its
            columns.
        where: selects the rows for which this holds, see `Where`; empty for all.
        column: the one with the checkpoint; empty for `checkpoint`, and in AugReg's index for `adapt_filename`, the
            fine-tuned files.

    Returns:
        One draft per row, or per file for AugReg's index.

    Raises:
        UsageError: the table cannot be read, has an unknown column, or no row is taken.
    """
    rows = list(_rows(path))
    columns = dict.fromkeys(key for row in rows for key in row.cells)
    if column and column not in columns:
        raise UsageError(f"{path}: no column {column!r}", fix=f"Columns: {', '.join(columns)}")
    if where:
        condition = Where(where, columns)
        rows = [row for row in rows if condition.holds({key: typed(value) for key, value in row.cells.items()})]
    if not rows:
        raise UsageError(
            f"{path}: no row{f' for which {where}' if where else ''}", fix="Give another table, or another --where."
        )
    if columns.keys() >= _AUGREG_COLUMNS:
        return _augreg(rows, column or _FINE_TUNED)
    return [draft_of(_of_job(row.cells, column), row.origin, stem=f"row_{i}") for i, row in enumerate(rows, 1)]


def typed(cell: Any) -> Any:
    """A cell of a CSV, converted if it is a number; None for an empty one.

    Example:
        >>> typed("384"), typed("i1k"), typed("")
        (384, 'i1k', None)
    """
    if not isinstance(cell, str):
        return cell
    try:
        value = ast.literal_eval(cell.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return cell or None
    return value if isinstance(value, int | float) else cell


def _of_job(cells: Mapping[str, Any], column: str) -> dict[str, Any]:
    kept = {key: value for key, value in cells.items() if not key.startswith("_") and key != column}
    return {**kept, "checkpoint": cells[column]} if column else kept


def _augreg(rows: Sequence[Row], column: str) -> list[Draft]:
    found = {str(row.cells[column]): row.origin for row in reversed(rows) if row.cells.get(column)}
    addresses = {_AUGREG.format(name.removesuffix(".npz")): origin for name, origin in reversed(found.items())}
    return [Draft(origin, stem_of(address), checkpoint=address) for address, origin in addresses.items()]


def _rows(path: str) -> Iterator[Row]:
    try:
        text = pathlib.Path(path).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as e:
        raise UsageError(f"--table={path}: cannot be read ({e})", fix="A .csv with a header, or a .jsonl.") from e
    if path.endswith((".jsonl", ".ndjson")):
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip():
                yield Row(f"{path}:{number}", _object(line, f"{path}:{number}"))
        return
    reader = csv.DictReader(text.splitlines())
    for cells in reader:
        origin = f"{path}:{reader.line_num}"
        if None in cells or None in cells.values():
            raise UsageError(
                f"{origin}: not as many cells as the header has", fix='Quote cells that hold a comma: "fp16,int8".'
            )
        yield Row(origin, {key.strip(): value.strip() for key, value in cells.items()})


def _object(line: str, origin: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as e:
        raise UsageError(f"{origin}: no JSON ({e})", fix="One object a line.") from e
    if not isinstance(value, dict):
        raise UsageError(f"{origin}: a {type(value).__name__}, expected an object", fix="One object a line.")
    return value
