"""Many conversions with one command, compared with a shell loop of single ones: the same files, config and checks, in
turns.

    python benchmarks/batch.py --workdir=/tmp/bench --zoo=mu --files=200

A loop of N conversions takes N times what one takes, so some of the files are enough for it (--loop_files, evenly
chosen): they are converted one by one before and after the batch, and the times per file are compared.
`loop_cpu_seconds` in the result has each of them and shows that a file's cost does not depend on how many came before
it.
"""

import json
import pathlib
import shlex
import shutil
import statistics
import sys
from typing import Any

from absl import app, flags
from process import Taken, run
from results import RESULTS, first_paragraph, hardware, today, versions

from vit_convert.families.random import write_random_checkpoint

_WORKDIR = flags.DEFINE_string("workdir", None, "Scratch folder; gets the checkpoints too.", required=True)
_ZOO = flags.DEFINE_enum("zoo", "mu", ["mu", "s16", "mixed"], "Which files.")
_FILES = flags.DEFINE_integer("files", 200, "How many files; for mixed, how many of each model.")
_LOOP_FILES = flags.DEFINE_integer("loop_files", 6, "How many of them the loop converts; for mixed, one of each model.")
_PRECISION = flags.DEFINE_string("precision", "fp16", "Of all conversions.")
_JOBS = flags.DEFINE_integer("jobs", 2, "Workers of the batch.")
_MEMORY = flags.DEFINE_float("memory_gib", 8.0, "Memory of the batch.")
_OUTPUT = flags.DEFINE_string(
    "output", "", "Result file; by default benchmarks/results/batch-<date>.json, where each zoo has a row."
)

# fmt: off
ZOOS = {
    "mu": ("mu/16",),
    "s16": ("S/16",),
    "mixed": ("Ti/16", "S/32", "B/32", "B/16", "L/16", "R26+ViT-S/32", "Mixer-B/32", "Swin-T/7"),
}
# fmt: on
_DISTINCT = 4  # files with distinct weights; the others are links to them, since weights do not change the work


def write_zoo(folder: pathlib.Path, variants: tuple[str, ...], count: int) -> list[list[pathlib.Path]]:
    """Writes `count` files of each variant; returns one list per variant."""
    folder.mkdir(parents=True, exist_ok=True)
    zoo = []
    for variant in variants:
        name, end = (
            variant.replace("/", "_").replace("+", "_"),
            ".safetensors" if variant.startswith("Swin") else ".npz",
        )
        paths = [folder / f"{name}-{i:03d}{end}" for i in range(count)]
        for i, path in enumerate(paths):
            if path.exists():
                continue
            if i < _DISTINCT or variant == "mu/16":
                options: dict[str, Any] = {"image_size": (32, 32), "num_classes": 10} if variant == "mu/16" else {}
                write_random_checkpoint(path, variant, seed=i, **options)
            else:
                path.hardlink_to(paths[i % _DISTINCT])
        zoo.append(paths)
    return zoo


