"""A text tower's input ids: from prompts through a tokenizer, or from an `.npy`."""

import os
import pathlib
from collections.abc import Sequence

import numpy as np

from vit_convert.core.bundle import hash_file, hash_value
from vit_convert.core.errors import CalibrationError, UsageError
from vit_convert.core.npy_header import read_npy_header
from vit_convert.core.pair import wrong_ids
from vit_convert.text.files import LARGEST_BYTES, read_bounded
from vit_convert.text.prompting import Prompting
from vit_convert.text.prompts import read_prompts
from vit_convert.text.tokenizer import open_tokenizer

_IDS = ".npy"


def tokens_of(prompts: Sequence[str], prompting: Prompting, tokenizer: str) -> np.ndarray:
    """Turns prompts into token ids.

    Args:
        prompts: as people write them.
        prompting: the text tower's rule.
        tokenizer: its files, see `open_tokenizer`.

    Returns:
        int32 [prompts, length].

    Raises:
        UsageError: no tokenizer is given, or its library is not installed.
        CalibrationError: the tokenizer cannot be read, or is another model's.
    """
    if not tokenizer:
        raise UsageError(
            f"config.tokenizer is empty, and {len(prompts):,} prompts are given",
            fix=f"Give the checkpoint's {prompting.tokenizer} tokenizer (a file or folder), or token ids in an .npy "
            "instead of prompts.",
        )
    return open_tokenizer(tokenizer, prompting)(prompts)


def read_tokens(path: str | os.PathLike[str], prompting: Prompting, tokenizer: str = "") -> np.ndarray:
    """Reads prompts, one per line, or token ids from an `.npy`, which need no tokenizer.

    Args:
        path: of the file.
        prompting: the text tower's rule, which sets the number of ids per prompt.
        tokenizer: see `tokens_of`; not used for ids.

    Returns:
        int32 [prompts, length].

    Raises:
        CalibrationError: the file cannot be read, or its ids are not this model's.
        UsageError: see `tokens_of`.
    """
    path = pathlib.Path(path)
    return _read_ids(path, prompting) if path.suffix == _IDS else tokens_of(read_prompts(path), prompting, tokenizer)


def fingerprint(*paths: str | os.PathLike[str]) -> str:
    """Identifies files of prompts, ids or tokenizers by their content; for a folder, that of the files in it.

    Raises:
        CalibrationError: one cannot be read.
    """
    found = []
    for path in map(pathlib.Path, paths):
        try:
            files = sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]
            found += [[os.fspath(file), hash_file(file)] for file in files if file.stat().st_size <= LARGEST_BYTES]
        except (OSError, ValueError) as e:
            raise CalibrationError(f"prompts {path}: {getattr(e, 'strerror', None) or e}", fix="Check the path.") from e
    return hash_value(found)


def _read_ids(path: pathlib.Path, prompting: Prompting) -> np.ndarray:
    try:
        with open(path, "rb") as file:
            shape, fortran, dtype = read_npy_header(file)
            if dtype.kind not in "iu" or len(shape) != 2 or shape[1] != prompting.length or not shape[0]:
                needed = f"integers [prompts, {prompting.length}]"
                raise CalibrationError(
                    f"tokens {path}: {dtype} {list(shape)}, needed are {needed}", fix="Save them with numpy.save."
                )
            values = read_bounded(file.read)
    except (OSError, ValueError) as e:
        raise CalibrationError(
            f"tokens {path}: {getattr(e, 'strerror', None) or e}", fix="Save them with numpy.save."
        ) from e
    size = shape[0] * shape[1] * dtype.itemsize
    if len(values) != size:
        raise CalibrationError(
            f"tokens {path}: {len(values):,} bytes, its header says {size:,}", fix="Save them with numpy.save."
        )
    ids = np.frombuffer(values, dtype).reshape(shape, order="F" if fortran else "C")
    if wrong := wrong_ids(ids, prompting.to_dict()):
        raise CalibrationError(
            f"tokens {path}: {wrong}", fix="Make them with the tokenizer that belongs to the checkpoint."
        )
    return ids.astype(np.int32)
