import hashlib
import http.server
import socket
import threading

import pytest

from vit_convert.checkpoint.containers import split_subtree
from vit_convert.checkpoint.fetch import fetch, is_address, local_path
from vit_convert.errors import CheckpointError

DATA = bytes(range(256)) * 20_000  # 5 MB
SHA256 = hashlib.sha256(DATA).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves DATA with ranges, as Cloud Storage does; `server` notes where replies start, and can cut them or ignore ranges."""

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        if "missing" in self.path:
            self.send_error(404)
            return
        wanted = self.headers.get("Range")
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and self.server.ranges else 0
        if body:
            self.server.starts.append(start)
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(DATA) - 1}/{len(DATA)}")
        self.send_header("Content-Length", str(len(DATA) - start))
        self.end_headers()
        if body:
            end = min(start + self.server.cut, self.server.stop)
            self.wfile.write(DATA[start:end])
            self.close_connection = end < len(DATA)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server():
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    running.starts, running.ranges, running.cut, running.stop = [], True, len(DATA), len(DATA)
    running.address = f"http://127.0.0.1:{running.server_port}"
    thread = threading.Thread(target=running.serve_forever, daemon=True)
    thread.start()
    yield running
    running.shutdown()
    running.server_close()
    thread.join()


def test_fetches_once(server, tmp_path):
    path = fetch(f"{server.address}/augreg/B_16.npz", tmp_path)
    assert path.read_bytes() == DATA
    assert fetch(f"{server.address}/augreg/B_16.npz", tmp_path) == path
    assert server.starts == [0]
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_resumes_where_it_stopped(server, tmp_path):
    address = f"{server.address}/B_16.npz"
    path = local_path(address, tmp_path)
    path.with_name(path.name + ".part").write_bytes(DATA[:1_000_000])
    assert fetch(address, tmp_path).read_bytes() == DATA
    assert server.starts == [1_000_000]


def test_server_without_ranges_starts_over(server, tmp_path):
    server.ranges = False
    address = f"{server.address}/B_16.npz"
    path = local_path(address, tmp_path)
    path.with_name(path.name + ".part").write_bytes(b"x" * 1_000_000)
    assert fetch(address, tmp_path).read_bytes() == DATA


def test_cut_replies_are_continued(server, tmp_path):
    server.cut = 2_000_000
    assert fetch(f"{server.address}/B_16.npz", tmp_path).read_bytes() == DATA
    assert server.starts[0] == 0 and len(server.starts) > 1
    assert server.starts == sorted(set(server.starts))  # each continues where the one before stopped


def test_reply_that_stays_incomplete(server, tmp_path):
    server.stop = 3_000_000
    address = f"{server.address}/B_16.npz#sha256={SHA256}"
    with pytest.raises(CheckpointError, match=r"stopped at \d+ bytes .*Not enough data") as error:
        fetch(address, tmp_path)
    assert "Run again to continue" in error.value.fix
    (part,) = tmp_path.iterdir()
    assert part.suffix == ".part" and DATA.startswith(part.read_bytes())
    server.stop = len(DATA)
    got = part.stat().st_size
    assert fetch(address, tmp_path).read_bytes() == DATA
    assert server.starts[-1] == got


def test_sha256_is_verified(server, tmp_path):
    assert fetch(f"{server.address}/B_16.npz#sha256={SHA256}", tmp_path).read_bytes() == DATA
    with pytest.raises(CheckpointError, match=f"sha256 {SHA256}, expected {'0' * 64}"):
        fetch(f"{server.address}/L_16.npz#sha256={'0' * 64}", tmp_path)
    assert len(list(tmp_path.iterdir())) == 1


def test_subtree_is_kept(server, tmp_path):
    path = fetch(f"{server.address}/siglip.npz:img#sha256={SHA256}", tmp_path)
    assert split_subtree(path) == (str(local_path(f"{server.address}/siglip.npz", tmp_path)), "img")
    assert local_path(f"{server.address}/siglip.npz", tmp_path).read_bytes() == DATA


def test_no_such_file(server, tmp_path):
    with pytest.raises(CheckpointError, match="the server answers 404"):
        fetch(f"{server.address}/missing.npz", tmp_path)
    assert not list(tmp_path.iterdir())


def test_without_a_network(tmp_path):
    with socket.socket() as probe:  # a port on which nobody listens
        probe.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{probe.getsockname()[1]}/B_16.npz"
    with pytest.raises(CheckpointError, match="cannot be fetched, is there a network") as error:
        fetch(address, tmp_path)
    assert f"curl -fL -C - -o '{local_path(address, tmp_path)}' '{address}'" in error.value.fix


def test_equal_base_names_do_not_collide():
    first = local_path("gs://vit_models/imagenet21k/ViT-B_16.npz")
    second = local_path("gs://vit_models/sam/ViT-B_16.npz")
    assert first != second
    assert first.name.startswith("ViT-B_16-") and first.suffix == ".npz"
    assert local_path("gs://vit_models/sam/ViT-B_16.npz#sha256=00") == second
    assert local_path("gs://b/imagenet21k/R26%2BViT-B_32.npz").name.startswith("R26+ViT-B_32-")


def test_what_is_an_address():
    assert is_address("gs://vit_models/sam/ViT-B_16.npz") and is_address("https://host/x.npz")
    assert not is_address("checkpoints/vit_digits.npz")
