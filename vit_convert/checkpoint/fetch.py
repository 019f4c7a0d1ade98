"""Checkpoints by address: downloaded once, resumable, verified."""

import hashlib
import os
import pathlib
import urllib.parse

from vit_convert.bundle import hash_file
from vit_convert.checkpoint.containers import split_subtree
from vit_convert.errors import CheckpointError
from vit_convert.progress import Progress

_GCS = "https://storage.googleapis.com/"
_ATTEMPTS = 3  # in a row that bring nothing
_CHUNK_BYTES = 1 << 20
_SILENCE_S = 60  # a server that sends nothing for so long is gone


def is_address(path: str | os.PathLike[str]) -> bool:
    """Whether `fetch` is meant: `https://`, `http://` or `gs://`."""
    return os.fspath(path).startswith(("https://", "http://", "gs://"))


def local_path(address: str, folder: str | os.PathLike[str] = "checkpoints") -> pathlib.Path:
    """Where an address is kept: its base name and eight digits of its hash, because ViT-B_16.npz lies in several public folders.

    Args:
        address: `https://`, `http://` or `gs://`; a `#fragment` does not count.
        folder: where fetched checkpoints lie.

    Returns:
        The path, whether or not the file is there.
    """
    address = urllib.parse.urldefrag(address).url
    name = pathlib.PurePosixPath(urllib.parse.unquote(urllib.parse.urlsplit(address).path))
    return pathlib.Path(folder) / f"{name.stem}-{hashlib.sha256(address.encode()).hexdigest()[:8]}{name.suffix}"


def fetch(address: str, folder: str | os.PathLike[str] = "checkpoints", *, progress: Progress | None = None) -> pathlib.Path:
    """Downloads a checkpoint, unless it is there already.

    An interrupted download leaves a `.part` file, from which the next call continues.

    Args:
        address: `https://`, `http://` or `gs://bucket/path` (public buckets); `#sha256=<hex>` at its end is verified, and a
            sub-tree such as `:img` is kept.
        folder: where fetched checkpoints lie.
        progress: shows a bar; None shows nothing.

    Returns:
        The local file, with the sub-tree where the address has one.

    Raises:
        CheckpointError: no network, no such file, an incomplete reply, or another sha256 than the address says.
    """
    address, _, fragment = address.partition("#")
    address, subtree = split_subtree(address)
    sha256 = urllib.parse.parse_qs(fragment).get("sha256", [""])[0]
    path = local_path(address, folder)
    if not path.exists():
        url = _GCS + urllib.parse.quote(address.removeprefix("gs://"), safe="/+") if address.startswith("gs://") else address
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        _download(url, part, address, path, progress or Progress(quiet=True))
        _check_sha256(part, sha256, address)
        os.replace(part, path)
    else:
        _check_sha256(path, sha256, address)
    return pathlib.Path(f"{path}:{subtree}") if subtree else path


def _download(url: str, part: pathlib.Path, address: str, path: pathlib.Path, progress: Progress) -> None:
    import aiohttp
    import fsspec

    by_hand = _by_hand(url, address, path)
    # trust_env honours proxies; the default total timeout of five minutes would cut a large file.
    client = {"trust_env": True, "timeout": aiohttp.ClientTimeout(total=None, sock_connect=_SILENCE_S, sock_read=_SILENCE_S)}
    http = fsspec.filesystem("http", client_kwargs=client, skip_instance_cache=True)
    idle = 0
    while True:
        before = _size(part)
        try:
            size = http.info(url).get("size")
            _append(http, url, part, size, progress)
            if size is None or _size(part) == size:
                return
            failure = f"{_size(part)} of {size} bytes"
        except FileNotFoundError as e:  # fsspec's word for every failure of its first request; the cause is chained
            status = getattr(e.__cause__, "status", None)
            if status is not None:
                raise CheckpointError(
                    f"{address}: the server answers {status}", fix="Check the address; gsutil ls shows what a bucket holds."
                ) from e
            raise CheckpointError(f"{address}: cannot be fetched, is there a network? ({e.__cause__})", fix=by_hand) from e
        except (aiohttp.ClientError, TimeoutError, ConnectionError) as e:
            failure = str(e) or type(e).__name__
        idle = 0 if _size(part) > before else idle + 1
        if idle == _ATTEMPTS:
            raise CheckpointError(f"{address}: stopped at {before} bytes ({failure})", fix=f"Run again to continue. {by_hand}")


def _size(path: pathlib.Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _append(http: object, url: str, part: pathlib.Path, size: int | None, progress: Progress) -> None:
    """Asks for what is missing and appends it; starts over where the server sends the whole file instead."""
    have = _size(part)
    if have == size:
        return
    if size is not None and have > size:
        have = 0
    headers = {"Range": f"bytes={have}-"} if have else {}
    with http.open(url, "rb", block_size=0, size=size, headers=headers) as reply:  # type: ignore[attr-defined]
        resumed = have and reply.r.status == 206
        with open(part, "ab" if resumed else "wb") as f, progress.bar(f"fetching {part.stem}", size) as advance:
            advance(have if resumed else 0)
            while chunk := reply.read(_CHUNK_BYTES):
                f.write(chunk)
                advance(len(chunk))


def _check_sha256(path: pathlib.Path, expected: str, address: str) -> None:
    if expected and (found := hash_file(path)) != expected.lower():
        path.unlink()
        raise CheckpointError(
            f"{address}: sha256 {found}, expected {expected}; the file was removed", fix="Run again, or check the address and the sum."
        )


def _by_hand(url: str, address: str, path: pathlib.Path) -> str:
    gsutil = f" or gsutil cp '{address}' '{path}'" if address.startswith("gs://") else ""
    return f"On a machine with a network: curl -fL -C - -o '{path}' '{url}'{gsutil}."
