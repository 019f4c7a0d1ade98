"""Checkpoint to checked ONNX: ours and the peers side by side, each run in a fresh process, in turn.

Every side loads the same .npz and ends with an ONNX file on disk that it has compared with its own model on two images;
afterwards all files are judged in the same way: onnxruntime on two seeded images against the published Linen definition
in JAX at highest precision.

    python benchmarks/convert.py --workdir=/tmp/bench --variants=Ti/16,B/32,L/16,H/14 --repeats=3
"""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Sequence

from absl import app, flags
from process import Taken, run
from results import RESULTS, ROOT, Results, first_paragraph, today

_WORKDIR = flags.DEFINE_string("workdir", None, "Scratch folder; H/14 needs 15 GiB in it.", required=True)
_VARIANTS = flags.DEFINE_list(
    "variants", ["Ti/16", "S/16", "B/32", "L/16", "H/14"], "What to convert, with seeded random weights."
)
_REPEATS = flags.DEFINE_integer("repeats", 3, "Rounds over the sides.", lower_bound=1)
_SIDES_FLAG = flags.DEFINE_list("sides", [], "Sides to run; all by default.")
_EXTRAS = flags.DEFINE_bool("extras", True, "Also run export alone, reruns, start-up and H/14 with INT8.")
_OUTPUT = flags.DEFINE_string(
    "output", "", "Result file; by default benchmarks/results/convert-<date>.json, which is continued."
)

_BENCHMARKS = pathlib.Path(__file__).parent
_EXPORT_ALONE = "plain: load, export and save"
_CONFIG = "from vit_convert.core.config import default_config\n\n\ndef get_config():\n    return default_config()\n"
Command = Callable[[pathlib.Path, pathlib.Path], list[str]]


def _ours(checkpoint: pathlib.Path, folder: pathlib.Path, *more: str) -> list[str]:
    keys = [f"checkpoint={checkpoint}", "engine.backend=none", "precision=fp32", "check.num_images=2", "name=ours"]
    return _vit_convert(folder, *(f"--config.{key}" for key in keys), f"--workdir={folder}", "--quiet", *more)


def _vit_convert(folder: pathlib.Path, *arguments: str) -> list[str]:
    config = folder / "plain_defaults.py"
    config.write_text(_CONFIG)
    return [sys.executable, "-m", "vit_convert", "--nopage", f"--config={config}", *arguments]


def _peer(script: str, *more: str) -> Command:
    return lambda checkpoint, folder: [
        sys.executable,
        str(_BENCHMARKS / script),
        str(checkpoint),
        str(folder / f"{script}.onnx"),
        *more,
    ]


SIDES: dict[str, Command] = {
    "vit_convert": _ours,
    "plain": _peer("plain.py"),
    "plain, parameters as arguments": _peer("plain.py", "--arguments"),
    "timm + torch.onnx.export": _peer("timm_export.py"),
}


def _onnx_of(command: Sequence[str], folder: pathlib.Path) -> pathlib.Path:
    return folder / "ours" / "model.onnx" if "vit_convert" in command else pathlib.Path(command[3])


def main(argv: list[str]) -> None:
    """Measures everything that the result file does not hold yet."""
    workdir = pathlib.Path(_WORKDIR.value)
    workdir.mkdir(parents=True, exist_ok=True)
    results = Results(_OUTPUT.value or RESULTS / f"convert-{today()}.json", first_paragraph(__doc__))
    for variant in _VARIANTS.value:
        checkpoint = _checkpoint(workdir, variant)
        for repeat in range(_REPEATS.value):
            for side in _SIDES_FLAG.value or SIDES:
                _measure(results, workdir, checkpoint, variant=variant, side=side, repeat=repeat)
    if _EXTRAS.value:
        for repeat in range(_REPEATS.value):
            _extras(results, workdir, repeat)


def _checkpoint(workdir: pathlib.Path, variant: str) -> pathlib.Path:
    path = workdir / f"{variant.replace('/', '')}.npz"
    if not path.exists():
        subprocess.run(
            [sys.executable, "-m", "vit_convert.families.random", f"--variant={variant}", f"--output={path}"],
            check=True,
            cwd=ROOT,
        )
    _read(path)
    return path


def _read(path: pathlib.Path) -> None:
    """Brings a file into the system's cache, so that the first side does not pay for the disk."""
    with open(path, "rb", buffering=0) as file:
        buffer = bytearray(1 << 24)
        while file.readinto(buffer):
            pass


def _measure(
    results: Results, workdir: pathlib.Path, checkpoint: pathlib.Path, *, variant: str, side: str, repeat: int
) -> None:
    if results.has(variant=variant, side=side, repeat=repeat):
        return
    folder = _empty(workdir / "run")
    command = SIDES[side](checkpoint, folder)
    _read(checkpoint)
    taken = run(command, cwd=ROOT, errors=workdir / "errors.txt")
    found = (
        {"error": _last_line(workdir / "errors.txt")}
        if taken.exit_code
        else _describe(_onnx_of(command, folder), checkpoint, workdir)
    )
    steps = _stages(folder) if side == "vit_convert" else _steps(taken)
    _add(
        results,
        taken,
        variant=variant,
        side=side,
        repeat=repeat,
        steps=steps,
        checkpoint_bytes=checkpoint.stat().st_size,
        **found,
    )


