"""The table of mutation.py's results: one line per room, from the newest draw of each module."""

import collections
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from markdown_table import markdown

Run = Mapping[str, Any]


def newest_draws(folder: pathlib.Path) -> list[Run]:
    """Of each module that was mutated, its newest draw: that of the highest seed, whenever its survivors were tried
    again."""
    runs = [json.loads(path.read_text())["runs"] for path in sorted(folder.glob("*.json"))]
    return [max(rows, key=lambda row: int(row["seed"])) for rows in runs if rows]


def mutation_table(folder: pathlib.Path) -> str:
    """A table in Markdown.

    Args:
        folder: of the records, one file a module.
    """
    rooms: dict[str, list[Run]] = collections.defaultdict(list)
    for run in newest_draws(folder):
        rooms[str(pathlib.PurePosixPath(run["module"]).parent.relative_to("vit_convert"))].append(run)
    rows = [_row(f"`{room}/`", runs) for room, runs in sorted(rooms.items())]
    everything = [run for runs in rooms.values() for run in runs]
    return markdown(
        ("room", "modules", "mutants", "alter nothing", "killed at the first try", "least of a module"),
        [*rows, _row("all", everything)],
    )


def _row(room: str, runs: Sequence[Run]) -> list[str]:
    counted, killed = sum(map(_that_count, runs)), sum(map(_killed, runs))
    worst = min(runs, key=lambda run: _killed(run) / max(_that_count(run), 1))
    name = pathlib.PurePosixPath(worst["module"]).stem
    least = f"{_killed(worst)} of {_that_count(worst)} (`{name}`)" if _killed(worst) < _that_count(worst) else "all"
    share = f"{killed} of {counted} ({100 * killed / max(counted, 1):.0f} %)"
    return [
        room,
        str(len(runs)),
        str(sum(run["mutants"] for run in runs)),
        str(sum(run["equivalent"] for run in runs)),
        share,
        least,
    ]


def _that_count(run: Run) -> int:
    return int(run["mutants"]) - int(run["equivalent"])


def _killed(run: Run) -> int:
    """Before tests were written for the survivors, where that is known."""
    first = run.get("killed_at_first")
    return int(run["killed"] if first is None else first)
