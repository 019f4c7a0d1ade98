"""Members of a zip archive, each read through a handle of its own.

A `zipfile.ZipFile` read by several threads fails under Python 3.12 and 3.13 with "Bad CRC-32" on sound files: they
share one position.
"""

import contextlib
import os
import struct
import zipfile
import zlib
from typing import IO, NamedTuple, cast

_HEADER_BYTES = 30
# flags of APPNOTE.TXT, 4.4.4
_UNREADABLE = {0x1: "is encrypted", 0x20: "is a compressed patch", 0x40: "is strongly encrypted"}
_UTF8 = 0x800
# LZMA allocates the dictionary that its header claims
_COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2)
# What reading the directory or a member raises for an archive that is damaged or that this Python cannot read.
UNREADABLE = (OSError, ValueError, EOFError, RuntimeError, struct.error, zipfile.BadZipFile, zlib.error)


class FileState(NamedTuple):
    """Identifies the file whose directory was read, so that a replacement is noticed."""

    device: int
    inode: int
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, file: str | os.PathLike[str] | int) -> "FileState":
        """The state of the file at a path, or of an open descriptor."""
        stat = os.stat(file)
        return cls(stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)


def open_member(path: str | os.PathLike[str], member: zipfile.ZipInfo, state: FileState | None = None) -> IO[bytes]:
    """Opens one member for reading from its start; any number of threads may do so at once.

    Args:
        path: the archive.
        member: from its directory (`ZipFile.infolist`).
        state: of the file when its directory was read; None skips the comparison.

    Returns:
        A stream of the member's bytes, which inflates them, checks their CRC-32 at the end, and closes its own handle.

    Raises:
        zipfile.BadZipFile: the member's header is damaged, its sizes contradict each other, it extends past the end of
            the file, or the file has been replaced.
        NotImplementedError: it is compressed or encrypted in an unsupported way.
        OSError: the file cannot be read. These, and what the stream raises, are UNREADABLE.
    """
    for flag, what in _UNREADABLE.items():
        if member.flag_bits & flag:
            raise NotImplementedError(f"{member.filename} {what}")
    if member.compress_type not in _COMPRESSIONS:
        raise NotImplementedError(f"{member.filename} is compressed by method {member.compress_type}")
    if member.compress_type == zipfile.ZIP_STORED and member.compress_size != member.file_size:
        # A mapping reads as many bytes as the second says, but past the first they belong to something else.
        raise zipfile.BadZipFile(f"it is stored in {member.compress_size} bytes, and claims {member.file_size}")
    with contextlib.ExitStack() as opened:
        file = opened.enter_context(open(path, "rb"))
        if state is not None and FileState.of(file.fileno()) != state:
            raise zipfile.BadZipFile("the file was changed while it was read")
        # `read` allocates all that is claimed before it looks.
        if file.seek(data_offset(file, member)) + member.compress_size > os.fstat(file.fileno()).st_size:
            raise zipfile.BadZipFile("it ends after the file, which is truncated")
        stream = zipfile.ZipExtFile(file, "r", member, close_fileobj=True)
        opened.pop_all()
        return cast(IO[bytes], stream)


def data_offset(file: IO[bytes], member: zipfile.ZipInfo) -> int:
    """The offset in the archive of a member's bytes.

    Args:
        file: the archive; its position moves.
        member: from its directory.

    Raises:
        zipfile.BadZipFile: the directory's offset holds no header, or one with another name.
    """
    file.seek(member.header_offset)
    header = file.read(_HEADER_BYTES)
    if len(header) < _HEADER_BYTES or not header.startswith(b"PK\3\4"):
        raise zipfile.BadZipFile("its header is damaged")
    # The header repeats the name and has an extra field of its own, which may differ in length from the directory's.
    flags, name_bytes, extra_bytes = struct.unpack("<6xH18xHH", header)
    name = file.read(name_bytes).decode("utf-8" if flags & _UTF8 else "cp437", "replace")
    if name != member.orig_filename:
        raise zipfile.BadZipFile(f"its header is of {name!r}")
    return member.header_offset + _HEADER_BYTES + name_bytes + extra_bytes