def evenly(paths: list[pathlib.Path], count: int) -> list[pathlib.Path]:
    """Selects this many of them, starting with the first, at equal distances."""
    return [paths[i * len(paths) // count] for i in range(min(count, len(paths)))]


def words() -> list[str]:
    """The flags of all conversions."""
    return [f"--config.precision={_PRECISION.value}", "--config.engine.backend=none"]


def single(path: pathlib.Path, workdir: pathlib.Path) -> list[str]:
    """The command of one conversion, with a config file, as a loop in a shell would have it."""
    config = workdir.parent / "any.py"
    config.write_text("from vit_convert.core.config import default_config as get_config\n")
    command = [sys.executable, "-m", "vit_convert", "--nopage", f"--config={config}", f"--config.checkpoint={path}"]
    return [*command, f"--config.name={path.stem}", *words(), f"--workdir={workdir}", "--quiet"]


def run_single(path: pathlib.Path, workdir: pathlib.Path) -> Taken:
    """Runs one conversion and deletes its bundle, so that the disk holds one zoo and not two."""
    taken = run(single(path, workdir))
    shutil.rmtree(workdir / path.stem, ignore_errors=True)
    return taken


def main(argv: list[str]) -> int:
    """Measures, writes the result, and prints it."""
    folder = pathlib.Path(_WORKDIR.value)
    zoo = write_zoo(folder / "zoo", ZOOS[_ZOO.value], _FILES.value)
    files = [path for paths in zoo for path in paths]
    looped = [paths[0] for paths in zoo] if len(zoo) > 1 else evenly(zoo[0], _LOOP_FILES.value)
    shutil.rmtree(folder / "loop", ignore_errors=True)
    shutil.rmtree(folder / "batch", ignore_errors=True)
    half = len(looped) // 2  # before and after, so that a machine that grows busier affects both
    loop = [run_single(path, folder / "loop") for path in looped[:half]]
    checkpoints = folder / "zoo.txt"
    checkpoints.write_text("".join(f"{path}\n" for path in files))
    # No pages on either side: a report is drawn from its figures whenever it is wanted.
    limits = ["--nopage", f"--jobs={_JOBS.value}", f"--memory_gib={_MEMORY.value}"]
    command = [sys.executable, "-m", "vit_convert.batch", f"--checkpoints={checkpoints}", *words(), *limits, "--quiet"]
    batch = run([*command, f"--workdir={folder / 'batch'}"])
    loop += [run_single(path, folder / "loop") for path in looped[half:]]
    again = run([*command, f"--workdir={folder / 'batch'}"])
    seconds = [taken.wall_seconds for taken in loop]
    a_file = statistics.mean(seconds) if len(zoo) > 1 else statistics.median(seconds)
    found = {
        "zoo": _ZOO.value,
        "files": len(files),
        "loop_files": len(looped),
        "loop_seconds": [round(taken.wall_seconds, 2) for taken in loop],
        "loop_cpu_seconds": [round(taken.cpu_seconds, 2) for taken in loop],
        "loop_seconds_a_file": round(a_file, 3),
        "loop_cpu_seconds_a_file": round(statistics.mean(taken.cpu_seconds for taken in loop), 3),
        "loop_peak_rss_mib": round(max(taken.peak_rss_mib for taken in loop), 1),
        "batch_seconds": round(batch.wall_seconds, 3),
        "batch_seconds_a_file": round(batch.wall_seconds / len(files), 3),
        "batch_cpu_seconds_a_file": round(batch.cpu_seconds / len(files), 3),
        "batch_peak_rss_mib": round(batch.peak_rss_mib, 1),
        "memory_gib": _MEMORY.value,
        "speedup": round(a_file * len(files) / batch.wall_seconds, 2),
        "again_seconds": round(again.wall_seconds, 3),
        "exit_codes": [*(taken.exit_code for taken in loop), batch.exit_code, again.exit_code],
        "load_before": [round(taken.load_before, 1) for taken in (*loop, batch)],
    }
    given = [f"--zoo={_ZOO.value}", f"--files={_FILES.value}", f"--loop_files={_LOOP_FILES.value}"]
    about: dict[str, Any] = {
        "what": first_paragraph(__doc__),
        "date": today(),
        "command": shlex.join(["python", "benchmarks/batch.py", *given, f"--precision={_PRECISION.value}"]),
        "hardware": hardware(),
        "versions": versions(),
        "load_average": max(found["load_before"]),
    }
    output = pathlib.Path(_OUTPUT.value or RESULTS / f"batch-{today()}.json")
    earlier = json.loads(output.read_text()) if output.exists() else {"rows": [], "load_average": 0.0}
    kept = [row for row in earlier["rows"] if row["zoo"] != found["zoo"]]
    about["rows"] = [*kept, found]
    if kept:  # the commands of all rows, and the busiest moment of any
        commands = [each for each in earlier["command"].split("; ") if f"--zoo={_ZOO.value}" not in each]
        about["command"] = "; ".join([*commands, about["command"]])
        about["load_average"] = max(about["load_average"], earlier["load_average"])
    output.write_text(json.dumps(about, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    return int(any(found["exit_codes"]))


if __name__ == "__main__":
    app.run(main)
