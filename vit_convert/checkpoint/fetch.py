"""Checkpoints by address: downloaded once, resumable, verified, by one process at a time."""

import contextlib
import dataclasses
import fcntl
import hashlib
import http.client
import os
import pathlib
import re
import shlex
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from typing import IO

from vit_convert.core.bundle import disk_errors, hash_file, read_json, write_json
from vit_convert.core.errors import CheckpointError, NetworkError
from vit_convert.core.progress import Progress, human_bytes

_GCS = "https://storage.googleapis.com"
_EMULATOR = "STORAGE_EMULATOR_HOST"  # Google's own name for a substitute for Cloud Storage: a mirror or test server
_ATTEMPTS = 3  # consecutive attempts that bring nothing
_PAUSE_S = 1.0  # between attempts
_CHUNK_BYTES = 1 << 20
_SILENCE_S = 60  # a server that sends nothing for this long is gone
_PASSING = (408, 429, 500, 502, 503, 504)  # statuses worth another try
_NOT_SATISFIABLE = 416  # the file has no such byte


def is_address(path: str | os.PathLike[str]) -> bool:
    """Whether this is an address to `fetch`: `https://`, `http://` or `gs://`."""
    return os.fspath(path).startswith(("https://", "http://", "gs://"))


def local_name(address: str) -> str:
    """The file name for an address: its base name and eight digits of its hash, because several public folders hold a
    ViT-B_16.npz.
    """
    name = pathlib.PurePosixPath(urllib.parse.unquote(urllib.parse.urlsplit(address).path))
    return f"{name.stem}-{hashlib.sha256(address.encode()).hexdigest()[:8]}{name.suffix}"


def url_of(address: str) -> str:
    """The URL to request: an `https://` address as it is, a `gs://` one at Cloud Storage or STORAGE_EMULATOR_HOST."""
    if not address.startswith("gs://"):
        return address
    host = os.environ.get(_EMULATOR, "").rstrip("/") or _GCS
    host = host if "://" in host else f"http://{host}"
    return f"{host}/{urllib.parse.quote(address.removeprefix('gs://'), safe='/+')}"


def fetch(
    address: str,
    folder: str | os.PathLike[str],
    *,
    sha256: str = "",
    accepts: Callable[[int], bool] = lambda num_bytes: True,
    kept_as: str = "",
    progress: Progress | None = None,
) -> pathlib.Path:
    """Downloads a checkpoint, unless it is there already.

    An interrupted download leaves a `.part` file, from which the next call continues where the server still has the
    same file. Of two processes that want one address, the second waits for the first.

    Args:
        address: `https://`, `http://` or `gs://bucket/path` (public buckets).
        folder: where the file goes, under its `local_name`.
        sha256: that a downloaded file must have, in hex; "" accepts any.
        accepts: whether a file of this many bytes can be the right one; called before anything is downloaded.
        kept_as: the name of a file that somebody put there by hand; "" for `local_name`.
        progress: shows a bar; None for no bar.

    Returns:
        The local file.

    Raises:
        CheckpointError: no network, no such file, an incomplete reply, the wrong size or sha256, or a folder that
            cannot be written.
        UsageError: the disk is full.
    """
    path = pathlib.Path(folder) / local_name(address)
    progress = progress or Progress(quiet=True)
    if path.exists():
        if not accepts(size := path.stat().st_size):
            raise CheckpointError(
                f"{path}: {size} bytes, which is not the size of {address}",
                fix="Remove it; the next run downloads it again.",
            )
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _alone(path, progress) as part:
            if part is not None:
                by_hand = _by_hand(address, path.parent / (kept_as or path.name))
                download = _Download(address, url_of(address), part, accepts, by_hand, progress)
                with disk_errors(path):
                    download.run()
                _check_sha256(part, sha256, address)
                os.replace(part, path)
                download.memory.unlink(missing_ok=True)
    except OSError as e:  # of the folder: the download reports its own errors
        refused = f"{path}: cannot be written ({e.strerror or e})"
        raise CheckpointError(refused, fix="Give a writable folder with --checkpoints.") from e
    return path


