"""Side by side on one GPU: our TensorRT engines, JAX, and torch.compile, for one model after the other.

    python benchmarks/gpu/h200.py --trt_python=/opt/trt/python --workdir=/tmp/h200 --output=benchmarks/results/h200-fp16.json

This Python has JAX, Flax, jax2onnx, onnxruntime, PyTorch and timm; `--trt_python` has tensorrt, numpy, absl-py and ml_collections.
Each step is a process of its own: a random checkpoint, the export with its check, build, verify and benchmark of the engines, JAX,
torch. Steps that are done are not done again, a step that fails is recorded and the others go on, and no step starts after
`--stop_after` seconds, so that the same command can be given until it says that all is done.
"""

import dataclasses
import datetime
import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from absl import app, flags
from side_by_side import table

_FOLDER = pathlib.Path(__file__).parent
_ROOT = _FOLDER.parent.parent
_MODELS = flags.DEFINE_list("models", ["Ti/16", "B/32", "B/16", "L/16", "H/14", "B/16@384"], "Variant, with @size where it is not 224.")
_BATCHES = flags.DEFINE_list("batches", ["1", "64", "256"], "Images per run; each gets a fixed profile.")
_PRECISIONS = flags.DEFINE_list("precisions", ["fp32", "fp16"], "Engines to build; the first one is verified most strictly.")
_TIMED = flags.DEFINE_list("timed", ["fp16"], "Engines to measure.")
_SPELLING = flags.DEFINE_string("target", "trt8", "Dialect of the graphs.")
_TRT_PYTHON = flags.DEFINE_string("trt_python", sys.executable, "The Python that has tensorrt.")
_WORKDIR = flags.DEFINE_string("workdir", "/tmp/h200", "Checkpoints, bundles and the peers' results.")
_OUTPUT = flags.DEFINE_string("output", None, "The JSON file, written after every step.", required=True)
_SECONDS = flags.DEFINE_float("seconds", 2.0, "Of one pass over one row.")
_STOP_AFTER = flags.DEFINE_float("stop_after", 540.0, "Seconds after which no further step starts.")
_STEP_LIMIT = flags.DEFINE_float("step_limit", 560.0, "Seconds after which a step is ended.")
_STEPS = flags.DEFINE_list("steps", ["checkpoint", "export", "build", "verify", "benchmark", "jax", "torch"], "Which steps.")

_CONFIG = """from vit_convert.config import default_config


def get_config():
    return default_config()
"""


@dataclasses.dataclass(frozen=True)
class Model:
    """One row group of the table.

    Attributes:
        variant: "B/16".
        image_size: height and width in pixels.
    """

    variant: str
    image_size: int

    @property
    def name(self) -> str:
        """As folders and files are called: "b16-384"."""
        return f"{self.variant.replace('/', '').lower()}-{self.image_size}"


def parse_model(text: str) -> Model:
    """Reads "B/16" or "B/16@384"."""
    variant, _, size = text.partition("@")
    return Model(variant, int(size or 224))


def commands(model: Model, workdir: pathlib.Path) -> dict[str, list[str]]:
    """The command of each step of a model.

    Args:
        model: what to measure.
        workdir: where its files lie.

    Returns:
        By step, in order.
    """
    here, trt = sys.executable, _TRT_PYTHON.value
    checkpoint, bundle = workdir / f"{model.name}.npz", workdir / model.name
    batches, largest = ",".join(_BATCHES.value), max(int(word) for word in _BATCHES.value)
    fixed = [f"--config.batch.{key}={largest}" for key in ("min", "opt", "max")]  # no range beside the fixed profiles
    profiles = [*fixed, f"--config.batch.profiles=({', '.join(_BATCHES.value)},)"]
    engine = [trt, "-m", "vit_convert.engine"]
    peer = [f"--batches={batches}", f"--seconds={_SECONDS.value}", f"--image_size={model.image_size}"]
    config = workdir / "config.py"
    config.write_text(_CONFIG)
    asked = [f"--config.checkpoint={checkpoint}", f"--config.name={model.name}", f"--config.image_size={model.image_size}"]
    graph = [f"--config.target={_SPELLING.value}", "--config.engine.backend=none", "--config.check.num_images=2", "--until=check"]
    return {
        "checkpoint": [here, "-m", "vit_convert.checkpoint.random", f"--variant={model.variant}", f"--output={checkpoint}"],
        "export": [here, "-m", "vit_convert", f"--config={config}", *asked, *graph, f"--workdir={workdir}"],
        "build": [*engine, "build", str(bundle), f"--precision={','.join(_PRECISIONS.value)}", *profiles],
        "verify": [*engine, "verify", str(bundle), f"--precision={','.join(_PRECISIONS.value)}"],
        "benchmark": [
            *engine,
            "benchmark",
            str(bundle),
            f"--precision={','.join(_TIMED.value)}",
            f"--batches={batches}",
            "--streams=1,2",
            f"--duration={_SECONDS.value}",
        ],
        "jax": [here, str(_FOLDER / "jax_peer.py"), f"--checkpoint={checkpoint}", *peer, f"--output={workdir / model.name}.jax.json"],
        "torch": [here, str(_FOLDER / "torch_peer.py"), f"--variant={model.variant}", *peer, f"--output={workdir / model.name}.torch.json"],
    }


