"""Our own kernels for TensorRT 8: attention and LayerNorm in INT8 and FP16, and GroupNorm in FP16, as plugins in a
library built by nvcc.

    python -m vit_convert.kernels --tensorrt_include=FOLDER     # of NvInfer.h; needs nvcc, and g++

Only the lowerings "fused", "kernels", "windows" and "groupnorm" need them. The library is the file VIT_CONVERT_KERNELS,
or else lies beside this file.
"""

import ctypes
import functools
import os
import pathlib
import threading
from collections.abc import Sequence

from vit_convert.core.errors import BuildError

ENVIRONMENT = "VIT_CONVERT_KERNELS"
SOURCES = pathlib.Path(__file__).resolve().parent
NAME = "libvit_kernels.so"
_LOCK = threading.Lock()
_SOURCES = ("attention.cu", "stream.cu", "windows.cu", "norm.cu", "group_norm.cu", "planes.cu", "plugin.cpp")
# as plugin.cpp registers them
_PLUGINS = (
    *(b"VitAttention", b"VitWindowAttention", b"VitAddNorm", b"VitNorm"),
    *(b"VitGroupNorm", b"VitAddGroupNorm", b"VitTwoGroupNorms"),
)


def library() -> pathlib.Path:
    """Where the library is, or would be."""
    return pathlib.Path(os.environ.get(ENVIRONMENT) or SOURCES / NAME)


def needed_by(onnx_path: str | os.PathLike[str]) -> bool:
    """Whether a graph has nodes that only the library can build; its weights lie in another file."""
    data = pathlib.Path(onnx_path).read_bytes()
    return any(name in data for name in _PLUGINS)


def register() -> bool:
    """Makes the plugins known to the TensorRT 8 that this process has loaded, once for all of its threads.

    Returns:
        Whether there are any: False where nobody has built them.

    Raises:
        BuildError: there is a library, and it cannot be used.
    """
    with _LOCK:  # a registry takes a name once, and two threads at a time find the cache empty
        return register_once()


@functools.cache
def register_once() -> bool:
    """What `register` does for the first of its threads."""
    path = library()
    if not path.is_file():
        return False
    try:
        status = ctypes.CDLL(str(path)).vit_register()
    except (OSError, AttributeError) as e:
        raise BuildError(f"{path}: cannot be loaded ({e})", fix="Build it again: python -m vit_convert.kernels.") from e
    if status:
        raise BuildError(
            f"{path}: TensorRT takes no plugins from it (status {status})", fix="Build it for this TensorRT."
        )
    return True


def command(output: pathlib.Path, *, include: str, archs: Sequence[str], nvcc: str) -> list[str]:
    """The command that builds the library.

    Args:
        output: the library.
        include: the folder of NvInfer.h.
        archs: compute capabilities, "90".
        nvcc: the compiler.
    """
    code = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    options = ["-O3", "-std=c++17", "-shared", "-Xcompiler", "-fPIC,-Wno-deprecated-declarations", f"-I{include}"]
    return [
        nvcc,
        *options,
        *code,
        *(str(SOURCES / name) for name in _SOURCES),
        "-o",
        str(output),
    ]