@contextlib.contextmanager
def _alone(path: pathlib.Path, progress: Progress) -> Iterator[pathlib.Path | None]:
    """Yields the `.part` file of `path`, locked, or None where another process finished the download while this one
    waited."""
    part = path.with_name(path.name + ".part")
    while True:
        with open(part, "ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                progress.say(f"{path.name}: another process is downloading it; waiting")
                fcntl.flock(file, fcntl.LOCK_EX)
            if path.exists():  # `part` was renamed to it, or the open above created it anew
                if _is(part, file):
                    part.unlink()
                yield None
                return
            if _is(part, file):  # otherwise its owner removed it meanwhile: lock the new one
                try:
                    yield part
                finally:
                    if part.exists() and not part.stat().st_size:
                        part.unlink()
                return


def _is(path: pathlib.Path, file: IO[bytes]) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


@dataclasses.dataclass(frozen=True)
class _Reply:
    """What a reply's headers say.

    Attributes:
        start: offset of its first byte.
        size: of the whole file; None if the server does not say.
        version: of the file, its ETag or date, so that no other file is appended to it; "" if unknown.
    """

    start: int
    size: int | None
    version: str

    @classmethod
    def of(cls, reply: http.client.HTTPResponse) -> "_Reply":
        version = reply.headers.get("ETag", "")
        if not version.startswith('"'):  # If-Range does not allow weak tags
            version = reply.headers.get("Last-Modified", "")
        part = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", reply.headers.get("Content-Range", "").strip())
        if reply.status == 206 and part:
            return cls(int(part[1]), None if part[2] == "*" else int(part[2]), version)
        if reply.status == 206:
            raise http.client.HTTPException(
                f"the server sent a part without saying which ({reply.headers.get('Content-Range')})"
            )
        length = reply.headers.get("Content-Length", "")
        return cls(0, int(length) if length.isdecimal() else None, version)


@dataclasses.dataclass(frozen=True)
class _Download:
    """One download into a `.part` file that no other process holds."""

    address: str
    url: str
    part: pathlib.Path
    accepts: Callable[[int], bool]
    by_hand: str
    progress: Progress

    @property
    def memory(self) -> pathlib.Path:
        """A file beside the `.part` file, with the version of the file that it is a part of."""
        return self.part.with_name(self.part.name + ".json")

    def run(self) -> None:
        """Requests what is missing until the file is complete."""
        idle = 0
        while True:
            before = self._have()
            try:
                if self._continue():
                    return self._require(self._have())  # the server did not say the size
                failure = f"{human_bytes(self._have())} came"
            except urllib.error.HTTPError as e:
                if e.code not in _PASSING:
                    refused = f"{self.address}: the server answers {e.code}"
                    raise CheckpointError(refused, fix="Check the address; gsutil ls shows what a bucket holds.") from e
                failure = f"the server answers {e.code}"
            except (urllib.error.URLError, http.client.HTTPException, ssl.SSLError, TimeoutError, ConnectionError) as e:
                failure = str(getattr(e, "reason", "") or e) or type(e).__name__
                if not self._have():
                    offline = f"{self.address}: cannot be fetched, is there a network? ({failure})"
                    raise NetworkError(offline, fix=self.by_hand) from e
            idle = 0 if self._have() > before else idle + 1
            if idle == _ATTEMPTS:
                stopped = f"{self.address}: stopped at {before} bytes ({failure})"
                raise NetworkError(stopped, fix=f"Run again to continue. {self.by_hand}")
            time.sleep(_PAUSE_S if idle else 0)

    def _require(self, size: int) -> None:
        if not self.accepts(size):
            raise CheckpointError(
                f"{self.address}: {size} bytes at {self.url}, which is not the size of the published file",
                fix="It was replaced. Append #sha256=<its sum> to the address to accept it by its sum, whatever its "
                "size.",
            )

    def _have(self) -> int:
        return self.part.stat().st_size

    def _continue(self) -> bool:
        """Sends one request and appends what comes; returns whether the file is complete."""
        have, version = self._have(), (read_json(self.memory) or {}).get("version", "")
        headers = {"Accept-Encoding": "identity", "User-Agent": "vit_convert"}
        if have:
            headers |= {"Range": f"bytes={have}-"} | ({"If-Range": version} if version else {})
        try:
            with urllib.request.urlopen(urllib.request.Request(self.url, headers=headers), timeout=_SILENCE_S) as reply:
                return self._take(reply, _Reply.of(reply), have)
        except urllib.error.HTTPError as e:
            if e.code != _NOT_SATISFIABLE or not have:
                raise
            if e.headers.get("Content-Range", "").strip() == f"bytes */{have}":
                return True
            os.truncate(self.part, 0)
            return False

    def _take(self, reply: http.client.HTTPResponse, said: _Reply, have: int) -> bool:
        """Appends what a reply brings; returns whether the file is complete."""
        if said.size is not None:
            self._require(said.size)
        if said.start not in (0, have):
            raise http.client.HTTPException(f"bytes from {said.start} on were sent, but from {have} on requested")
        if said.start != have:  # the whole file: no support for ranges, or another version by now
            os.truncate(self.part, 0)
        size = "" if said.size is None else f" ({human_bytes(said.size)})"
        self.progress.say(
            f"fetching {self.address}{size} into {self.part.parent}{os.sep}" + (", continued" if said.start else "")
        )
        write_json(self.memory, {"address": self.address, "version": said.version, "size": said.size})
        with open(self.part, "ab") as file, self.progress.bar(f"fetching {self.part.stem}", said.size) as advance:
            advance(file.tell())
            while chunk := reply.read(_CHUNK_BYTES):
                file.write(chunk)
                advance(len(chunk))
            return said.size is None or file.tell() == said.size


def _check_sha256(part: pathlib.Path, expected: str, address: str) -> None:
    if expected and (found := hash_file(part)) != expected.lower():
        part.unlink()
        raise CheckpointError(
            f"{address}: sha256 {found}, expected {expected}; the file was removed",
            fix="Run again, or check the address and the sum.",
        )


def _by_hand(address: str, path: pathlib.Path) -> str:
    target = shlex.quote(os.fspath(path))
    gsutil = f" or gsutil cp {shlex.quote(address)} {target}" if address.startswith("gs://") else ""
    return (
        f"Put {path.name} into {path.parent}{os.sep}, or into a folder given with --checkpoints; "
        f"on a machine with a network: curl -fL -C - -o {target} {shlex.quote(url_of(address))}{gsutil}."
    )
