"""FP32 graphs that benchmarks quantize."""

import pathlib
import subprocess
import sys

from results import ROOT


def exported(workdir: pathlib.Path, name: str, *options: str) -> pathlib.Path:
    """Exports a checkpoint by the command line.

    Args:
        workdir: gets the bundle.
        name: of the bundle.
        options: "--config.key=value".

    Returns:
        Its model.onnx.
    """
    config = workdir / f"{name}.py"
    config.write_text(
        "from vit_convert.core.config import default_config\n\n\ndef get_config():\n    return default_config()\n"
    )
    always = ["--config.engine.backend=none", "--config.precision=fp32", "--until=export", "--quiet"]
    command = [sys.executable, "-m", "vit_convert", f"--config={config}", f"--workdir={workdir}", *always, *options]
    subprocess.run(command, check=True, cwd=ROOT)
    return workdir / name / "model.onnx"
