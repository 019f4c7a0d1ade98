import contextlib
import hashlib
import json
import multiprocessing
import os
import pathlib
import shutil
import signal
import socket
import time

import pytest

from vit_convert.checkpoint import fetch as fetching
from vit_convert.checkpoint.fetch import fetch, is_address, local_name, url_of
from vit_convert.core.errors import CheckpointError, UsageError

DATA = bytes(range(256)) * 20_000  # 5 MB
SHA256 = hashlib.sha256(DATA).hexdigest()
ADDRESS = "gs://models/augreg/B_16.npz"
SPAWN = multiprocessing.get_context("spawn")  # a fork would copy the server's threads, and JAX's


@pytest.fixture(autouse=True)
def _served(bucket):
    bucket.files["models/augreg/B_16.npz"] = DATA


@pytest.fixture
def part(tmp_path):
    return tmp_path / f"{local_name(ADDRESS)}.part"


def test_fetches_once(bucket, tmp_path):
    path = fetch(ADDRESS, tmp_path / "made")
    assert path == tmp_path / "made" / local_name(ADDRESS)
    assert path.read_bytes() == DATA
    assert fetch(ADDRESS, tmp_path / "made") == path
    assert bucket.requests == [("models/augreg/B_16.npz", 0)]
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_https_addresses_are_asked_as_they_are(bucket, tmp_path):
    assert fetch(f"{bucket.address}/models/augreg/B_16.npz", tmp_path).read_bytes() == DATA


def test_resumes_where_it_stopped(bucket, tmp_path, part):
    part.write_bytes(DATA[:1_000_000])
    assert fetch(ADDRESS, tmp_path).read_bytes() == DATA
    assert bucket.starts == [1_000_000]


def test_server_without_ranges_starts_over(bucket, tmp_path, part):
    bucket.ranges = False
    part.write_bytes(b"x" * 1_000_000)
    assert fetch(ADDRESS, tmp_path).read_bytes() == DATA


@pytest.mark.parametrize("tags", [True, False])
def test_cut_replies_are_continued(bucket, tmp_path, tags):
    bucket.cut, bucket.tags = 2_000_000, tags
    assert fetch(ADDRESS, tmp_path).read_bytes() == DATA
    assert bucket.starts == [0, 2_000_000, 4_000_000]


def test_reply_that_stays_incomplete(bucket, tmp_path, part):
    bucket.cut = 0
    part.write_bytes(DATA[:3_000_000])
    with pytest.raises(CheckpointError, match="stopped at 3000000 bytes") as error:
        fetch(ADDRESS, tmp_path)
    assert "Run again to continue" in error.value.fix
    assert part.read_bytes() == DATA[:3_000_000]
    assert len(bucket.starts) == 3  # tries
    bucket.cut = None
    assert fetch(ADDRESS, tmp_path).read_bytes() == DATA
    assert bucket.starts[-1] == 3_000_000


def test_file_that_is_replaced_between_two_tries(bucket, tmp_path, part):
    """Never the first half of one file and the second half of another."""
    bucket.cut = 2_000_000
    bucket.statuses = []
    served, other = bucket.files, DATA[::-1]
    with pytest.raises(CheckpointError):
        fetch(ADDRESS, tmp_path, accepts=lambda size: part.stat().st_size < 2_000_000)  # ends it with the first reply
    assert part.read_bytes() == DATA[:2_000_000]
    bucket.cut, served["models/augreg/B_16.npz"] = None, other
    assert fetch(ADDRESS, tmp_path).read_bytes() == other


@pytest.mark.parametrize(("stored", "starts"), [(DATA, [len(DATA)]), (DATA + b"more", [len(DATA) + 4, 0])])
def test_part_that_is_whole_or_longer(bucket, tmp_path, part, stored, starts):
    part.write_bytes(stored)
    assert fetch(ADDRESS, tmp_path).read_bytes() == DATA
    assert bucket.starts == starts


