"""Side by side on one GPU: our TensorRT engines, JAX, and torch.compile, for one model after the other.

    python benchmarks/gpu/h200.py --trt_python=/opt/trt/python --workdir=/tmp/h200
    --output=benchmarks/results/h200-fp16.json

This Python (3.11 or later) has vit_convert, JAX, Flax, jax2onnx, onnxruntime, PyTorch and timm; `--trt_python` has
tensorrt, numpy, absl-py and ml_collections. Each step is a process of its own. Those of the first phase run side by
side, in lanes: random checkpoints, exports with their check, engines, and what JAX and PyTorch compile, kept in caches.
Then, with nothing else running on that GPU, each
model is verified and measured: our engines, JAX, torch. Compilers of all three time kernels while the others' run
(`started` and `seconds` of the steps tell).

With several `--gpus` the models take turns on them, each with all its tools on one GPU; every GPU has phases and lanes
of its own.

Finished steps are not repeated, unless their own command changed or a step on which they depend has run since. A step
that fails is recorded while the others continue, and no step starts that would not end before `--step_limit` seconds,
so the same command can be repeated until it says that everything is done.
"""

import dataclasses
import os
import pathlib
import shlex
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from absl import app, flags
from side_by_side import VERSIONS, table
from steps import FAILED, LEFT, Runner, State, Step, is_done

from vit_convert.core.bundle import read_json, write_json

_FOLDER = pathlib.Path(__file__).resolve().parent
_ROOT = _FOLDER.parent.parent
_PREPARED = {"checkpoint": 1, "export": 2, "build": 1, "jax_compile": 1, "torch_compile": 2}  # how many at a time
_MEASURED = ("verify", "benchmark", "jax", "torch")
_MODELS = flags.DEFINE_list(
    "models",
    ["Ti/16", "B/32", "B/16", "L/16", "H/14", "B/16@384"],
    "Variant (B/16, Mixer-B/16, R26+ViT-S/32, Swin-T/7, CLIP-B/32:img, SigLIP-B/16:txt); @size if it is not 224.",
)
_BATCHES = flags.DEFINE_list("batches", ["1", "64", "256"], "Images per run; each gets a fixed profile.")
_PRECISIONS = flags.DEFINE_list("precisions", ["fp16"], "Engines to build, verify and measure.")
_TARGET = flags.DEFINE_string("target", "trt8", "Dialect of the graphs.")
_GPUS = flags.DEFINE_list(
    "gpus", [""], "GPUs on which the models take turns, as in CUDA_VISIBLE_DEVICES; each model stays on one."
)
_LOWERING = flags.DEFINE_string("lowering", "auto", "Lowering from which fp16 engines are built; empty: model.onnx.")
_INT8_LOWERING = flags.DEFINE_string(
    "int8_lowering", "fused", "Lowering from which int8 engines are built; empty: the Q/DQ graph."
)
_INPUT = flags.DEFINE_enum(
    "input", "float32", ["float32", "uint8"], "What our engines take; uint8 is normalised inside."
)
_TRT_PYTHON = flags.DEFINE_string("trt_python", sys.executable, "The Python that has tensorrt.")
_WORKDIR = flags.DEFINE_string("workdir", "/tmp/h200", "Checkpoints, bundles, caches, logs and the peers' results.")
_OUTPUT = flags.DEFINE_string("output", None, "The JSON file, written after every step.", required=True)
_SECONDS = flags.DEFINE_float("seconds", 1.0, "Seconds of one pass over one row.")
_WARMUP = flags.DEFINE_float("warmup", 0.3, "Seconds before a row is measured.")
_STOP_AFTER = flags.DEFINE_float("stop_after", 540.0, "Seconds after which no further step starts.")
_STEP_LIMIT = flags.DEFINE_float("step_limit", 560.0, "Seconds after which running steps are ended.")
_PHASE = flags.DEFINE_enum("phase", "all", ["all", "prepare", "measure"], "Which phase.")
_DTYPES = flags.DEFINE_list("jax_dtypes", ["fp32", "bf16"], "What JAX computes in.")
_MODES = flags.DEFINE_list(
    "torch_modes", ["reduce-overhead"], "torch.compile modes; max-autotune compiles for minutes."
)
_STEPS = flags.DEFINE_list("steps", [*_PREPARED, *_MEASURED], "Which steps.")
_LANES = flags.DEFINE_list(
    "lanes",
    [f"{name}={count}" for name, count in _PREPARED.items()],
    "How many of a step to prepare concurrently on a GPU.",
)
_ENVIRONMENT = ("gpu", "driver", "cuda", *VERSIONS)
_CALIBRATED = 16  # images
_CONFIG = "from vit_convert.core.config import default_config as get_config\n"


