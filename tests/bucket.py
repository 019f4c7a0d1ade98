"""A local server that stands in for a public bucket: ranges and ETags as Cloud Storage has them, and replies that go
wrong."""

import contextlib
import hashlib
import http.server
import threading
from collections.abc import Iterator


class Bucket(http.server.ThreadingHTTPServer):
    """Serves files from memory.

    Attributes:
        files: by path, without the leading slash.
        address: of the server.
        requests: (path, first byte asked for) of each GET, in order; starts: the second of them.
        ranges: knows the Range header.
        tags: sends an ETag.
        lengths: tells how long replies are.
        cut: bytes of a reply after which the connection breaks; None for never.
        statuses: answered to the next requests instead of a file.
        gate: a reply waits for it before its last byte.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.requests: list[tuple[str, int]] = []
        self.ranges, self.tags, self.lengths = True, True, True
        self.cut: int | None = None
        self.statuses: list[int] = []
        self.gate = threading.Event()
        self.gate.set()

    @property
    def starts(self) -> list[int]:
        return [start for _, start in self.requests]

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # a client that went away


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Bucket

    def do_GET(self) -> None:
        path, wanted = self.path.lstrip("/"), self.headers.get("Range")
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
        self.server.requests.append((path, start))
        data = self.server.files.get(path)
        if self.server.statuses or data is None:
            self.send_error(self.server.statuses.pop(0) if self.server.statuses else 404)
            return
        tag = f'"{hashlib.md5(data).hexdigest()}"'
        if not self.server.ranges or self.headers.get("If-Range", tag) != tag:
            start = 0
        if start and start >= len(data):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(data)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        if self.server.lengths:
            self.send_header("Content-Length", str(len(data) - start))
        if self.server.tags:
            self.send_header("ETag", tag)
        self.end_headers()
        rest = data[start:] if self.server.cut is None else data[start : start + self.server.cut]
        self.wfile.write(rest[:-1])
        self.server.gate.wait(30)
        self.wfile.write(rest[-1:])

    def log_message(self, *arguments: object) -> None:
        pass


@contextlib.contextmanager
def serving() -> Iterator[Bucket]:
    """A bucket that serves while the block runs."""
    bucket = Bucket()
    thread = threading.Thread(target=bucket.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield bucket
    finally:
        bucket.gate.set()
        bucket.shutdown()
        bucket.server_close()
        thread.join()
