"""Checkpoint files as lazy mappings: `.npz`, `.safetensors` and Flax's `.msgpack`, memory-mapped where the bytes lie
uncompressed."""

import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import math
import mmap
import os
import pathlib
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import IO

import ml_dtypes
import numpy as np

from vit_convert.checkpoint.flax_msgpack import Stored, read_arrays, starts_msgpack
from vit_convert.checkpoint.other_formats import START, refuse_folder, refuse_other_format, refuse_torch
from vit_convert.core.errors import CheckpointError
from vit_convert.core.npy_header import read_npy_header
from vit_convert.core.zip_member import UNREADABLE, FileState, data_offset, open_member

_CHUNK_BYTES = 1 << 20  # so that it stays in a core's cache between the checksum and the scan
_RESIDENT_BYTES = 1 << 28  # bytes of a mapped file after which its pages are released
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_SAFETENSORS_DTYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": _BFLOAT16,
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array of a checkpoint, described by its header and read when needed.

    Attributes:
        name: its name on disk.
        shape: its shape.
        dtype: its dtype on disk.
        read: returns the array: a view of the file, or the inflated array.
        open: for a zip member, returns a stream that starts at its first value and verifies the member's checksum at
            its end.
        fortran: values are stored in column-major order.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]
    open: Callable[[], IO[bytes]] | None = None
    fortran: bool = False

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    def derive(self, shape: tuple[int, ...], change: Callable[[np.ndarray], np.ndarray], suffix: str = "") -> "Leaf":
        """A leaf computed from this one when it is read; `suffix` is appended to its name."""
        return Leaf(self.name + suffix, shape, self.dtype, lambda: change(self.read()))

    def as_float32(self) -> "Leaf":
        """This leaf in float32: itself if it already is, otherwise converted each time it is read."""
        if self.dtype == np.float32:
            return self
        return Leaf(self.name, self.shape, np.dtype(np.float32), lambda: self.read().astype(np.float32))


class Leaves(Mapping[str, np.ndarray]):
    """A mapping of names to arrays that are read on access.

    Args:
        leaves: the leaves by name; `leaves[name].shape` gives a shape without reading the array.
    """

    def __init__(self, leaves: Mapping[str, Leaf]):
        self.leaves = dict(leaves)

    def __getitem__(self, name: str) -> np.ndarray:
        return self.leaves[name].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self.leaves)

    def __len__(self) -> int:
        return len(self.leaves)


class _Mapped:
    """A memory-mapped file whose pages do not accumulate in this process's resident memory.

    Releasing pages costs no more than a page fault when they are read again: they stay in the system's cache.
    """

    def __init__(self, file: IO[bytes]):
        self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._handed_out = 0

    def __len__(self) -> int:
        return len(self._map)

    def bytes(self, offset: int, count: int) -> bytes:
        return self._map[offset : offset + count]

    def array(self, shape: tuple[int, ...], dtype: np.dtype, offset: int, *, fortran: bool = False) -> np.ndarray:
        """A read-only view."""
        array = np.ndarray(shape, dtype, buffer=self._map, offset=offset, order="F" if fortran else "C")
        self._handed_out += array.nbytes
        if self._handed_out > _RESIDENT_BYTES and hasattr(self._map, "madvise"):
            self._map.madvise(mmap.MADV_DONTNEED)  # views stay valid: the mapping is shared and read-only
            self._handed_out = array.nbytes
        return array


def split_subtree(path: str | os.PathLike[str]) -> tuple[str, str]:
    """Splits "file.npz:img", big_vision's way to name a part of a checkpoint, into the file and the sub-tree ("" for
    none)."""
    match = re.fullmatch(r"(?P<file>.+\.(?:npz|safetensors|msgpack)):(?P<subtree>[\w/]+)", os.fspath(path))
    return (match["file"], match["subtree"]) if match else (os.fspath(path), "")


