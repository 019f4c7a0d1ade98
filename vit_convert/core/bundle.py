"""The bundle: the folder through which the stages, and the hosts they run on, talk to each other."""

import contextlib
import errno
import hashlib
import json
import math
import os
import pathlib
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

from vit_convert.core.errors import UsageError
from vit_convert.core.record import Record

_CHUNK_BYTES = 1 << 22  # large enough that other threads hardly slow it down, small enough to stay in a cache
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_REFUSED = (errno.EACCES, errno.EROFS, errno.EPERM)
# a folder or a loop of links where a file belongs, or a disk that fails
_IN_THE_WAY = (
    *(errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENOTEMPTY, errno.EEXIST, errno.EBUSY),
    *(errno.EIO, errno.ESTALE),
)
# all that numpy.ndarray.tofile reports; it sets no errno
_SHORT_WRITE = re.compile(r"\d+ requested and \d+ written")


def graph_name(precision: str) -> str:
    """The file of a precision's graph: `model.onnx` for fp32, `model.<precision>.onnx` otherwise."""
    return "model.onnx" if precision == "fp32" else f"model.{precision}.onnx"


class Bundle:
    """The location of every file of one conversion.

    Args:
        root: `<workdir>/<name>`.

    Example:
        >>> Bundle("out/vit_b32").onnx("fp16").name
        'model.fp16.onnx'
    """

    def __init__(self, root: str | os.PathLike[str]):
        self.root = pathlib.Path(root)

    def require_writable(self) -> None:
        """Creates the folder if it is missing, and tests right away whether it can be written, not after hours in the
        last stage.

        Raises:
            UsageError: the folder cannot be made or written.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.root):
                pass
        except (OSError, ValueError) as e:  # the latter if the path contains a zero byte
            raise UsageError(
                f"workdir {self.root}: cannot be written ({getattr(e, 'strerror', None) or e})",
                fix="Give a writable --workdir.",
            ) from e

    config = property(lambda self: self.root / "config.json")
    manifest = property(lambda self: self.root / "manifest.json")
    events = property(lambda self: self.root / "events.jsonl")
    signature = property(lambda self: self.root / "signature.json")
    reference = property(lambda self: self.root / "reference.npz")
    calibration = property(lambda self: self.root / "calibration.json")
    calibration_cache = property(lambda self: self.root / "calibration.cache")
    sensitivity = property(lambda self: self.root / "sensitivity.json")
    plan_search = property(lambda self: self.root / "plan_search.json")
    lowerings = property(lambda self: self.root / "lowerings")
    precision_plan = property(lambda self: self.root / "precision_plan.json")
    report = property(lambda self: self.root / "report.json")
    report_html = property(lambda self: self.root / "report.html")
    benchmark = property(lambda self: self.root / "benchmark.json")
    tuning = property(lambda self: self.root / "tune.json")
    pair = property(lambda self: self.root / "pair.json")
    lock = property(lambda self: self.root / ".lock")

    def onnx(self, precision: str = "fp32") -> pathlib.Path:
        """The graph of one precision; weights in `<that>.data`."""
        return self.root / graph_name(precision)

    def lowering(self, name: str) -> pathlib.Path:
        """The fp32 graph in another lowering, for `tune` to choose from; weights in `<that>.data`."""
        return self.lowerings / f"{name}.onnx"

    def ranges(self, lowering: str) -> pathlib.Path:
        """The tensor ranges of int8 engines that are built from a lowering without Q/DQ: a calibration of that
        graph."""
        return self.lowerings / f"{lowering}.ranges.json"

    def reference_at(self, size: tuple[int, ...]) -> pathlib.Path:
        """The reference of a dynamic graph at another (height, width) or (tokens,); `reference` is for the size that it
        is tuned for."""
        return self.root / f"reference.{'x'.join(map(str, size))}.npz"

    def images(self, split: str) -> pathlib.Path:
        """Decoded images of one split ("calibration", "evaluation"): uint8 [images, height, width, 3]."""
        return self.root / f"{split}_images.npy"

    def tokens(self, split: str) -> pathlib.Path:
        """Token ids of one split's prompts, for a text tower: int32 [prompts, length]."""
        return self.root / f"{split}_tokens.npy"

    @property
    def embeddings(self) -> pathlib.Path:
        """JAX's embeddings of a tower's evaluation images or prompts: float32 [images, width]."""
        return self.root / "evaluation_embeddings.npy"

    def labels(self, split: str) -> pathlib.Path:
        """Class ids of one split: int64 [images]."""
        return self.root / f"{split}_labels.npy"

    @property
    def predictions(self) -> pathlib.Path:
        """JAX's output on the evaluation images, to count how often an engine agrees: float32 [images, classes]."""
        return self.root / "evaluation_logits.npy"

    def plan(self, backend: str, version: str, arch: str, precision: str) -> pathlib.Path:
        """One engine; its sidecar is the same path with `.json` appended."""
        return self.root / "engines" / f"{backend}-{version}-{arch}" / f"{precision}.plan"


