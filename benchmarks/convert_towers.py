"""Both towers of a SigLIP to checked ONNX: ours by one command, and the plain recipe of each tower, each run in a fresh
process, in turn.

Ours converts, checks each tower block by block on two inputs and compares their similarities; the plain recipe ends
with an ONNX file that it has compared with its own model on two inputs.

    python benchmarks/convert_towers.py --workdir=/tmp/bench --variant=SigLIP-So400m/14 --image_size=384
"""

import dataclasses
import json
import pathlib
import subprocess
import sys

from absl import app, flags
from process import run
from results import RESULTS, ROOT, Results, first_paragraph, today

_FLAGS = flags.FLAGS
_BENCHMARKS = pathlib.Path(__file__).parent
OURS = {
    "vit_convert": (),
    "vit_convert, check.consistency=False": ("--config.check.consistency=False",),
    "vit_convert, --until=export": ("--until=export",),
}
SIDES = (*OURS, "plain", "plain, parameters as arguments")


def main(argv: list[str]) -> None:
    """Measures everything that the result file does not hold yet."""
    workdir = pathlib.Path(_FLAGS.workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    results = Results(_FLAGS.output or RESULTS / f"towers-{today()}.json", first_paragraph(__doc__))
    checkpoint = _checkpoint(workdir)
    for repeat in range(_FLAGS.repeats):
        for side in _FLAGS.side or SIDES:
            for tower in ("both",) if side in OURS else ("image", "text"):
                _measure(results, workdir, checkpoint, side=side, tower=tower, repeat=repeat)


def _checkpoint(workdir: pathlib.Path) -> pathlib.Path:
    path = workdir / f"{_FLAGS.variant.replace('/', '')}-{_FLAGS.image_size}.npz"
    if not path.exists():
        options = [f"--variant={_FLAGS.variant}", f"--image_size={_FLAGS.image_size}", f"--length={_FLAGS.length}"]
        command = [sys.executable, "-m", "vit_convert.families.random", *options, f"--output={path}"]
        subprocess.run(command, check=True, cwd=ROOT)
    return path


def _measure(
    results: Results, workdir: pathlib.Path, checkpoint: pathlib.Path, *, side: str, tower: str, repeat: int
) -> None:
    run_of = {"variant": _FLAGS.variant, "side": side, "tower": tower, "repeat": repeat}
    if results.has(**run_of):
        return
    folder = workdir / "run"
    subprocess.run(["rm", "-rf", str(folder)], check=True)
    folder.mkdir()
    _read(checkpoint)  # into the system's cache, so that nobody pays for the disk
    command = [*_ours(checkpoint, folder), *OURS[side]] if side in OURS else _plain(checkpoint, folder, side, tower)
    taken = run(command, cwd=ROOT, errors=workdir / "errors.txt")
    found = {"error": _last_line(workdir / "errors.txt")} if taken.exit_code else {}
    steps = _stages(folder) if side in OURS else _said(taken.output) if not taken.exit_code else {}
    values = {name: value for name, value in dataclasses.asdict(taken).items() if name != "output"}
    results.add(**run_of, steps=steps, checkpoint_bytes=checkpoint.stat().st_size, **found, **values)
    print(run_of, values, found, flush=True)


def _ours(checkpoint: pathlib.Path, folder: pathlib.Path) -> list[str]:
    config = folder / "towers.py"
    config.write_text(
        "from vit_convert.config import default_config\n\n\ndef get_config():\n    return default_config()\n"
    )
    keys = [f"checkpoint={checkpoint}", "engine.backend=none", "precision=fp32", "check.num_images=2"]
    flags = ["--nopage", f"--config={config}", *(f"--config.{key}" for key in keys), f"--workdir={folder}", "--quiet"]
    return [sys.executable, "-m", "vit_convert", *flags]


def _plain(checkpoint: pathlib.Path, folder: pathlib.Path, side: str, tower: str) -> list[str]:
    """Runs under a limit, because a process that needs more memory than the machine has would harm others before it is
    stopped."""
    limit = [f"--as={int(_FLAGS.limit_gib * 2**30)}"] if _FLAGS.limit_gib else []
    size = _FLAGS.image_size if tower == "image" else _FLAGS.length
    script = [str(_BENCHMARKS / "plain_tower.py"), str(checkpoint), str(folder / f"{tower}.onnx"), tower, str(size)]
    arguments = ["--arguments"] if "arguments" in side else []
    return [*(["prlimit", *limit] if limit else []), sys.executable, *script, *arguments]


def _read(path: pathlib.Path) -> None:
    with open(path, "rb", buffering=0) as file:
        buffer = bytearray(1 << 24)
        while file.readinto(buffer):
            pass


def _said(output: str) -> dict[str, float]:
    return json.loads(output.splitlines()[-1])["steps"]


def _stages(folder: pathlib.Path) -> dict[str, dict[str, float]]:
    """Seconds of each stage, by tower, and of the pair's own."""
    found = {}
    for name, path in (("image", "towers/image"), ("text", "towers/text"), ("pair", "towers")):
        report = folder / path / "report.json"
        rows = json.loads(report.read_text())["stages"] if report.exists() else []
        found[name] = {row["name"]: row["seconds"] for row in rows}
    return found


def _last_line(path: pathlib.Path) -> str:
    lines = path.read_text().strip().splitlines()
    return lines[-1] if lines else "killed"


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Scratch folder; So400m/14 needs 9 GiB in it.", required=True)
    flags.DEFINE_string("variant", "SigLIP-So400m/14", "What to convert, with seeded random weights.")
    flags.DEFINE_integer("image_size", 384, "Pixels of a side.")
    flags.DEFINE_integer("length", 64, "Tokens of a text.")
    flags.DEFINE_integer("repeats", 1, "Rounds over the sides.", lower_bound=1)
    flags.DEFINE_float("limit_gib", 20.0, "Address space of the plain recipe; 0 for no limit.")
    flags.DEFINE_multi_string("side", [], f"A side to run, repeatable: {'; '.join(SIDES)}; all by default.")
    flags.DEFINE_string("output", "", "Result file; by default benchmarks/results/towers-<date>.json.")
    app.run(main)