def read_container(path: str | os.PathLike[str]) -> Leaves:
    """Opens a checkpoint file; reads only its headers.

    Args:
        path: `.npz`, `.safetensors` or `.msgpack`; told apart by content.

    Returns:
        Arrays by name. Members stored uncompressed are read-only views of the memory-mapped file, compressed ones are
        inflated at the first access and kept. bfloat16 comes as `ml_dtypes.bfloat16`.

    Raises:
        CheckpointError: missing, truncated, of another format, with pickled objects, or with names or sizes that
            contradict each other.
    """
    path = pathlib.Path(path)
    if os.path.isdir(path):
        refuse_folder(path)
    if os.path.exists(path) and not os.path.isfile(path):  # a device or a pipe, which may never end
        raise CheckpointError(f"{path}: not a regular file", fix="Give an .npz, .safetensors or .msgpack checkpoint.")
    with _opened(path) as file:
        start = file.read(START)
        if start[8:9] == b"{" and not start.startswith(b"PK"):
            return Leaves(_safetensors_leaves(path, file))
        refuse_other_format(path, start)  # after the above, whose first byte may be any
        if starts_msgpack(start):
            return Leaves(_msgpack_leaves(path, file))
        try:
            members = zipfile.ZipFile(file).infolist()
        except UNREADABLE as e:
            if start.startswith(b"PK"):
                raise CheckpointError(
                    f"{path}: truncated or damaged zip ({e})",
                    fix="Fetch the file again; compare its size with the source.",
                ) from e
            raise CheckpointError(
                f"{path}: not a zip file, so not an .npz", fix="Give an .npz, .safetensors or .msgpack checkpoint."
            ) from e
        return Leaves(_npz_leaves(path, file, members))


@contextlib.contextmanager
def _opened(path: pathlib.Path) -> Iterator[IO[bytes]]:
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(open(path, "rb"))
            file.peek(1)  # a file that opens need not be readable
        except (OSError, ValueError) as e:  # the latter if the path contains a zero byte
            raise CheckpointError(
                f"{path}: cannot be read ({getattr(e, 'strerror', None) or e})",
                fix="Check the path, or give a https:// or gs:// address.",
            ) from e
        yield file


def verify(path: str | os.PathLike[str], leaves: Iterable[Leaf]) -> None:
    """Reads every value once, in threads, checking the zip's checksums and that each value is a finite float32.

    Args:
        path: the file, for messages.
        leaves: leaves from `read_container`. Uses one small buffer per thread.

    Raises:
        CheckpointError: a checksum is wrong, or a value is NaN, infinite or beyond float32; names the leaf and the
            first bad index.
    """
    by_size = sorted(leaves, key=lambda leaf: -leaf.size)
    with concurrent.futures.ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        for _ in pool.map(functools.partial(_verify_leaf, path), by_size):
            pass


def _verify_leaf(path: str | os.PathLike[str], leaf: Leaf) -> None:
    if leaf.dtype.kind != "f" and leaf.dtype != _BFLOAT16:
        raise CheckpointError(
            f"{path}: {leaf.name}: dtype {leaf.dtype}, parameters are floating-point numbers",
            fix="Save the parameters alone, in float32, float16 or bfloat16.",
        )
    done = 0
    with _damage(path, leaf.name):
        for stored in _chunks(leaf):
            with np.errstate(over="ignore"):
                values = stored.astype(np.float32, copy=False)
            finite = np.isfinite(values)
            if not finite.all():
                first = int(np.argmin(finite))
                index = np.unravel_index(done + first, leaf.shape, "F" if leaf.fortran else "C")
                place = ", ".join(str(int(i)) for i in index)
                raise CheckpointError(
                    f"{path}: {leaf.name}[{place}]: {values[first]}, a parameter must be finite",
                    fix="The training diverged or the file is damaged.",
                )
            done += values.size
        if done != leaf.size:
            raise EOFError(f"{done} values, its shape needs {leaf.size}")


@contextlib.contextmanager
def _damage(path: str | os.PathLike[str], name: str) -> Iterator[None]:
    try:
        yield
    except UNREADABLE as e:
        raise CheckpointError(f"{path}: {name}: damaged ({e})", fix="Fetch the file again.") from e


def _chunks(leaf: Leaf) -> Iterator[np.ndarray]:
    if leaf.open is None:
        flat = leaf.read().reshape(-1)
        step = _CHUNK_BYTES // leaf.dtype.itemsize
        yield from (flat[i : i + step] for i in range(0, flat.size, step))
        return
    # Through the stream, not the mapping, so that scanned pages do not become resident.
    with leaf.open() as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            yield np.frombuffer(chunk, leaf.dtype)


def _npz_leaves(path: pathlib.Path, file: IO[bytes], members: list[zipfile.ZipInfo]) -> dict[str, Leaf]:
    if any(member.filename.endswith("data.pkl") for member in members):
        refuse_torch(path)
    mapped = _Mapped(file)
    leaves: dict[str, Leaf] = {}
    for member in members:
        if _was_added(member):
            continue
        name = member.filename.removesuffix(".npy")
        if not _is_name(name):
            raise CheckpointError(
                f"{path}: member {member.filename!r}: not a parameter's name",
                fix="Names are joined by '/', without '..' or '\\'.",
            )
        if name in leaves:
            raise CheckpointError(f"{path}: member {member.filename!r}: there are two of that name")
        leaves[name] = _npz_leaf(path, file, member, name, mapped)
    return leaves


