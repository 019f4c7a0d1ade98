"""Flax's MessagePack files (`flax.serialization.to_bytes`): where each array lies, without reading one.

The MessagePack library builds every object of a file at once, even arrays of gigabytes; here only headers are read.
"""

import dataclasses
import math
import struct
from collections.abc import Callable, Iterator

import ml_dtypes
import numpy as np

_ARRAY, _SCALAR = 1, 3  # flax.serialization's extension types; 2 is a complex number, which cannot be a parameter
# marks a map that stands for an array of more than a gigabyte, split into flat pieces
_CHUNKED = "__msgpack_chunked_array__"
_DEEPEST, _LONGEST_NAME, _MOST_AXES = 64, 512, 32
_DTYPES = {name: np.dtype(name) for name in ("float64", "float32", "float16", "int64", "int32", "int16", "int8")}
_DTYPES |= {name: np.dtype(name) for name in ("uint64", "uint32", "uint16", "uint8", "bool")}
_DTYPES["bfloat16"] = np.dtype(ml_dtypes.bfloat16)
# By first byte: kind, number of bytes of the length field that follows, and the length in a fixed form.
_HEADS: dict[int, tuple[str, int]] = {
    **{0xC4 + i: ("bin", 1 << i) for i in range(3)},
    **{0xC7 + i: ("ext", 1 << i) for i in range(3)},
    **{0xD9 + i: ("str", 1 << i) for i in range(3)},
    **{0xDC + i: ("list", 2 << i) for i in range(2)},
    **{0xDE + i: ("map", 2 << i) for i in range(2)},
}
_PLAIN = {0xC0: 0, 0xC2: 0, 0xC3: 0, 0xCA: 4, 0xCB: 8, **{0xCC + i: 1 << i % 4 for i in range(8)}}  # bytes of values


