"""A workdir in an object store: a bundle is there when its last file is, whatever was killed before."""

import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import time

import pytest

pytest.importorskip("fsspec")

import fsspec

from vit_convert.batch import remote_lock
from vit_convert.batch.__main__ import main
from vit_convert.batch.devices import Device
from vit_convert.batch.engines import EngineSettings, Tasks
from vit_convert.batch.job import Job
from vit_convert.batch.outcome import Outcome
from vit_convert.batch.record import BatchRecord
from vit_convert.batch.remote import COMMIT, CheckpointIdentity, Remote, StoreError, is_remote
from vit_convert.batch.remote_engines import kept_of, run_task
from vit_convert.batch.remote_lock import hold_remote
from vit_convert.batch.run import Settings, run_job
from vit_convert.batch.stored import identity_of, is_same
from vit_convert.core.bundle import Bundle
from vit_convert.core.errors import HeldError, UsageError

DONE = Outcome("b", "b.npz", "done", 0, 2.5)


@pytest.fixture
def remote(tmp_path):
    return Remote(f"memory://{tmp_path.name}/out")


@pytest.fixture
def bundle(tmp_path):
    made = Bundle(tmp_path / "here" / "b")
    (made.root / "engines" / "x").mkdir(parents=True)
    for name in ("model.onnx", "report.json", "engines/x/fp16.plan"):
        (made.root / name).write_bytes(name.encode() * 3)
    (made.root / ".lock").touch()
    return made


def names(remote):
    return sorted(path.removeprefix(remote.path() + "/") for path in remote._fs.find(remote.path()))


def puts(remote, monkeypatch):
    """Notes what is sent and removed; returns the list."""
    sent, put, remove, write = [], remote._fs.put_file, remote._fs.rm_file, remote._fs.pipe_file
    monkeypatch.setattr(remote._fs, "put_file", lambda a, b: (put(a, b), sent.append(("put", b.rpartition("/")[2]))))
    monkeypatch.setattr(remote._fs, "pipe_file", lambda a, b: (write(a, b), sent.append(("put", a.rpartition("/")[2]))))
    monkeypatch.setattr(remote._fs, "rm_file", lambda a: (remove(a), sent.append(("rm", a.rpartition("/")[2]))))
    return sent


def test_which_workdirs_are_remote():
    assert is_remote("gs://b/out") and is_remote("s3://b") and is_remote("memory://x")
    assert not any(map(is_remote, ("out", "/tmp/out", "a:/b", "./x://y")))


def test_a_bundle_comes_back_as_it_was(remote, bundle, tmp_path):
    assert remote.commits(["b"]) == {}
    remote.push(bundle, "key", CheckpointIdentity(sha256="0"), DONE)
    assert names(remote) == ["b/commit.json", "b/engines/x/fp16.plan", "b/model.onnx", "b/report.json"]
    commit = remote.commits(["b", "c"])["b"]
    assert (commit.key, commit.checkpoint, commit.outcome) == ("key", CheckpointIdentity(sha256="0"), DONE)
    remote.pull("b", tmp_path / "there", commit)
    for name in commit.files:
        assert (tmp_path / "there" / name).read_bytes() == (bundle.root / name).read_bytes()


def test_the_commit_is_the_first_to_go_and_the_last_to_come(remote, bundle, monkeypatch):
    remote.push(bundle, "key", CheckpointIdentity(), DONE)
    (bundle.root / "model.onnx").write_text("another")
    (bundle.root / "report.json").unlink()
    sent = puts(remote, monkeypatch)
    remote.push(bundle, "key", CheckpointIdentity(), DONE)
    # What did not change is not sent again, and what is no more goes.
    assert sent == [("rm", COMMIT), ("put", "model.onnx"), ("rm", "report.json"), ("put", COMMIT)]