def _was_added(member: zipfile.ZipInfo) -> bool:
    """Whether unpacking and zipping by hand put it there: a folder's own entry, or one of macOS's hidden files."""
    parts = member.filename.split("/")
    is_folder = member.filename.endswith("/") and not member.file_size
    return is_folder or parts[0] == "__MACOSX" or parts[-1] == ".DS_Store" or parts[-1].startswith("._")


def _npz_leaf(path: pathlib.Path, file: IO[bytes], member: zipfile.ZipInfo, name: str, mapped: _Mapped) -> Leaf:
    state = FileState.of(file.fileno())  # each reader opens the file anew, because threads must not share a handle
    try:
        with open_member(path, member, state) as stream:
            shape, fortran, dtype = read_npy_header(stream)
            header_bytes = stream.tell()
        offset = data_offset(file, member) + header_bytes
    except UNREADABLE as e:
        raise CheckpointError(
            f"{path}: member {name}: unreadable ({e})", fix="Fetch the file again, or save it with numpy.savez."
        ) from e
    if dtype.hasobject:
        raise CheckpointError(
            f"{path}: member {name}: a pickled object array, which could run code when loaded",
            fix="Save plain arrays: numpy.savez(path, **flat_params).",
        )
    if dtype == np.dtype("V2"):
        dtype = _BFLOAT16  # numpy cannot spell bfloat16 in its header and writes two raw bytes
    expected = math.prod(shape) * dtype.itemsize
    if expected != member.file_size - header_bytes:
        raise CheckpointError(
            f"{path}: member {name}: {member.file_size - header_bytes} bytes, shape {shape} of {dtype} needs {expected}"
        )

    def open_values() -> IO[bytes]:
        stream = open_member(path, member, state)
        stream.read(header_bytes)
        return stream

    if member.compress_type == zipfile.ZIP_STORED:

        def read() -> np.ndarray:
            return mapped.array(shape, dtype, offset, fortran=fortran)

        return Leaf(name, shape, dtype, read, open_values, fortran)

    @functools.cache
    def inflate() -> np.ndarray:
        with _damage(path, name), open_values() as stream:
            return np.frombuffer(stream.read(), dtype).reshape(shape, order="F" if fortran else "C")

    return Leaf(name, shape, dtype, inflate, open_values, fortran)


def _is_name(name: str) -> bool:
    return "\\" not in name and all(part not in ("", ".", "..") for part in name.split("/"))


def _safetensors_leaves(path: pathlib.Path, file: IO[bytes]) -> dict[str, Leaf]:
    import safetensors

    try:
        with safetensors.safe_open(path, "numpy"):  # validates the header: sizes, overlaps, holes
            pass
    except safetensors.SafetensorError as e:
        raise CheckpointError(f"{path}: not a valid .safetensors file ({e})", fix="Fetch the file again.") from e
    mapped = _Mapped(file)
    header_bytes = int.from_bytes(mapped.bytes(0, 8), "little")
    header = json.loads(mapped.bytes(8, header_bytes))
    header.pop("__metadata__", None)
    leaves = {}
    for name, entry in header.items():
        if entry["dtype"] not in _SAFETENSORS_DTYPES:
            raise CheckpointError(
                f"{path}: {name}: dtype {entry['dtype']} is not supported",
                fix="Save the parameters as F32, F16 or BF16.",
            )
        dtype, shape = _SAFETENSORS_DTYPES[entry["dtype"]], tuple(entry["shape"])
        offset = 8 + header_bytes + entry["data_offsets"][0]
        leaves[name] = Leaf(name, shape, dtype, functools.partial(mapped.array, shape, dtype, offset))
    return leaves


def _msgpack_leaves(path: pathlib.Path, file: IO[bytes]) -> dict[str, Leaf]:
    mapped, leaves = _Mapped(file), {}
    try:
        for name, stored in read_arrays(mapped.bytes, len(mapped)):
            if not _is_name(name) or name in leaves:
                raise ValueError(f"{name!r} is there twice, or no parameter's name")
            leaves[name] = Leaf(name, stored.shape, stored.dtype, functools.partial(_gathered, mapped, stored))
    except ValueError as e:
        raise CheckpointError(
            f"{path}: not a sound .msgpack file of Flax ({e})",
            fix="Fetch the file again, or save its parameters with numpy.savez(path, **flat_params).",
        ) from e
    return leaves


def _gathered(mapped: _Mapped, stored: Stored) -> np.ndarray:
    """A view of an array, or a copy if the file stores it in pieces."""
    if len(stored.pieces) == 1:
        return mapped.array(stored.shape, stored.dtype, stored.pieces[0][0])
    pieces = [mapped.array((count,), stored.dtype, offset) for offset, count in stored.pieces]
    return np.concatenate(pieces).reshape(stored.shape)
