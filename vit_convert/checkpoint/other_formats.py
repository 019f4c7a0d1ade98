"""Files that are no checkpoint we read, told by their first bytes: what each is, and what to do about it."""

import contextlib
import os
import pathlib
import re
from typing import NoReturn

from vit_convert.core.errors import CheckpointError

_TORCH_FIX = (
    "Give the .npz that the JAX project published, or save its tensors in Python as safetensors: "
    "state = torch.load(PATH, map_location='cpu', weights_only=True) (of a TorchScript file "
    "torch.jit.load(PATH).state_dict()); "
    "safetensors.torch.save_file({k: v.contiguous() for k, v in state.items()}, 'model.safetensors')"
)
_PICKLE_FIX = (
    "If you trust it, save its arrays in Python as safetensors: params = {}; "
    "safetensors.numpy.save_file({{k: numpy.asarray(v, order='C') for k, v in flax.traverse_util.flatten_dict("
    "params, sep='/').items()}}, 'model.safetensors')"
)
_LOADS = _PICKLE_FIX.format("pickle.load(open(PATH, 'rb'))")
_LOADS_NPY = _PICKLE_FIX.format("numpy.load(PATH, allow_pickle=True).item()")
# What a file starts with, what it is, and what to do. The first row that matches counts.
_KINDS: tuple[tuple[re.Pattern[bytes], str, str], ...] = (
    # torch.save before 1.6: three pickles, of which the first is a magic number
    (re.compile(rb"\x80.\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19\.", re.DOTALL), "a PyTorch file", _TORCH_FIX),
    # Protocols 2 to 5 say so; 0 and 1 begin with a dictionary, as text or not. As MessagePack, byte 80 is an empty map,
    # which is no checkpoint.
    (
        re.compile(rb"\x80[\2-\5]|\(dp\d|\}q\0"),
        "a Python pickle, which could run code when loaded",
        _LOADS,
    ),
    (re.compile(rb"\x93NUMPY"), "a .npy file: one array, or a pickle, which could run code when loaded", _LOADS_NPY),
    (re.compile(rb"version https://git-lfs"), "a pointer of Git LFS, not the file itself", "Run git lfs pull."),
    (
        re.compile(rb"\s*<"),
        "a web page or a server's message, not a checkpoint",
        "Fetch the file again, from an address of the file itself.",
    ),
    (
        re.compile(rb"\s*[{\[]"),
        "JSON, such as a config.json or the index of a checkpoint in parts, not its arrays",
        "Give the file that holds the arrays. Parts are put together in Python: safetensors.numpy.save_file({k: v for "
        "part in PARTS for k, v in safetensors.numpy.load_file(part).items()}, 'model.safetensors')",
    ),
    (
        re.compile(rb"\x1f\x8b|\x28\xb5\x2f\xfd|BZh|\xfd7zXZ"),
        "compressed by gzip, zstd, bzip2 or xz",
        "Unpack it first.",
    ),
    (re.compile(rb"\x89HDF"), "an HDF5 file (of Keras?)", "Save its parameters with numpy.savez(path, **flat_params)."),
    (re.compile(rb"\Z"), "empty", "Fetch the file again."),
)
_SUFFIXES, _SHOWN = (".npz", ".safetensors", ".msgpack"), 4
START = 32  # bytes that are looked at


def refuse_other_format(path: str | os.PathLike[str], start: bytes) -> None:
    """Refuses a file that begins as one of another kind does. Nothing is unpickled.

    Args:
        path: the file.
        start: its first `START` bytes; all of a shorter one.

    Raises:
        CheckpointError: it is of another kind; says which, and how to make a checkpoint of it.
    """
    for begins, what, fix in _KINDS:
        if begins.match(start):
            raise CheckpointError(f"{path}: {what}", fix=fix)


def refuse_torch(path: str | os.PathLike[str]) -> NoReturn:
    """Refuses a zip that holds a pickle of PyTorch's.

    Raises:
        CheckpointError: always; says how to make a checkpoint of it.
    """
    raise CheckpointError(f"{path}: a PyTorch file, not an .npz of a Flax model", fix=_TORCH_FIX)


def refuse_folder(path: pathlib.Path) -> NoReturn:
    """Refuses a folder, and names the checkpoint in it, as that of transformers' models.

    Raises:
        CheckpointError: always.
    """
    with contextlib.suppress(OSError):
        if held := sorted(file.name for file in path.iterdir() if file.suffix in _SUFFIXES)[:_SHOWN]:
            raise CheckpointError(
                f"{path}: a folder, not a file",
                fix=f"Give a file in it: {', '.join(str(path / name) for name in held)}.",
            )
    raise CheckpointError(
        f"{path}: a folder (a tensorstore or Orbax checkpoint?), not a file",
        fix="Export its parameters to one .npz file.",
    )
