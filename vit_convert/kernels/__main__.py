"""Builds the library of our kernels, see `vit_convert.kernels`."""

import pathlib
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence

from absl import app, flags

from vit_convert import kernels
from vit_convert.core.bundle import atomic
from vit_convert.core.command import exit_code
from vit_convert.core.errors import BuildError

_INCLUDE = flags.DEFINE_string("tensorrt_include", "/usr/include/x86_64-linux-gnu", "The folder of TensorRT 8.6's NvInfer.h.")
_ARCHS = flags.DEFINE_list("archs", ["80", "86", "89", "90"], "Compute capabilities.")
_NVCC = flags.DEFINE_string("nvcc", "nvcc", "CUDA's compiler.")
_OUTPUT = flags.DEFINE_string("output", None, "The library; by default where it is looked for.")


def build(argv: Sequence[str]) -> int:
    """Builds the library where it is looked for.

    Raises:
        BuildError: a tool or a header is missing, or the compiler refuses.
    """
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    if shutil.which(_NVCC.value) is None:
        raise BuildError(f"{_NVCC.value}: no such compiler", fix="Install CUDA's toolkit, or give --nvcc.")
    if not (pathlib.Path(_INCLUDE.value) / "NvInfer.h").is_file():
        raise BuildError(f"{_INCLUDE.value}: holds no NvInfer.h", fix="Give --tensorrt_include: TensorRT's archive has it in include/.")
    output = pathlib.Path(_OUTPUT.value) if _OUTPUT.value else kernels.library()
    with atomic(output) as temporary:
        words = kernels.command(temporary, include=_INCLUDE.value, archs=_ARCHS.value, nvcc=_NVCC.value)
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode:
            raise BuildError(
                f"{shlex.join(words)}: {done.stderr.strip()[-2000:]}", fix="These sources are for TensorRT 8.6 and CUDA 12 or later."
            )
    print(output)
    return 0


if __name__ == "__main__":
    app.run(lambda argv: sys.exit(exit_code(lambda: build(argv), debug=False, when_interrupted="nothing was written")))