def test_reply_of_another_range(bucket, tmp_path, part, monkeypatch):
    part.write_bytes(DATA[:10])
    said = fetching._Reply(100, len(DATA), "")
    monkeypatch.setattr(fetching._Reply, "of", lambda reply: said)
    with pytest.raises(CheckpointError, match="bytes from 100 on were sent, but from 10 on requested"):
        fetch(ADDRESS, tmp_path)
    assert part.read_bytes() == DATA[:10]


def test_size_is_asked_before_anything_is_fetched(bucket, tmp_path):
    with pytest.raises(CheckpointError, match=f"{len(DATA)} bytes at .*not the size of the published file"):
        fetch(ADDRESS, tmp_path, accepts=lambda size: size == 7)
    assert not list(tmp_path.iterdir())


def test_size_of_a_reply_that_tells_none(bucket, tmp_path):
    bucket.lengths = False
    assert fetch(ADDRESS, tmp_path / "a", accepts=lambda size: size == len(DATA)).read_bytes() == DATA
    bucket.cut = 1_000_000
    with pytest.raises(CheckpointError, match=r"1000000 bytes at .*not the size of the published file"):
        fetch(ADDRESS, tmp_path / "b", accepts=lambda size: size == len(DATA))
    assert not (tmp_path / "b" / local_name(ADDRESS)).exists()


def test_sha256_is_verified(tmp_path):
    assert fetch(ADDRESS, tmp_path / "a", sha256=SHA256.upper()).read_bytes() == DATA
    with pytest.raises(CheckpointError, match=f"sha256 {SHA256}, expected {'0' * 64}"):
        fetch(ADDRESS, tmp_path / "b", sha256="0" * 64)
    assert not (tmp_path / "b" / local_name(ADDRESS)).exists()


@pytest.mark.parametrize("status", [403, 404])
def test_refusals(bucket, tmp_path, status):
    bucket.statuses = [status]
    with pytest.raises(CheckpointError, match=f"the server answers {status}"):
        fetch(ADDRESS, tmp_path)
    assert not list(tmp_path.iterdir())
    assert len(bucket.requests) == 1


def test_passing_failures_are_tried_again(bucket, tmp_path):
    bucket.statuses = [503, 429]
    assert fetch(ADDRESS, tmp_path).read_bytes() == DATA
    bucket.statuses = [503] * 3
    with pytest.raises(CheckpointError, match="the server answers 503"):
        fetch("gs://models/other.npz", tmp_path)


@pytest.fixture
def _no_network(monkeypatch):
    with socket.socket() as probe:  # a port on which nobody listens
        probe.bind(("127.0.0.1", 0))
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"127.0.0.1:{probe.getsockname()[1]}")


@pytest.mark.usefixtures("_no_network")
def test_without_a_network(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be fetched, is there a network") as error:
        fetch(ADDRESS, tmp_path / "a b", kept_as="B_16.npz")
    assert f"Put B_16.npz into {tmp_path}/a b/" in error.value.fix
    assert f"curl -fL -C - -o '{tmp_path}/a b/B_16.npz' {url_of(ADDRESS)}" in error.value.fix
    assert not list((tmp_path / "a b").iterdir())


@pytest.mark.usefixtures("_no_network")
def test_without_a_network_in_the_middle(tmp_path, part):
    part.write_bytes(DATA[:10])
    with pytest.raises(CheckpointError, match="stopped at 10 bytes"):
        fetch(ADDRESS, tmp_path)
    assert part.read_bytes() == DATA[:10]


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written") as error:
        fetch(ADDRESS, tmp_path / "file" / "checkpoints")
    assert "--checkpoints" in error.value.fix


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux's device that is always full")
def test_full_disk(tmp_path, part):
    part.symlink_to("/dev/full")
    with pytest.raises(UsageError, match="no space left on the disk"):
        fetch(ADDRESS, tmp_path)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="reads Linux's /proc")