@pytest.mark.parametrize("after", range(4))
def test_an_upload_that_was_killed_is_no_bundle(remote, bundle, monkeypatch, after):
    sent, write = puts(remote, monkeypatch), remote._fs.put_file

    def killed(*args):
        if len(sent) == after:
            raise KeyboardInterrupt
        return write(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(remote._fs, "put_file", killed)
        if after == 3:
            patch.setattr(remote._fs, "pipe_file", killed)
        remote.push(bundle, "key", CheckpointIdentity(), DONE)
    assert remote.commits(["b"]) == {} and len(names(remote)) == after
    remote.push(bundle, "key", CheckpointIdentity(), DONE)
    assert set(remote.commits(["b"])) == {"b"}


@pytest.mark.parametrize("text", [b"", b"[]", b"{}", b'{"schema": "vit_convert.commit/1", "files": 3}', b"\xff"])
def test_what_is_no_commit(remote, text):
    remote.write(f"b/{COMMIT}", text)
    assert remote.commits(["b"]) == {}


def test_what_was_changed_after_its_commit_is_refused(remote, bundle, tmp_path):
    remote.push(bundle, "key", CheckpointIdentity(), DONE)
    remote.write("b/model.onnx", b"another's")
    with pytest.raises(StoreError, match=r"b/model\.onnx: is not the file that was committed"):
        remote.pull("b", tmp_path / "there", remote.commits(["b"])["b"])


def test_a_store_that_fails_may_pass_and_one_that_refuses_may_not(remote, bundle, monkeypatch, tmp_path):
    def fail(error):
        def put(*args):
            raise error

        monkeypatch.setattr(remote._fs, "put_file", put)

    fail(OSError("reset by peer"))
    with pytest.raises(StoreError, match=r"b/engines/x/fp16\.plan: OSError: reset by peer"):
        remote.push(bundle, "key", CheckpointIdentity(), DONE)
    for error, said in ((PermissionError("no key"), "refused"), (FileNotFoundError("no bucket"), "is not there")):
        fail(error)
        with pytest.raises(UsageError, match=said) as caught:
            remote.push(bundle, "key", CheckpointIdentity(), DONE)
        assert not isinstance(caught.value, StoreError)


def test_an_address_that_nobody_knows():
    with pytest.raises(UsageError, match="--workdir=nosuch://x"):
        Remote("nosuch://x")


def test_the_identity_of_a_checkpoint(tmp_path):
    path, folder = tmp_path / "a.npz", tmp_path / "orbax"
    path.write_bytes(b"one")
    known = identity_of(str(path), [])
    assert is_same(known, str(path), []) and is_same(known, "a.npz", [str(tmp_path)])
    os.utime(path, ns=(1, 1))  # as after a copy
    assert is_same(known, str(path), [])
    path.write_bytes(b"two")
    assert not is_same(known, str(path), [])
    folder.mkdir()
    (folder / "x").write_text("1")
    known = identity_of(str(folder), [])
    assert is_same(known, str(folder), [])
    (folder / "y").write_text("2")
    assert not is_same(known, str(folder), [])
    known = identity_of("gs://b/a.npz", [])
    assert is_same(known, "gs://b/a.npz", []) and not is_same(known, "gs://b/c.npz", [])


def test_one_batch_at_a_time(remote, monkeypatch):
    refused = pytest.raises(HeldError, match=r"another batch works there .*the first")
    with hold_remote(remote, ".batch.lock", "the first"), refused, hold_remote(remote, ".batch.lock", "x"):
        pass
    assert names(remote) == []


@pytest.mark.parametrize(
    ("change", "ago_s", "dead"),
    [
        ({}, 1000, False),  # a process of this machine that lives, whatever its clock said
        ({"pid": 2**22 + 1}, 0, True),  # one that is gone
        ({"boot": "another"}, 1000, True),
        ({"boot": "another"}, 10, False),
    ],
)
def test_a_dead_holder_is_passed_over(remote, change, ago_s, dead):
    holder = {**remote_lock.me().to_dict(), **change}
    remote.write(".l", json.dumps({"holder": holder, "time": time.time() - ago_s}).encode())
    if dead:
        with hold_remote(remote, ".l", "x"):
            assert json.loads(remote.read(".l"))["holder"]["command"] == "x"
    else:
        with pytest.raises(HeldError), hold_remote(remote, ".l", "x"):
            pass


@pytest.mark.parametrize("text", [b"[]", b"x", b'{"holder": 3}'])
def test_what_is_no_lock_holds_nothing(remote, text):
    remote.write(".l", text)
    with hold_remote(remote, ".l", "x"):
        pass
    assert remote.read(".l") is None


def test_engines_are_fetched_and_committed_again(remote, bundle, tmp_path):
    """A shell script plays TensorRT."""
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/sh\nmkdir -p "$4/engines/y" && echo plan >"$4/engines/y/fp16.plan"; exit $(cat "$0.code")\n'
    )
    python.chmod(0o755)
    (tmp_path / "python.code").write_text("8")
    bundle.manifest.write_text("{}")
    remote.push(bundle, "key", CheckpointIdentity(), DONE)
    shutil.rmtree(bundle.root)
    settings, work = EngineSettings(("build",), str(python), remote=remote.address), str(tmp_path / "work")
    outcome = run_task(Tasks(), work, "b", settings, Device("0", "L4"))
    assert (outcome.status, outcome.exit_code) == ("failed", 8) and kept_of(work, "b", settings, "L4") is None
    assert "b/engines/y/fp16.plan" in names(remote)  # what was built before it failed need not be built again
    (tmp_path / "python.code").write_text("0")
    assert run_task(Tasks(), work, "b", settings, Device("0", "L4")).status == "done"
    again = kept_of(work, "b", settings, "L4")
    assert again is not None and again.status == "fresh" and kept_of(work, "b", settings, "T4") is None
    assert not (tmp_path / "work" / "b").exists() and remote.commits(["b"])["b"].outcome == DONE
    assert run_task(Tasks(), work, "c", settings, Device("0")).error.endswith("c: is not committed")


