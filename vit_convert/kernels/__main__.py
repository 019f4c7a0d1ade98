"""Builds the library of our kernels, see `vit_convert.kernels`."""

import pathlib
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence

from absl import flags

from vit_convert import kernels
from vit_convert.core.bundle import atomic
from vit_convert.core.errors import BuildError, UsageError
from vit_convert.core.program import Program

_PROGRAM = Program(__doc__, when_interrupted="nothing was written")
_FLAGS = _PROGRAM.flags
flags.DEFINE_string(
    "tensorrt_include", "/usr/include/x86_64-linux-gnu", "The folder of TensorRT 8.6's NvInfer.h.", flag_values=_FLAGS
)
flags.DEFINE_list("archs", ["80", "86", "89", "90"], "Compute capabilities.", flag_values=_FLAGS)
flags.DEFINE_string("nvcc", "nvcc", "CUDA's compiler.", flag_values=_FLAGS)
flags.DEFINE_string("output", None, "The library; by default where it is looked for.", flag_values=_FLAGS)


def build(argv: Sequence[str]) -> int:
    """Builds the library where it is looked for.

    Raises:
        UsageError: an unknown flag, or a word that is none.
        BuildError: a tool or a header is missing, or the compiler refuses.
    """
    if words := _PROGRAM.parse(argv[1:]):
        raise UsageError(f"unexpected argument {words[0]!r}", fix="--help lists the flags.")
    if shutil.which(_FLAGS.nvcc) is None:
        raise BuildError(f"{_FLAGS.nvcc}: no such compiler", fix="Install CUDA's toolkit, or give --nvcc.")
    if not (pathlib.Path(_FLAGS.tensorrt_include) / "NvInfer.h").is_file():
        raise BuildError(
            f"{_FLAGS.tensorrt_include}: holds no NvInfer.h",
            fix="Give --tensorrt_include: TensorRT's archive has it in include/.",
        )
    output = pathlib.Path(_FLAGS.output) if _FLAGS.output else kernels.library()
    with atomic(output) as temporary:
        words = kernels.command(temporary, include=_FLAGS.tensorrt_include, archs=_FLAGS.archs, nvcc=_FLAGS.nvcc)
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode:
            raise BuildError(
                f"{shlex.join(words)}: {done.stderr.strip()[-2000:]}",
                fix="These sources are for TensorRT 8.6 and CUDA 12 or later.",
            )
    print(output)
    return 0


if __name__ == "__main__":
    sys.exit(_PROGRAM.main(sys.argv, build, needs_words=False))