def _extras(results: Results, workdir: pathlib.Path, repeat: int) -> None:
    """Export alone, compared with the plain recipe's, and what only ours has; "… changed" cases start from what the
    case before left."""
    cases: list[tuple[str, str, Command]] = [
        ("H/14", "--until=export", lambda checkpoint, folder: _ours(checkpoint, _empty(folder), "--until=export")),
        ("H/14", _EXPORT_ALONE, lambda checkpoint, folder: [*SIDES["plain"](checkpoint, _empty(folder)), "--no_check"]),
        ("H/14", "INT8 too", lambda checkpoint, folder: _int8(checkpoint, _empty(folder), 8)),
        ("H/14", "INT8 too, nothing changed", lambda checkpoint, folder: _int8(checkpoint, folder, 8)),
        ("B/32", "INT8 too", lambda checkpoint, folder: _int8(checkpoint, _empty(folder), 32)),
        ("B/32", "INT8 too, nothing changed", lambda checkpoint, folder: _int8(checkpoint, folder, 32)),
        (
            "B/32",
            "INT8 too, calibration method changed",
            lambda checkpoint, folder: _int8(checkpoint, folder, 32, "percentile"),
        ),
        ("", "--help", lambda checkpoint, folder: [sys.executable, "-m", "vit_convert", "--help"]),
        ("", "unknown config key", lambda checkpoint, folder: _vit_convert(folder, "--config.percision=fp16")),
    ]
    for variant, case, command in cases:
        side = "plain" if case == _EXPORT_ALONE else "vit_convert"
        if results.has(variant=variant, side=side, case=case, repeat=repeat):
            continue
        folder = workdir / "extras"
        folder.mkdir(exist_ok=True)
        checkpoint = _checkpoint(workdir, variant) if variant else workdir
        taken = run(command(checkpoint, folder), cwd=ROOT, errors=workdir / "errors.txt")
        expected = 2 if case == "unknown config key" else 0
        failed = {} if taken.exit_code == expected else {"error": _last_line(workdir / "errors.txt")}
        size = {"checkpoint_bytes": checkpoint.stat().st_size} if variant else {}
        _add(
            results,
            taken,
            variant=variant,
            side=side,
            case=case,
            repeat=repeat,
            steps=_steps(taken) if side == "plain" else _stages(folder) if variant else {},
            **size,
            **failed,
        )


def _int8(checkpoint: pathlib.Path, folder: pathlib.Path, images: int, method: str = "entropy") -> list[str]:
    keys = (
        "--config.precision=int8",
        f"--config.calibration.num_images={images}",
        f"--config.calibration.method={method}",
    )
    return _ours(checkpoint, folder, *keys)


def _empty(folder: pathlib.Path) -> pathlib.Path:
    subprocess.run(["rm", "-rf", str(folder)], check=True)
    folder.mkdir(parents=True)
    return folder


def _add(results: Results, taken: Taken, **run_of: object) -> None:
    values = {name: value for name, value in dataclasses.asdict(taken).items() if name != "output"}
    results.add(**run_of, **values)
    print(
        {name: run_of[name] for name in ("variant", "side", "case", "repeat", "max_abs", "error") if name in run_of},
        values,
        flush=True,
    )


def _steps(taken: Taken) -> dict[str, float]:
    """What a peer's last line says."""
    return json.loads(taken.output.splitlines()[-1])["steps"] if taken.exit_code == 0 else {}


def _stages(folder: pathlib.Path) -> dict[str, dict[str, float]]:
    report = folder / "ours" / "report.json"
    if not report.exists():
        return {}
    keys = ("status", "seconds", "peak_rss_mib")
    return {stage["name"]: {key: stage[key] for key in keys} for stage in json.loads(report.read_text())["stages"]}


def _last_line(path: pathlib.Path) -> str:
    lines = path.read_text().strip().splitlines()
    return lines[-1] if lines else "killed"


def _describe(path: pathlib.Path, checkpoint: pathlib.Path, workdir: pathlib.Path) -> dict[str, float]:
    """Nodes, bytes and error of a finished file, found in a process of its own."""
    taken = run(
        [sys.executable, str(_BENCHMARKS / "judge.py"), str(path), str(checkpoint)],
        cwd=ROOT,
        errors=workdir / "errors.txt",
    )
    if taken.exit_code:
        raise SystemExit(f"judge.py {path}: {_last_line(workdir / 'errors.txt')}")
    return json.loads(taken.output.splitlines()[-1])


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    app.run(main)