@dataclasses.dataclass(frozen=True)
class Model:
    """One row group of the table.

    Attributes:
        variant: "B/16"; of a tower with the part that it is: "CLIP-B/32:img".
        image_size: height and width in pixels.
        input: what our engine takes, "float32" or "uint8".
    """

    variant: str
    image_size: int
    input: str

    @classmethod
    def parse(cls, text: str, input: str) -> "Model":
        """Reads "B/16" or "B/16@384"."""
        variant, _, size = text.partition("@")
        return cls(variant, int(size or 224), input)

    @property
    def name(self) -> str:
        """Its name in folders and files: "b16-384"."""
        return f"{self.variant.replace('/', '').replace('+', '-').replace(':', '-').lower()}-{self.image_size}"

    @property
    def part(self) -> str:
        """What follows the checkpoint's path: ":img" or ":txt" of a tower."""
        return f":{self.variant.partition(':')[2]}" if ":" in self.variant else ""

    @property
    def suffix(self) -> str:
        """Of its checkpoint: a Swin's and a CLIP's are in PyTorch's format."""
        return ".safetensors" if self.variant.startswith(("Swin", "CLIP")) else ".npz"


def commands(model: Model, workdir: pathlib.Path) -> dict[str, list[str]]:
    """The command of each step of a model.

    Args:
        model: what to measure.
        workdir: where its files lie.

    Returns:
        By name of the step, in order.
    """
    here, bundle = sys.executable, str(workdir / model.name)
    checkpoint, batches, precisions = (
        f"{bundle}{model.suffix}",
        ",".join(_BATCHES.value),
        f"--precision={','.join(_PRECISIONS.value)}",
    )
    whole, sized = model.variant.partition(":")[0], model.part != ":txt"
    stored = [
        f"--variant={whole}",
        f"--output={checkpoint}",
        *([f"--image_size={model.image_size}"] if model.part else []),
    ]
    stored += ["--layout=clip_openai"] if whole.startswith("CLIP") else []  # one file, which says all that is needed
    largest = max(int(word) for word in _BATCHES.value)
    fixed = [f"--config.batch.{key}={largest}" for key in ("min", "opt", "max")]  # no range besides the fixed profiles
    profiles = [*fixed, f"--config.batch.profiles=({', '.join(_BATCHES.value)},)"]
    engine = [_TRT_PYTHON.value, "-m", "vit_convert.engine"]
    peer = [f"--batches={batches}", f"--image_size={model.image_size}"]
    timing = [f"--seconds={_SECONDS.value}", f"--warmup={_WARMUP.value}"]
    ours = [f"--batches={batches}", "--streams=1,2", f"--duration={_SECONDS.value}", f"--warmup={_WARMUP.value}"]
    jax = [
        here,
        str(_FOLDER / "jax_peer.py"),
        f"--checkpoint={checkpoint}{model.part}",
        f"--dtypes={','.join(_DTYPES.value)}",
        *peer,
    ]
    torch = [
        here,
        str(_FOLDER / "torch_peer.py"),
        f"--variant={model.variant}",
        f"--modes={','.join(_MODES.value)}",
        *peer,
    ]
    asked = [
        f"--config.checkpoint={checkpoint}{model.part}",
        f"--config.name={model.name}",
        *([f"--config.image_size={model.image_size}"] if sized else []),
    ]
    graph = [
        f"--config.target={_TARGET.value}",
        f"--config.engine.lowering={_LOWERING.value}",
        f"--config.input={model.input}",
        f"--config.precision={','.join(_PRECISIONS.value)}",
        "--config.engine.backend=none",
        "--config.check.num_images=2",
    ]
    quantized = [
        f"--config.engine.int8_lowering={_INT8_LOWERING.value}",
        f"--config.calibration.num_images={_CALIBRATED}",
    ]
    last = "calibrate" if _INT8_LOWERING.value else "quantize"  # by noise: INT8's speed, and no accuracy
    graph += [*quantized, f"--until={last}"] if "int8" in _PRECISIONS.value else ["--until=check"]
    return {
        "checkpoint": [
            here,
            "-m",
            "vit_convert.families.random",
            *stored,
        ],
        "export": [
            here,
            "-m",
            "vit_convert",
            f"--config={workdir / 'config.py'}",
            *asked,
            *graph,
            f"--workdir={workdir}",
        ],
        "build": [*engine, "build", bundle, precisions, *profiles],
        "jax_compile": [*jax, "--compile_only", f"--output={bundle}.jax_compile.json"],
        "torch_compile": [*torch, "--compile_only", f"--output={bundle}.torch_compile.json"],
        "verify": [*engine, "verify", bundle, precisions],
        "benchmark": [*engine, "benchmark", bundle, precisions, *ours],
        "jax": [*jax, *timing, f"--output={bundle}.jax.json"],
        "torch": [*torch, *timing, f"--output={bundle}.torch.json"],
    }


