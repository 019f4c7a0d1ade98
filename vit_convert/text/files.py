"""Text files from anybody, read within bounds: prompts, vocabularies, merges."""

import gzip
import io
import os
import pathlib
import zlib
from collections.abc import Callable

from vit_convert.core.errors import CalibrationError

LARGEST_BYTES = 1 << 26  # of a tokenizer's file; Gemma's tokenizer.json is 34 MB
_CHUNK_BYTES = 1 << 16
# characters per line; a longer prompt would be cut to some 64 tokens anyway, and is surely a mistake
_LONGEST = 1 << 14


def read_bytes(path: str | os.PathLike[str], what: str) -> bytes:
    """Reads a file that should be small.

    Args:
        path: of the file; one named `*.gz` is inflated.
        what: for messages: "prompts", "tokenizer".

    Raises:
        CalibrationError: it does not exist, cannot be read, or is too large.
    """
    path = pathlib.Path(path)
    try:
        if path.is_dir():
            raise CalibrationError(f"{what} {path}: a folder", fix="Give a file.")
        with open(path, "rb") as file:
            content = read_bounded(file.read)
        if path.suffix == ".gz" and len(content) <= LARGEST_BYTES:
            with gzip.GzipFile(fileobj=io.BytesIO(content)) as inflated:
                content = read_bounded(inflated.read)
    except (OSError, ValueError, EOFError, zlib.error) as e:
        # OSError includes gzip's errors; ValueError is for a path with a zero byte
        raise CalibrationError(f"{what} {path}: {getattr(e, 'strerror', None) or e}", fix="Check the path.") from e
    if len(content) > LARGEST_BYTES:
        raise CalibrationError(
            f"{what} {path}: more than {LARGEST_BYTES:,} bytes", fix="Check that it is the file you mean."
        )
    return content


def read_bounded(read: Callable[[int], bytes]) -> bytes:
    """The rest of a file, or one byte more than allowed; memory grows with the file, not with the bound."""
    parts: list[bytes] = []
    left = LARGEST_BYTES + 1
    while left and (part := read(min(left, _CHUNK_BYTES))):
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


def read_lines(path: str | os.PathLike[str], what: str, *, fix: str = "Save it as UTF-8.") -> list[str]:
    """Reads the lines of a text file, without their line ends.

    Args:
        path: of the file, UTF-8.
        what: for messages.
        fix: what to do if it is no text.

    Raises:
        CalibrationError: see `read_bytes`; or it is not such a text.
    """
    try:
        text = read_bytes(path, what).decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise CalibrationError(f"{what} {path}: not text ({e})", fix=fix) from e
    # not splitlines, which splits at what a vocabulary holds as a token: "\x85", "\u2028"
    lines = text.replace("\r\n", "\n").split("\n")
    if lines and not lines[-1]:
        lines.pop()
    for i, line in enumerate(lines):
        if len(line) > _LONGEST or "\0" in line:
            raise CalibrationError(
                f"{what} {path}: line {i + 1} is not a line of text ({len(line)} characters)", fix="Give one a line."
            )
    return lines