def run_step(command: Sequence[str], limit_s: float) -> dict[str, Any]:
    """Runs one step as a process group of its own, so that ending it ends what it started.

    Args:
        command: its words.
        limit_s: seconds after which it is ended.

    Returns:
        {"command", "status": "done" or "failed", "seconds", "tail": the last lines it wrote}.
    """
    started = time.monotonic()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(_ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True, cwd=_ROOT
    )
    try:
        text, _ = process.communicate(timeout=limit_s)
        status = "done" if process.returncode == 0 else "failed"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        text, _ = process.communicate()
        text, status = f"{text}\nended after {limit_s:.0f} s", "failed"
    lines = text.strip().splitlines()[-25:]
    return {"command": shlex.join(command), "status": status, "seconds": round(time.monotonic() - started, 1), "tail": lines}


def collect(model: Model, workdir: pathlib.Path) -> dict[str, Any]:
    """Reads what the steps of a model left.

    Args:
        model: what was measured.
        workdir: where its files lie.

    Returns:
        {"engine": benchmark.json, "verify", "engines" and "check" of report.json, "jax", "torch"}, those that are there.
    """

    def read(path: pathlib.Path) -> Any:
        return json.loads(path.read_text()) if path.exists() else None

    report = read(workdir / model.name / "report.json") or {}
    found = {
        "engine": read(workdir / model.name / "benchmark.json"),
        "verify": report.get("verify"),
        "engines": report.get("engines"),
        "check": report.get("check"),
        "jax": read(workdir / f"{model.name}.jax.json"),
        "torch": read(workdir / f"{model.name}.torch.json"),
    }
    return {key: value for key, value in found.items() if value}


def main(argv: Sequence[str]) -> None:
    started = time.monotonic()
    workdir, output = pathlib.Path(_WORKDIR.value), pathlib.Path(_OUTPUT.value)
    workdir.mkdir(parents=True, exist_ok=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    state_path = workdir / "steps.json"
    steps: dict[str, dict[str, Any]] = json.loads(state_path.read_text()) if state_path.exists() else {}
    models = [parse_model(text) for text in _MODELS.value]
    left = 0
    for model in models:
        for name, command in commands(model, workdir).items():
            key = f"{model.name}/{name}"
            known = steps.get(key, {})
            if name not in _STEPS.value or (known.get("status") == "done" and known["command"] == shlex.join(command)):
                continue
            spent = time.monotonic() - started
            if spent > _STOP_AFTER.value:
                left += 1
                continue
            print(f"[{spent:5.0f} s] {key}", flush=True)
            steps[key] = run_step(command, max(10.0, _STEP_LIMIT.value - spent))
            print(
                "\n".join(f"    {line}" for line in steps[key]["tail"][-8:]),
                f"    {steps[key]['status']} in {steps[key]['seconds']} s",
                sep="\n",
            )
            state_path.write_text(json.dumps(steps, indent=1))
            results = {candidate.name: {**dataclasses.asdict(candidate), **collect(candidate, workdir)} for candidate in models}
            output.write_text(
                json.dumps(
                    {
                        "command": shlex.join(argv),
                        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
                        "models": results,
                        "steps": {step: {k: v for k, v in row.items() if k != "tail"} for step, row in steps.items()},
                    },
                    indent=1,
                )
                + "\n"
            )
    if output.exists():
        print(table(json.loads(output.read_text())))
    print(f"{left} steps are left: give the same command again" if left else "all steps were tried")


if __name__ == "__main__":
    app.run(main)
