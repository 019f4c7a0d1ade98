"""Alternating conversions of two small models in one bundle, each with an accident at a random moment, a plain rerun,
and an inspection of all files.

Accidents: a process killed (SIGKILL, SIGTERM) within a stage, around the renaming of a file or anywhere; a disk that
becomes full or a folder that becomes read-only at some moment; two conversions at a time. After each accident, the same
command must end with 0, and every graph must compute what a float64 forward pass of the right checkpoint computes.

    python benchmarks/accidents.py --workdir=/tmp/accidents --kills=200 --workers=2
"""

import collections
import json
import os
import pathlib
import sys
import time

from absl import app, flags
from results import RESULTS, first_paragraph, hardware, today, versions
from yard import ACCIDENTS, Yard

_WORKDIR = flags.DEFINE_string("workdir", None, "Scratch folder.", required=True)
_KILLS = flags.DEFINE_integer("kills", 200, "Conversions to kill.")
_OTHERS = flags.DEFINE_integer("others", 10, "Accidents of each other kind.")
_WORKERS = flags.DEFINE_integer("workers", 1, "Concurrent bundles, each in a process of its own.")
_MINUTES = flags.DEFINE_float("minutes", 0.0, "Stop after this many minutes with the results so far; 0: never.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the first worker's choices.")
_OUTPUT = flags.DEFINE_string("output", "", "Result file; by default benchmarks/results/accidents-<date>.json.")


def work(number: int, folder: pathlib.Path) -> None:
    """One worker's share; writes each accident as a line of `rows.jsonl`."""
    started = time.monotonic()
    yard = Yard(folder, _SEED.value + number)
    share = {"kill": _KILLS.value, **dict.fromkeys((name for name in ACCIDENTS if name != "kill"), _OTHERS.value)}
    kinds = [
        name
        for name, count in share.items()
        for _ in range(count // _WORKERS.value + (number < count % _WORKERS.value))
    ]
    yard.random.shuffle(kinds)
    with open(folder / "rows.jsonl", "w") as f:
        for kind in kinds:
            if _MINUTES.value and time.monotonic() - started > 60 * _MINUTES.value:
                break
            f.write(json.dumps(yard.accident(kind)) + "\n")
            f.flush()


def summary(rows: list[dict]) -> dict:
    """Counts of what happened, and everything that was wrong."""
    kills = [row for row in rows if row["accident"] == "kill"]
    return {
        "accidents": dict(collections.Counter(row["accident"] for row in rows)),
        "kills_by_signal": dict(collections.Counter(row["signal"] for row in kills)),
        "kills_by_stage": dict(collections.Counter(row["stage"] for row in kills)),
        "kills_by_aim": dict(collections.Counter(row["aim"] for row in kills)),
        "files_compared": sum(row["files"] for row in rows),
        "wrong": [row for row in rows if row["wrong"]],
    }


def main(argv: list[str]) -> int:
    """Runs the workers and writes the result; 1 where anything was wrong."""
    folders = [pathlib.Path(_WORKDIR.value) / f"worker{number}" for number in range(_WORKERS.value)]
    children = []
    for number, folder in enumerate(folders):
        folder.mkdir(parents=True)
        if not (child := os.fork()):
            status = 1
            try:
                work(number, folder)
                status = 0
            finally:
                os._exit(status)
        children.append(child)
    failed = [os.waitpid(child, 0)[1] for child in children]
    rows = [json.loads(line) for folder in folders for line in (folder / "rows.jsonl").read_text().splitlines()]
    about = {
        "about": first_paragraph(__doc__),
        "date": today(),
        "command": " ".join(["python", "benchmarks/accidents.py", *argv[1:]]),
    }
    found = {**about, "hardware": hardware(), "versions": versions(), **summary(rows), "rows": rows}
    output = pathlib.Path(_OUTPUT.value or RESULTS / f"accidents-{today()}.json")
    output.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps({key: found[key] for key in ("accidents", "kills_by_stage", "files_compared", "wrong")}, indent=1))
    return 1 if any(failed) or found["wrong"] else 0


if __name__ == "__main__":
    app.run(lambda argv: sys.exit(main(sys.argv)))