QUICK = ("--config.precision=fp32", "--config.engine.backend=none", "--config.check.num_images=2", "--nopage")


def test_a_conversion_whose_upload_fails_may_pass_and_stays_here(tmp_path, checkpoints, monkeypatch):
    (tmp_path / "there").write_text("a file where the store is to be")
    job = Job("b", str(checkpoints[0]), tuple(QUICK[:3]))
    settings = Settings(str(tmp_path / "here"), until="export", remote=f"file://{tmp_path / 'there'}")
    outcome = run_job(job, settings)
    assert (outcome.status, outcome.exit_code, outcome.passing) == ("failed", 2, True), outcome
    assert "there/b/" in outcome.error and (tmp_path / "here" / "b" / "model.onnx").exists()


def batch(*words):
    return main(["vit_convert.batch", *map(str, words)])


@pytest.mark.slow
def test_a_batch_goes_there_and_goes_on_from_there(tmp_path, checkpoints):
    """From another machine, as it were: nothing is left here."""
    zoo = tmp_path / "zoo"
    zoo.mkdir()
    for path in checkpoints[:2]:
        shutil.copy(path, zoo)
    words = [f"--checkpoints={zoo}/mu0.npz,{zoo}/mu1.npz,{zoo}/mu2.npz", *QUICK, "--quiet", "--jobs=1"]
    words += [f"--workdir=file://{tmp_path / 'there'}", f"--scratch={tmp_path / 'here'}"]

    def statuses():
        found = BatchRecord.read(tmp_path / "there" / "batch.json")
        return [job.status for job in found.jobs]

    assert batch(*words) == 9 and statuses() == ["done", "done", "failed"]
    shutil.rmtree(tmp_path / "here")
    shutil.copy(checkpoints[2], zoo)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "there").glob("mu[01]/*")}
    assert batch(*words, "--only_failed") == 0 and statuses() == ["done", "done", "done"]
    assert batch(*words) == 0 and statuses() == ["fresh"] * 3
    assert before == {path: path.stat().st_mtime_ns for path in before} and not (tmp_path / "here").exists()
    shutil.copy(checkpoints[2], zoo / "mu0.npz")
    assert batch(*words) == 0 and statuses() == ["done", "fresh", "fresh"]
    lines = (tmp_path / "there" / "batch.events.jsonl").read_text().splitlines()
    assert sum('"event": "batch",' in line for line in lines) == 4  # all commands', from wherever