def test_second_process_waits_for_the_first(bucket, tmp_path, part):
    bucket.gate.clear()
    workers = [SPAWN.Process(target=fetch, args=(ADDRESS, tmp_path)) for _ in range(3)]
    for worker in workers:
        worker.start()
    while not all(has_open(worker.pid, part) for worker in workers):
        assert all(worker.is_alive() for worker in workers)
        time.sleep(0.01)
    bucket.gate.set()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert bucket.starts == [0]
    assert [file.name for file in tmp_path.iterdir()] == [local_name(ADDRESS)]
    assert (tmp_path / local_name(ADDRESS)).read_bytes() == DATA


def has_open(pid, path):
    names = []
    for link in pathlib.Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):  # closed meanwhile
            names.append(os.readlink(link))
    return str(path) in names


def test_killed_process_is_taken_over_from(bucket, tmp_path, part):
    bucket.gate.clear()
    worker = SPAWN.Process(target=fetch, args=(ADDRESS, tmp_path))
    worker.start()
    while not (part.exists() and part.stat().st_size > 1_000_000):
        time.sleep(0.01)
    os.kill(worker.pid, signal.SIGKILL)
    worker.join(60)
    have = part.stat().st_size
    bucket.gate.set()
    assert fetch(ADDRESS, tmp_path).read_bytes() == DATA
    assert bucket.starts == [0, have]


def test_part_that_its_maker_removes_while_another_waits(tmp_path, part, monkeypatch):
    """The one who waits locks a file that is gone by then: it must not write into it."""
    asked, flock = [], fetching.fcntl.flock

    def meddling(file, operation):
        flock(file, operation)
        if not asked:
            part.unlink()
        asked.append(operation)

    monkeypatch.setattr(fetching.fcntl, "flock", meddling)
    assert fetch(ADDRESS, tmp_path).read_bytes() == DATA
    assert len(asked) == 2


def test_file_that_another_process_made_while_this_one_waited(bucket, tmp_path, part, monkeypatch):
    flock = fetching.fcntl.flock

    def meddling(file, operation):
        flock(file, operation)
        shutil.move(part, tmp_path / local_name(ADDRESS))

    monkeypatch.setattr(fetching.fcntl, "flock", meddling)
    assert fetch(ADDRESS, tmp_path).exists()
    assert not bucket.requests and not part.exists()


def test_version_is_remembered_beside_the_part(bucket, tmp_path, part):
    bucket.cut, bucket.statuses = 1000, []
    with pytest.raises(CheckpointError):
        fetch(ADDRESS, tmp_path, accepts=lambda size: not part.stat().st_size)
    memory = json.loads(part.with_name(f"{part.name}.json").read_text())
    assert memory == {"address": ADDRESS, "version": f'"{hashlib.md5(DATA).hexdigest()}"', "size": len(DATA)}


def test_equal_base_names_do_not_collide():
    first = local_name("gs://vit_models/imagenet21k/ViT-B_16.npz")
    assert first != local_name("gs://vit_models/sam/ViT-B_16.npz")
    assert first.startswith("ViT-B_16-") and first.endswith(".npz")
    assert local_name("gs://b/imagenet21k/R26%2BViT-B_32.npz").startswith("R26+ViT-B_32-")


def test_urls(monkeypatch):
    monkeypatch.delenv("STORAGE_EMULATOR_HOST")
    assert url_of("gs://vit_models/imagenet21k+imagenet2012/a b.npz") == (
        "https://storage.googleapis.com/vit_models/imagenet21k+imagenet2012/a%20b.npz"
    )
    assert url_of("https://host/a.npz") == "https://host/a.npz"
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "localhost:8000")
    assert url_of("gs://b/a.npz") == "http://localhost:8000/b/a.npz"


def test_what_is_an_address():
    assert is_address("gs://vit_models/sam/ViT-B_16.npz") and is_address("https://host/x.npz")
    assert not is_address("checkpoints/vit_digits.npz")
