"""INT8 of the trained ViT-S/14 by our kernels on a GPU: converted, built, verified and measured by the project's own
commands.

    python benchmarks/trained_int8_gpu.py --folder=FOLDER --trt_python=/opt/trt/python --workdir=/tmp/t
    --output=int8-gpu-trained.json

The folder is what checkpoints/make_dinov2.py made; `--trt_python` as for h200.py. "features" are judged by their cosine
on 24 crops of photographs, "logits" of the digits probe by their cosine on eight digits and top-1 on all of them.
"""

import os
import pathlib
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from absl import app, flags
from results import ROOT, Results, first_paragraph

from vit_convert.core.bundle import read_json
from vit_convert.engine.measure.benchmark import RESIDENT

_FOLDER = flags.DEFINE_string("folder", None, "What checkpoints/make_dinov2.py made.", required=True)
_TRT_PYTHON = flags.DEFINE_string("trt_python", sys.executable, "The Python that has tensorrt.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Bundles and logs.", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "The JSON file, continued if it is there.", required=True)
_CASES = flags.DEFINE_list("cases", ["features", "digits"], "Of CASES.")
_OPTIONS = flags.DEFINE_multi_string(
    "option", [], "Further options of the conversion, as --option=--config.calibration.max_error=0.001."
)
_CONVERT_ONLY = flags.DEFINE_bool(
    "convert_only", False, "Only convert; a later run without this flag continues with the bundles."
)
_BATCH = flags.DEFINE_integer("batch", 256, "Images of a run.")
_CONFIG = "from vit_convert.core.config import default_config as get_config\n"
# What is judged, the checkpoint, what it is calibrated on and judged on.
CASES = {
    "features": ("features", "dinov2_s14.npz", "calibration.zip", "judge.zip"),
    "digits": ("logits", "dinov2_s14_digits.npz", "digits_calibration.zip", "heldout.zip"),
    "digits by photographs": ("logits", "dinov2_s14_digits.npz", "calibration.zip", "heldout.zip"),
}


def main(argv: Sequence[str]) -> None:
    """Measures every case that is asked for."""
    del argv
    workdir, folder = pathlib.Path(_WORKDIR.value).resolve(), pathlib.Path(_FOLDER.value).resolve()
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "config.py").write_text(_CONFIG)
    results = Results(_OUTPUT.value, first_paragraph(__doc__))
    for case in _CASES.value:
        outputs, checkpoint, calibration, judged = CASES[case]
        name = re.sub(r"[^\w.+-]", "-", "-".join([case, *(word.removeprefix("--config.") for word in _OPTIONS.value)]))
        convert = [sys.executable, "-m", "vit_convert", f"--config={workdir / 'config.py'}", f"--workdir={workdir}"]
        data = {"checkpoint": checkpoint, "calibration.data": calibration, "evaluation.data": judged}
        convert += [f"--config.name={name}", *(f"--config.{key}={folder / file}" for key, file in data.items())]
        convert += [f"--config.outputs={outputs}", "--config.target=trt8"]
        convert += [
            "--config.precision=fp16,int8",
            "--config.engine.int8_lowering=fused",
            "--config.engine.backend=none",
        ]
        convert += [f"--config.check.num_images={24 if outputs == 'features' else 8}", *_OPTIONS.value]
        fixed = [f"--config.batch.{key}={_BATCH.value}" for key in ("min", "opt", "max")]
        engine, precisions = [_TRT_PYTHON.value, "-m", "vit_convert.engine"], "--precision=fp16,int8"
        bundle = workdir / name
        words = [f"--batches={_BATCH.value}", "--streams=1", "--duration=1", "--warmup=0.3", "--noend_to_end"]
        # a miss of the check on the CPU is told, and the engine judged all the same
        _run(name, convert, {"JAX_PLATFORMS": "cpu"})
        if _CONVERT_ONLY.value:
            continue
        _run(name, [*engine, "build", str(bundle), precisions, *fixed])
        _run(name, [*engine, "verify", str(bundle), precisions])
        _run(name, [*engine, "benchmark", str(bundle), precisions, *words])
        about = {
            "case": case,
            "outputs": outputs,
            "options": list(_OPTIONS.value),
            "command": shlex.join(convert),
            "batch": _BATCH.value,
        }
        results.add(**about, **found(bundle))
        print(results.record["runs"][-1], flush=True)


def _run(name: str, command: Sequence[str], environment: dict[str, str] | None = None) -> None:
    path = os.pathsep.join(word for word in (str(ROOT), os.environ.get("PYTHONPATH", "")) if word)
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": path, **(environment or {})},
    )
    print(
        name,
        *command[1:4],
        "exit",
        done.returncode,
        *(done.stdout + done.stderr).strip().splitlines()[-6:],
        sep="\n  ",
        flush=True,
    )


def found(bundle: pathlib.Path) -> dict[str, Any]:
    """What the commands left in a bundle."""
    report, benchmark = read_json(bundle / "report.json"), read_json(bundle / "benchmark.json")
    proof, check = report["verify"]["engines"]["int8"], report.get("checks", {}).get("int8", {})
    rates = {row["precision"]: row["images_per_second"] for row in benchmark["rows"] if row["transfers"] == RESIDENT}
    left_out = [site for row in report["calibration"]["left_out"] for site in row["sites"]]
    share = report["calibration"].get("output_share") or {"products": []}
    left_out += [row["site"] for row in share["products"]]
    facts = {key: benchmark[key] for key in ("gpu", "driver", "tensorrt", "model")}
    engines = {
        row["precision"]: {key: row[key] for key in ("int8_layers", "build_seconds", "graph")}
        for row in report["engines"]
    }
    return {
        **facts,
        "images_per_second": rates,
        "cosine": proof["cosine"],
        "cosine_fp16": report["verify"]["engines"]["fp16"]["cosine"],
        "cosine_onnxruntime": check.get("cosine"),
        "top1_onnxruntime": check.get("top1"),
        "top1": proof.get("top1"),
        "top1_jax": proof.get("top1_jax"),
        "images": proof.get("num_images"),
        "passed": proof["passed"],
        "left_out": len(left_out),
        "sites_left_out": left_out,
        "output_share": share,
        "recommended": report["recommended"]["precision"],
        "engines": engines,
    }


if __name__ == "__main__":
    app.run(main)