@contextlib.contextmanager
def atomic(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """Yields a temporary path beside `path`, renamed to it when the block succeeds and removed when it does not.

    Args:
        path: the file (or folder) to create whole or not at all.

    Yields:
        A path in the same folder that does not exist yet; the block creates it.

    Raises:
        UsageError: the disk is full or the folder cannot be written.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(path)
    try:
        with disk_errors(path):
            yield temporary
            if path.is_dir() and temporary.is_dir():  # a file never takes a folder's place: it may hold anything
                shutil.rmtree(path)
            os.replace(temporary, path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):  # the folder can no longer be written: the next run removes it
                temporary.unlink()


def temporary_beside(path: pathlib.Path) -> pathlib.Path:
    """A temporary name beside `path` that no other process on any host uses; `leftovers` recognises it by its form."""
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")


@contextlib.contextmanager
def disk_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turns a full disk, a quota, a refused write or something in its place while `path` is made into a UsageError that
    says so."""
    try:
        yield
    except OSError as e:
        if e.errno in _DISK_FULL or (e.errno is None and _SHORT_WRITE.fullmatch(str(e))):
            raise UsageError(
                f"{path}: no space left on the disk",
                fix="Free space or choose another --workdir; finished stages are kept.",
            ) from e
        if e.errno in _REFUSED:
            raise UsageError(f"{path}: cannot be written ({e.strerror})", fix="Give a writable --workdir.") from e
        if e.errno in _IN_THE_WAY:
            fix = "Move away what is there, or give another --workdir."
            raise UsageError(f"{path}: cannot be written ({e.strerror})", fix=fix) from e
        raise


def utf8_path(path: str | os.PathLike[str]) -> str:
    """A path as C++ libraries take it: in UTF-8, even if the locale's file names are ASCII.

    Raises:
        UsageError: its bytes are not UTF-8.
    """
    try:
        return os.fsencode(path).decode("utf-8")
    except UnicodeDecodeError as e:
        shown = os.fspath(path).encode("utf-8", "replace").decode("utf-8")
        raise UsageError(
            f"{shown}: its name is not UTF-8, which ONNX and TensorRT need", fix="Give another --workdir."
        ) from e


@contextlib.contextmanager
def folder_errors(root: pathlib.Path) -> Iterator[None]:
    """Like `disk_errors` for every file under `root`, and for `root` itself if it disappears; errors of other files
    pass unchanged."""
    try:
        yield
    except OSError as e:
        named = pathlib.Path(os.fsdecode(e.filename)) if isinstance(e.filename, str | bytes | os.PathLike) else root
        if e.errno in _REFUSED and not named.is_relative_to(root):  # for example a checkpoint without read permission
            raise
        if e.errno in _IN_THE_WAY and root not in named.parents:  # perhaps a read through a descriptor
            raise
        if e.errno == errno.ENOENT and named.is_relative_to(root) and not root.is_dir():
            raise UsageError(f"{root}: was removed while the command worked in it", fix="Run it again.") from e
        with disk_errors(named):
            raise


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes a JSON file whole or not at all.

    Args:
        path: the file.
        value: anything that JSON can hold, and records; numpy scalars become Python's, NaN and infinities null.
    """
    with atomic(path) as temporary:
        temporary.write_text(as_json(value) + "\n", encoding="utf-8")


def as_json(value: Any) -> str:
    """The text that `write_json` writes."""
    try:
        return json.dumps(value, indent=1, default=_plain, allow_nan=False)
    except ValueError:
        as_read = json.loads(json.dumps(value, default=_plain))
        return json.dumps(_finite(as_read), indent=1, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: str | os.PathLike[str], default: Any = None) -> Any:
    """Reads a JSON object; returns `default` if the file is missing, damaged (by a full disk, for example) or something
    else."""
    try:
        value = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return default
    return value if isinstance(value, dict) else default


def _plain(value: Any) -> Any:
    if isinstance(value, Record):
        return value.to_dict()
    if hasattr(value, "tolist"):
        return value.tolist()
    return str(value)


def hash_file(path: str | os.PathLike[str]) -> str:
    """The sha256 of a file, in hex, read in chunks."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(_CHUNK_BYTES))
    with open(path, "rb", buffering=0) as f:
        while count := f.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def hash_value(value: Any) -> str:
    """The sha256 of anything that JSON can hold, independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=_plain).encode()).hexdigest()