_AFTER = {"export": "checkpoint", "build": "export", "jax_compile": "checkpoint"}
_AFTER |= {"verify": "build", "benchmark": "build", "jax": "jax_compile", "torch": "torch_compile"}


def steps_of(model: Model, workdir: pathlib.Path, gpu: str = "") -> list[Step]:
    """The steps of a model that are asked for, in order; the lanes are called after them, those measured "measure",
    with the GPU's name.

    Args:
        model: what to measure.
        workdir: where its files lie.
        gpu: that it runs on; empty: the first.
    """
    caches = workdir / "caches" / model.name  # each model its own: no two processes write one entry
    shared = {
        "PYTHONPATH": os.pathsep.join(word for word in (str(_ROOT), os.environ.get("PYTHONPATH", "")) if word),
        "PYTHONUNBUFFERED": "1",  # the output of a step that is ended is in its log
        # otherwise the first JAX process takes three quarters of the GPU's memory
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "JAX_COMPILATION_CACHE_DIR": str(caches / "jax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "torch"),
    }
    shared |= {"CUDA_VISIBLE_DEVICES": gpu} if gpu else {}
    # two reference images are no work, and kernels are being timed on the GPU
    own = {"export": {"JAX_PLATFORMS": "cpu"}}
    return [
        Step(
            key=f"{model.name}/{name}",
            command=command,
            lane=f"{name if name in _PREPARED else 'measure'}{gpu}",
            after=[f"{model.name}/{_AFTER[name]}"] if name in _AFTER else [],
            environment={**shared, **own.get(name, {})},
        )
        for name, command in commands(model, workdir).items()
        if name in _STEPS.value
    ]


def in_phases(steps: Sequence[Step], phase: str) -> list[Step]:
    """What is prepared, then what is measured, each of these behind all that is prepared on its GPU.

    Args:
        steps: of all models.
        phase: "prepare" or "measure" leaves the other out, "all" neither.
    """
    prepared = [step for step in steps if step.name in _PREPARED and phase != "measure"]
    measured = [step for step in steps if step.name not in _PREPARED and phase != "prepare"]
    gpus = {step.key: step.environment.get("CUDA_VISIBLE_DEVICES", "") for step in steps}
    behind = {gpu: [step.key for step in prepared if gpus[step.key] == gpu] for gpu in gpus.values()}
    return [*prepared, *(dataclasses.replace(step, behind=behind[gpus[step.key]]) for step in measured)]


def up_to_date(model: Model, workdir: pathlib.Path, state: State) -> set[str]:
    """The steps of a model that are done, by these flags where they are asked for, from what the steps before them made
    last.

    Args:
        model: what was measured.
        workdir: where its files lie.
        state: of the steps.
    """
    found: set[str] = set()
    for name, command in commands(model, workdir).items():
        key, before = f"{model.name}/{name}", [_AFTER[name]] if name in _AFTER else []
        done = is_done(state, key, [f"{model.name}/{word}" for word in before])
        outdated = [word for word in before if f"{model.name}/{word}" in state and word not in found]
        if done and not outdated and (name not in _STEPS.value or state[key]["command"] == shlex.join(command)):
            found.add(name)
    return found


def collect(model: Model, workdir: pathlib.Path, state: State) -> dict[str, Any]:
    """Reads what the steps of a model left; of our engines nothing that a later export or build has overtaken.

    Args:
        model: what was measured.
        workdir: where its files lie.
        state: of the steps.

    Returns:
        {"engine": benchmark.json, "verify", "engines" and "check" of report.json, "jax", "torch"}, those that are
        there. The peers' files are given as far as they have come: they say for themselves what each row was measured
        with.
    """
    report = read_json(workdir / model.name / "report.json") or {}
    ours = {"engine": "benchmark", "verify": "verify", "engines": "build", "check": "export"}
    parts = {**report, "engine": read_json(workdir / model.name / "benchmark.json")}
    done = up_to_date(model, workdir, state)
    found = {
        **{key: parts.get(key) for key, name in ours.items() if name in done},
        **{key: read_json(workdir / f"{model.name}.{key}.json") for key in ("jax", "torch")},
    }
    return {key: value for key, value in found.items() if value}


def results(models: Sequence[Model], workdir: pathlib.Path, state: State) -> dict[str, Any]:
    """All results so far.

    Args:
        models: those asked for.
        workdir: where their files lie.
        state: of the steps.

    Returns:
        {"command", "date" of the last step, "environment": GPU and versions, "models": by name, see `collect`,
        "steps"}.
    """
    found: Mapping[str, Any] = {
        model.name: {**dataclasses.asdict(model), **collect(model, workdir, state)} for model in models
    }
    parts = [model[part] for model in found.values() for part in ("engine", "jax", "torch") if part in model]
    return {
        "command": shlex.join(sys.argv),
        "date": max((row["started"] for row in state.values()), default=""),
        "environment": {key: part[key] for part in parts for key in _ENVIRONMENT if key in part},
        "models": found,
        "steps": {key: {name: value for name, value in row.items() if name != "tail"} for key, row in state.items()},
    }


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    lanes = {name: int(count) for name, _, count in (word.partition("=") for word in _LANES.value)}
    if unknown := ({*_STEPS.value} - {*_PREPARED, *_MEASURED}) | ({*lanes} - {*_PREPARED}):
        raise app.UsageError(
            f"{', '.join(sorted(unknown))}: steps are {', '.join([*_PREPARED, *_MEASURED])}; lanes are "
            f"{', '.join(_PREPARED)}"
        )
    workdir, output = pathlib.Path(_WORKDIR.value).resolve(), pathlib.Path(_OUTPUT.value)
    models = [Model.parse(text, _INPUT.value) for text in _MODELS.value]
    for folder in (workdir, output.parent):
        folder.mkdir(parents=True, exist_ok=True)
    (workdir / "config.py").write_text(_CONFIG)

    def save(state: State) -> None:
        write_json(output, results(models, workdir, state))

    runner = Runner(workdir, stop_after=_STOP_AFTER.value, limit=_STEP_LIMIT.value, changed=save)
    # an exception, so that the steps are ended
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    gpus = [_GPUS.value[i % len(_GPUS.value)] for i in range(len(models))]
    steps = [step for model, gpu in zip(models, gpus) for step in steps_of(model, workdir, gpu)]
    runner.run(
        in_phases(steps, _PHASE.value),
        {f"{name}{gpu}": count for name, count in {**_PREPARED, **lanes, "measure": 1}.items() for gpu in gpus},
    )
    save(runner.state)
    print(table(results(models, workdir, runner.state)))
    left = runner.count(LEFT)
    print(
        f"{runner.count(FAILED)} steps failed;",
        f"{left} steps are left: give the same command again" if left else "all steps were tried",
    )


if __name__ == "__main__":
    app.run(main)