SLOW_STORE = """
import time, fsspec
from fsspec.implementations.local import LocalFileSystem

class Slow(LocalFileSystem):
    protocol = "slow"
    def __init__(self, **kwargs):
        super().__init__(**{**kwargs, "auto_mkdir": True})

    def put_file(self, *args, **kwargs):
        time.sleep(0.2)
        return super().put_file(*args, **kwargs)

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("slow://") if isinstance(path, str) else path)

fsspec.register_implementation("slow", Slow)
"""


@pytest.mark.slow
def test_a_batch_that_is_killed_in_the_middle_of_an_upload(tmp_path, checkpoints):
    """kill -9 of everything, as soon as a bundle's first files are there; the same command goes on."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(SLOW_STORE)
    (tmp_path / "there" / "mu0").mkdir(parents=True)
    root = pathlib.Path(__file__).parents[2]
    env = {**os.environ, "PYTHONPATH": f"{tmp_path / 'site'}:{os.environ.get('PYTHONPATH', root)}"}
    command = [sys.executable, "-m", "vit_convert.batch", f"--checkpoints={checkpoints[0]}", *QUICK, "--quiet"]
    command += [f"--workdir=slow://{tmp_path / 'there'}", f"--scratch={tmp_path / 'here'}", "--jobs=1"]
    process = subprocess.Popen(command, env=env, start_new_session=True)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "there" / "mu0").iterdir()):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, 9)
    process.wait()
    there = {path.name for path in (tmp_path / "there" / "mu0").iterdir()}
    assert there and COMMIT not in there
    assert subprocess.run(command, env=env, check=False).returncode == 0
    remote = Remote(f"file://{tmp_path / 'there'}")
    commit = remote.commits(["mu0"])["mu0"]
    remote.pull("mu0", tmp_path / "back", commit)  # every file is the one that was committed
    assert {"model.onnx", "report.json"} <= commit.files.keys() and not (tmp_path / "here").exists()
    assert [job.status for job in BatchRecord.read(tmp_path / "there" / "batch.json").jobs] == ["done"]


@pytest.fixture
def s3(monkeypatch):
    """A real server that speaks S3, with one bucket."""
    server = pytest.importorskip("moto.server", reason="no S3 server is installed")
    pytest.importorskip("s3fs")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    running = server.ThreadedMotoServer(port=port)
    running.start()
    for key, value in (("AWS_ACCESS_KEY_ID", "x"), ("AWS_SECRET_ACCESS_KEY", "x"), ("AWS_REGION", "us-east-1")):
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    fsspec.filesystem("s3", skip_instance_cache=True).mkdir("bucket")
    yield "s3://bucket/out"
    running.stop()


@pytest.mark.slow
def test_a_batch_in_s3(s3, tmp_path, checkpoints, capsys):
    words = [f"--checkpoints={path}" for path in checkpoints[:2]] + [*QUICK, "--quiet", "--jobs=1"]
    words += [f"--workdir={s3}", f"--scratch={tmp_path / 'here'}"]
    assert batch(*words) == 0
    remote = Remote(s3)
    assert set(remote.commits(["mu0", "mu1", "mu2"])) == {"mu0", "mu1"}
    remote.pull("mu1", tmp_path / "back", remote.commits(["mu1"])["mu1"])
    assert batch(*words) == 0 and json.loads(remote.read("batch.json"))["counts"] == {"fresh": 2}
    assert batch(*words[:-2], "--workdir=s3://nobucket/out", f"--scratch={tmp_path / 'here'}") == 2
    assert "nobucket" in capsys.readouterr().err