@dataclasses.dataclass(frozen=True)
class Stored:
    """One array of a file.

    Attributes:
        shape: its shape.
        dtype: its type.
        pieces: (offset, values) of each run of its values, in order; one unless the array was split.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    pieces: tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True)
class _Head:
    kind: str  # "map", "list", "str", "bin", "ext", or "" for a plain value
    length: int  # entries of a map or list, bytes of anything else
    start: int  # of what follows the header
    code: int = 0  # of an extension


def starts_msgpack(start: bytes) -> bool:
    """Whether these first bytes can be those of a MessagePack map, as in every Flax file."""
    return bool(start) and (0x80 <= start[0] <= 0x8F or start[0] in (0xDE, 0xDF))


def read_arrays(read: Callable[[int, int], bytes], size: int) -> Iterator[tuple[str, Stored]]:
    """Finds the arrays of a file, below the `/`-joined names of the maps that hold them.

    Args:
        read: returns bytes of the file, given an offset and a count; fewer at its end.
        size: of the file.

    Yields:
        Name and place of each. Other values, such as a step number, are skipped.

    Raises:
        ValueError: it is not such a file, is truncated, or its sizes contradict each other.
    """
    walk = _Walk(read, size)
    head = walk.head(0)
    if head.kind != "map":
        raise ValueError("not a map of parameters")
    yield from walk.arrays(head, "", 0)
    if walk.end != size:
        raise ValueError(f"{size - walk.end} bytes behind the parameters")


class _Walk:
    """Walks a file from front to back; `end` is the offset after what was read last."""

    def __init__(self, read: Callable[[int, int], bytes], size: int):
        self._read, self._size, self.end = read, size, 0

    def bytes(self, offset: int, count: int) -> bytes:
        if offset + count > self._size:
            raise ValueError(f"cut off: {offset + count} bytes are claimed, there are {self._size}")
        return self._read(offset, count)

    def head(self, offset: int) -> _Head:
        """The header at an offset."""
        first = self.bytes(offset, 1)[0]
        offset += 1
        if first <= 0x7F or first >= 0xE0:  # a small whole number
            return self._plain(offset, 0)
        if first <= 0xBF:  # the length is in the first byte
            kind, length = ("str", first & 31) if first >= 0xA0 else ("list" if first & 16 else "map", first & 15)
            return self._held(kind, length, offset)
        if 0xD4 <= first <= 0xD8:
            return self._held("ext", 1 << (first - 0xD4), offset + 1, self.bytes(offset, 1)[0])
        if first in _HEADS:
            kind, wide = _HEADS[first]
            length = int.from_bytes(self.bytes(offset, wide), "big")
            offset += wide
            if kind == "ext":
                return self._held(kind, length, offset + 1, self.bytes(offset, 1)[0])
            return self._held(kind, length, offset)
        if first not in _PLAIN:
            raise ValueError(f"byte {first:#x} begins nothing")
        return self._plain(offset, _PLAIN[first])

    def _plain(self, offset: int, count: int) -> _Head:
        self.bytes(offset, count)
        return _Head("", count, offset)

    def _held(self, kind: str, length: int, start: int, code: int = 0) -> _Head:
        # an entry of a list takes at least one byte, of a map two
        least = length * 2 if kind == "map" else length
        if start + least > self._size:
            raise ValueError(f"cut off: a {kind} of {length} at {start}, the file has {self._size} bytes")
        return _Head(kind, length, start, code)

    def text(self, offset: int) -> str:
        """The string at an offset."""
        head = self.head(offset)
        if head.kind not in ("str", "bin") or head.length > _LONGEST_NAME:
            raise ValueError(f"no name at {offset}, but {head.kind or 'a number'} of {head.length}")
        self.end = head.start + head.length
        return self.bytes(head.start, head.length).decode()  # which raises a ValueError too

    def whole(self, offset: int) -> int:
        """The whole number at an offset, not negative."""
        first = self.bytes(offset, 1)[0]
        if first <= 0x7F:
            self.end = offset + 1
            return first
        if not 0xCC <= first <= 0xCF:
            raise ValueError(f"no size at {offset}")
        self.end = offset + 1 + _PLAIN[first]
        return int.from_bytes(self.bytes(offset + 1, _PLAIN[first]), "big")

    def skip(self, head: _Head, depth: int) -> None:
        """Moves `end` past a value."""
        if depth > _DEEPEST:
            raise ValueError(f"deeper than {_DEEPEST} levels")
        self.end = head.start
        if head.kind not in ("map", "list"):
            self.end += head.length
            return
        for _ in range(head.length * (2 if head.kind == "map" else 1)):
            self.skip(self.head(self.end), depth + 1)

    def arrays(self, head: _Head, prefix: str, depth: int) -> Iterator[tuple[str, Stored]]:
        """The arrays in a map."""
        if depth > _DEEPEST:
            raise ValueError(f"deeper than {_DEEPEST} levels")
        self.end = head.start
        for i in range(head.length):
            key = self.text(self.end)
            name = f"{prefix}/{key}" if prefix else key
            if len(name) > _LONGEST_NAME:
                raise ValueError(f"a name of more than {_LONGEST_NAME} letters: {name[:40]}…")
            if key == _CHUNKED and not i:
                yield prefix, self.chunked(head, depth)
                return
            value = self.head(self.end)
            if value.kind == "map":
                yield from self.arrays(value, name, depth + 1)
            elif value.kind == "ext" and value.code in (_ARRAY, _SCALAR):
                yield name, self.array(value)
            else:
                self.skip(value, depth)

    def array(self, head: _Head) -> Stored:
        """The array in an extension, which holds its shape, the name of its type, and its values."""
        parts = self.head(head.start)
        axes = self.head(parts.start)
        if (parts.kind, parts.length, axes.kind) != ("list", 3, "list") or axes.length > _MOST_AXES:
            raise ValueError(f"no array at {head.start}")
        self.end = axes.start
        shape = tuple(self.whole(self.end) for _ in range(axes.length))
        name = self.text(self.end)
        if name not in _DTYPES:
            raise ValueError(f"an array of {name!r}, known are {', '.join(_DTYPES)}")
        values, dtype = self.head(self.end), _DTYPES[name]
        needed = math.prod(shape) * dtype.itemsize
        self.end = values.start + values.length
        if values.kind not in ("bin", "str") or values.length != needed or self.end != head.start + head.length:
            raise ValueError(f"an array {shape} of {name} needs {needed} bytes, it has {values.length}")
        return Stored(shape, dtype, ((values.start, math.prod(shape)),))

    def chunked(self, head: _Head, depth: int) -> Stored:
        """An array that was split: after its marking key come `shape` and `chunks`, each a map from numbers to
        values."""
        self.skip(self.head(self.end), depth)
        parts: dict[str, list[Stored | int]] = {}
        for _ in range(head.length - 1):
            key, inner = self.text(self.end), self.head(self.end)
            if key not in ("shape", "chunks") or inner.kind != "map":
                raise ValueError(f"{key!r} in an array that was cut")
            self.end = inner.start
            numbered = dict(self._numbered(key) for _ in range(inner.length))
            if sorted(numbered) != list(range(inner.length)):
                raise ValueError(f"{key} of an array that was cut have other numbers than 0 to {inner.length - 1}")
            parts[key] = [numbered[number] for number in range(inner.length)]
        shape = tuple(side for side in parts.get("shape", ()) if isinstance(side, int))
        chunks = [chunk for chunk in parts.get("chunks", ()) if isinstance(chunk, Stored)]
        counts = [math.prod(chunk.shape) for chunk in chunks]
        if not chunks or len({chunk.dtype for chunk in chunks}) > 1 or sum(counts) != math.prod(shape):
            raise ValueError(f"pieces of {counts} values do not make an array {shape}")
        return Stored(shape, chunks[0].dtype, tuple(piece for chunk in chunks for piece in chunk.pieces))

    def _numbered(self, key: str) -> "tuple[int, Stored | int]":
        number = self.text(self.end)
        if not number.isascii() or not number.isdecimal():
            raise ValueError(f"{key} of an array that was cut have a {number!r}")
        if key == "shape":
            return int(number), self.whole(self.end)
        value = self.head(self.end)
        if value.kind != "ext" or value.code != _ARRAY:
            raise ValueError("a piece of an array that was cut is none")
        return int(number), self.array(value)


def packed_text(text: str) -> bytes:
    """A string, as Flax writes names."""
    encoded = text.encode()
    return (bytes([0xA0 | len(encoded)]) if len(encoded) < 32 else b"\xda" + struct.pack(">H", len(encoded))) + encoded


def packed_map(entries: int) -> bytes:
    """The header of a map."""
    return b"\xdf" + struct.pack(">I", entries)


def packed_array(shape: tuple[int, ...], dtype: np.dtype) -> bytes:
    """The header of an array; its values follow in row-major order.

    Raises:
        ValueError: it is larger than what Flax writes in one piece.
    """
    size = math.prod(shape) * dtype.itemsize
    if size >= 1 << 31:
        raise ValueError(f"an array of {size} bytes")
    axes = bytes([0x90 | len(shape)]) + b"".join(b"\xce" + struct.pack(">I", side) for side in shape)
    inner = b"\x93" + axes + packed_text(dtype.name) + b"\xc6" + struct.pack(">I", size)
    return b"\xc9" + struct.pack(">I", len(inner) + size) + bytes([_ARRAY]) + inner
