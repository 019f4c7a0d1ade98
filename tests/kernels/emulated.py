"""The kernels on the processor: their sources, compiled by g++ with `on_cpu/` in place of CUDA's headers."""

import ctypes
import pathlib
import re
import subprocess
from collections.abc import Sequence

from vit_convert.kernels import SOURCES

_ON_CPU = pathlib.Path(__file__).with_name("on_cpu")
_SHARED = re.compile(r"extern __shared__ __align__\(16\) (\w+) (\w+)\[\];")
_LAUNCH = re.compile(r"(\w+(?:<[\w, ]+>)?)<<<(.*?)>>>\(", re.DOTALL)


def compiled(sources: Sequence[str], folder: pathlib.Path) -> ctypes.CDLL:
    """Sources of kernels as a library whose pointers are the processor's.

    Args:
        sources: "group_norm.cu", ….
        folder: takes the files.
    """
    paths, library = [folder / f"{source}.cpp" for source in sources], folder / "kernels.so"
    for source, path in zip(sources, paths):
        text = _SHARED.sub(r"\1* \2 = reinterpret_cast<\1*>(on_cpu::shared);", (SOURCES / source).read_text())
        text, launches = _LAUNCH.subn(r"on_cpu::launch(\1, \2)(", text)
        assert launches > 0 and "<<<" not in text
        path.write_text(text)
    # reinterpret_cast between vectors and their parts is what CUDA allows and C++ does not
    options = ["-std=c++17", "-O1", "-w", "-fno-strict-aliasing", "-ffp-contract=off", "-shared", "-fPIC"]
    words = ["g++", *options, f"-I{_ON_CPU}", f"-I{SOURCES}", *map(str, paths), "-o", str(library)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[:2000]
    return ctypes.CDLL(str(library))
