"""Bundles built, verified and measured by a task on each of two GPUs at a time, beside one task at a time.

    python benchmarks/gpu/two_gpus.py --trt_python=/opt/trt/python --gpus=0,1 --workdir=/tmp/two --output=two.json

Converts the bundles first, side by side. Then `python -m vit_convert.batch --engines=build,verify,benchmark` does the
rest, once on all GPUs and once on the first of them, each time on fresh copies of the bundles, so that both build every
engine. What a run found is written as soon as it ends; --runs gives one of them alone, into the same file.
"""

import json
import pathlib
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from typing import Any

from absl import app, flags

from vit_convert.families.random import write_random_checkpoint

_TRT_PYTHON = flags.DEFINE_string("trt_python", sys.executable, "The Python that has tensorrt.")
_GPUS = flags.DEFINE_list("gpus", ["0", "1"], "The GPUs, as CUDA_VISIBLE_DEVICES names them.")
_WORKDIR = flags.DEFINE_string("workdir", "/tmp/two_gpus", "Checkpoints and bundles.")
_OUTPUT = flags.DEFINE_string("output", None, "The JSON file.", required=True)
_BUNDLES = flags.DEFINE_integer("bundles", 12, "How many.")
_VARIANT = flags.DEFINE_string("variant", "Ti/16", "Of all of them; each has weights of its own.")
_TARGET = flags.DEFINE_string("target", "trt8", "Dialect of the graphs.")
_ENGINES = flags.DEFINE_list("engines", ["build", "verify", "benchmark"], "The engine commands to run.")
_ENGINE_FLAGS = flags.DEFINE_string(
    "engine_flags",
    "--config.engine.opt_level=1 --batches=1,64 --duration=0.3 --warmup=0.2 --noend_to_end",
    "For the tasks: a low level builds in seconds; how long a task takes is not what is asked here.",
)
_RUNS = flags.DEFINE_list("runs", ["all", "one"], "all: on all GPUs; one: on the first.")
_JOBS = flags.DEFINE_integer("jobs", 0, "Conversions at a time; 0: one a core.")
_ENVIRONMENT = ("gpu", "arch", "driver", "cuda", "cpu", "cores", "backend", "tensorrt", "vit_convert", "date")


def batch(workdir: pathlib.Path, *words: str) -> tuple[int, float]:
    """Runs a batch over all bundles; its exit code and seconds."""
    zoo = pathlib.Path(_WORKDIR.value) / "zoo"
    config = [f"--config.target={_TARGET.value}", "--config.precision=fp16", "--config.engine.backend=none"]
    command = [sys.executable, "-m", "vit_convert.batch", f"--checkpoints={zoo}/*.npz", *config]
    started = time.monotonic()
    done = subprocess.run([*command, f"--workdir={workdir}", "--quiet", *words], check=False)
    return done.returncode, time.monotonic() - started


def convert(folder: pathlib.Path) -> float:
    """Makes the bundles, all but their engines; returns the seconds."""
    (folder / "zoo").mkdir(parents=True, exist_ok=True)
    for seed in range(_BUNDLES.value):
        path = folder / "zoo" / f"{_VARIANT.value.replace('/', '').lower()}-{seed:02d}.npz"
        if not path.exists():
            write_random_checkpoint(path, _VARIANT.value, seed=seed)
    code, seconds = batch(folder / "bundles", f"--jobs={_JOBS.value}")
    if code:
        raise SystemExit(f"the conversions ended with {code}: {folder / 'bundles' / 'batch.json'}")
    return seconds


def run(folder: pathlib.Path, name: str, gpus: list[str]) -> dict[str, Any]:
    """Runs the tasks of all bundles on some GPUs; a row of the result."""
    workdir = folder / name
    shutil.rmtree(workdir, ignore_errors=True)
    shutil.copytree(folder / "bundles", workdir)
    words = [f"--engines={','.join(_ENGINES.value)}", f"--gpus={','.join(gpus)}", f"--trt_python={_TRT_PYTHON.value}"]
    code, seconds = batch(workdir, *words, f"--engine_flags={_ENGINE_FLAGS.value}")
    jobs = json.loads((workdir / "batch.json").read_text())["jobs"]
    tasks = [{"name": job["name"], **task} for job in jobs for task in job["engines"]]
    speeds = [task["images_per_second"] for task in tasks if task["images_per_second"]]
    kept = ("name", "device", "status", "seconds", "images_per_second", "recommended", "error")
    return {
        "run": name,
        "gpus": gpus,
        "exit_code": code,
        "seconds": round(seconds, 1),
        "task_seconds": round(sum(task["seconds"] for task in tasks), 1),
        "done": sum(task["status"] == "done" for task in tasks),
        "by_device": {gpu: sum(task["device"] == gpu for task in tasks) for gpu in gpus},
        "median_images_per_second": round(statistics.median(speeds), 1) if speeds else None,
        "passed": [passed(workdir / job["name"]) for job in jobs].count(True),
        "tasks": [{key: task[key] for key in kept} for task in tasks],
    }


def passed(bundle: pathlib.Path) -> bool:
    """Whether a bundle's engines were verified."""
    return bool((json.loads((bundle / "report.json").read_text()).get("verify") or {}).get("passed"))


def environment(workdir: pathlib.Path) -> dict[str, Any]:
    """Where it was measured, as the benchmarks of the bundles have it."""
    found = next(iter(sorted(workdir.glob("*/benchmark.json"))), None)
    record = json.loads(found.read_text()) if found else {}
    return {key: record.get(key) for key in _ENVIRONMENT}


def main(argv: list[str]) -> int:
    """Runs what is requested, and writes the result; returns 1 if a task failed."""
    folder, output = pathlib.Path(_WORKDIR.value), pathlib.Path(_OUTPUT.value)
    converted = convert(folder)
    print(f"{_BUNDLES.value} bundles converted in {converted:.0f} s", flush=True)
    rows = {row["run"]: row for row in (json.loads(output.read_text())["rows"] if output.exists() else [])}
    for name in _RUNS.value:
        rows[name] = run(folder, name, _GPUS.value if name == "all" else _GPUS.value[:1])
        print({key: value for key, value in rows[name].items() if key != "tasks"}, flush=True)
        record = {
            "what": (__doc__ or "").split("\n\n")[0],
            "command": shlex.join(["python", "benchmarks/gpu/two_gpus.py", *sys.argv[1:]]),
            "engine_flags": _ENGINE_FLAGS.value,
            "variant": _VARIANT.value,
            **environment(folder / name),
            "convert_seconds": round(converted, 1),
            "speedup": round(rows["one"]["seconds"] / rows["all"]["seconds"], 2) if len(rows) == 2 else None,
            "rows": list(rows.values()),
        }
        output.write_text(json.dumps(record, indent=1) + "\n")
    return int(any(row["exit_code"] for row in rows.values()))


if __name__ == "__main__":
    app.run(main)
