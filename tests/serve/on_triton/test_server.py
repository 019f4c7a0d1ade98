"""Finding, starting, waiting for and ending a server, of which nothing runs here."""

import io
import json
import os
import pathlib
import resource
import shutil
import socket
import subprocess
import sys
import types
import urllib.error

import numpy as np
import pytest

from vit_convert.core.errors import BenchmarkError, UsageError
from vit_convert.serve.triton import server as module
from vit_convert.serve.triton.server import Installed, find_server, running


@pytest.fixture
def environment(tmp_path, monkeypatch):
    """An environment whose Python says where its packages are; with a server and its stub, if it has."""

    def environment(server=True, stub=True, code=0, version="3.11", numpy="1.26.4", package=""):
        packages, root = tmp_path / "packages", tmp_path / "packages" / "pytriton" / "tritonserver"
        for path in [tmp_path / "env" / "bin" / "python", *([root / "bin" / "tritonserver"] if server else [])]:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        if stub:
            (root / "python_backend_stubs" / version).mkdir(parents=True, exist_ok=True)
            (root / "python_backend_stubs" / version / "triton_python_backend_stub").touch()
        told = json.dumps([str(packages), "/libs", version, numpy, package])
        run = types.SimpleNamespace(returncode=code, stdout=told, stderr="boom " * 100)
        monkeypatch.setattr(module.subprocess, "run", lambda *arguments, **options: run)
        return str(tmp_path / "env"), root

    return environment


def test_the_server_of_an_environment(environment):
    given, root = environment()
    found = find_server(given)
    assert (found.binary, found.backends) == (root / "bin" / "tritonserver", root / "backends")
    assert found.stub == root / "python_backend_stubs" / "3.11" / "triton_python_backend_stub"
    assert found.python == pathlib.Path(given) / "bin" / "python"
    assert found.libraries == os.pathsep.join(("/libs", str(root.parents[1] / "nvidia_pytriton.libs")))


def test_the_server_on_the_path(environment, tmp_path, monkeypatch):
    given, _ = environment(server=False)
    binary = tmp_path / "opt" / "tritonserver" / "bin" / "tritonserver"
    monkeypatch.setattr(module.shutil, "which", lambda name: str(binary) if name == "tritonserver" else None)
    found = find_server(given)
    assert (found.binary, found.backends, found.stub) == (binary, binary.resolve().parents[1] / "backends", None)
    assert found.libraries == "/libs"


@pytest.mark.parametrize(
    ("options", "said"),
    [({"code": 1}, "its Python does not run"), ({"stub": False}, "no stub for Python 3.11"),
     ({"server": False}, "no tritonserver in"), ({"numpy": "2.2.6"}, "NumPy 2.2.6"), ({"numpy": ""}, "no NumPy")],
)  # fmt: skip
def test_why_there_is_none(environment, monkeypatch, options, said):
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    given, _ = environment(**options)
    with pytest.raises(UsageError, match=said):
        find_server(given)
    with pytest.raises(UsageError, match="holds no bin/python"):
        find_server(given + "x")


@pytest.fixture
def installed(tmp_path):
    """A server with a Python backend; with an onnxruntime backend and a stub, if it has."""

    def installed(stub=True, onnxruntime=False):
        backends = tmp_path / "backends"
        for name in ("python", *(["onnxruntime"] if onnxruntime else [])):
            (backends / name).mkdir(parents=True)
            (backends / name / "lib.so").write_text(name)
        (tmp_path / "stub").write_text("a program")
        return Installed(
            tmp_path / "tritonserver",
            backends,
            tmp_path / "stub" if stub else None,
            tmp_path / "bin" / "python",
            "/libs",
        )

    return installed


def test_an_installed_onnxruntime_is_used_as_it_is(installed, tmp_path):
    found = installed(stub=False, onnxruntime=True)
    assert module._backends(found, tmp_path / "work") == found.backends


@pytest.mark.parametrize(("stub", "onnxruntime"), [(True, False), (True, True), (False, False)])
def test_what_is_put_beside_the_backends(installed, tmp_path, stub, onnxruntime):
    (tmp_path / "work").mkdir()
    folder = module._backends(installed(stub, onnxruntime), tmp_path / "work")
    assert folder != tmp_path / "backends" and (folder / "python" / "lib.so").read_text() == "python"
    assert ("onnx_standin" in (folder / "onnxruntime" / "model.py").read_text()) if not onnxruntime else (
        [path.name for path in (folder / "onnxruntime").iterdir()] == ["lib.so"]
    )  # fmt: skip
    if stub:
        assert (folder / "python" / "stub").read_text() == "a program" and os.access(
            folder / "python" / "stub", os.X_OK
        )
        assert (folder / "python" / "vit_convert" / "core").is_dir()
    else:
        assert [path.name for path in (folder / "python").iterdir()] == ["lib.so"]


def test_where_the_stub_finds_python_and_libraries(installed, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/usr/bin")
    monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)
    found = module._environment(installed())
    assert (found["PATH"], found["LD_LIBRARY_PATH"]) == (f"{tmp_path / 'bin'}:/usr/bin", "/libs")
    monkeypatch.setenv("LD_LIBRARY_PATH", "/cuda")
    assert module._environment(Installed(*[tmp_path] * 2, None, tmp_path / "python", ""))["LD_LIBRARY_PATH"] == "/cuda"


def test_the_stub_does_not_look_for_packages_where_we_do(installed, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/with/numpy/2")
    monkeypatch.setenv("PYTHONHOME", "/another/python")
    assert not {"PYTHONPATH", "PYTHONHOME"} & set(module._environment(installed()))
    on_path = module._environment(Installed(*[tmp_path] * 2, None, tmp_path / "python", ""))
    assert on_path["PYTHONPATH"] == "/with/numpy/2"  # a container's server, whose Python is ours


def test_what_an_environment_says_of_itself():
    command = [sys.executable, "-I", "-c", module._ABOUT]
    said = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    assert said[2:4] == [f"{sys.version_info.major}.{sys.version_info.minor}", np.__version__]
    assert "site-packages" in said[0] and (said[4] == "" or said[4].endswith("vit_convert/__init__.py"))


@pytest.mark.parametrize("hard", [resource.RLIM_INFINITY, 64 << 20])
def test_the_stacks_of_its_threads(monkeypatch, hard):
    """As large as may be, since the server copies requests to them; no larger than what may be set."""
    if 0 < resource.getrlimit(resource.RLIMIT_STACK)[1] < 256 << 20:
        pytest.skip("no stack of 256 MiB may be set here")
    monkeypatch.setattr(module.resource, "getrlimit", lambda what: (8 << 20, hard))
    command = module._with_stack(["/bin/sh", "-c", "ulimit -S -s; echo $0 $1", "a b", "$c"])
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [str((64 << 10) if hard > 0 else (256 << 10)), "a b $c"] and not done.stderr


def test_ports():
    free = module._free_ports(3)
    assert len({*free}) == 3 and module._require_free(free) == free
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", free[1]))
        taken.listen()
        with pytest.raises(UsageError, match=f"port {free[1]}: "):
            module._require_free(free)


class Process:
    """Of a server: ends after some looks, or never; notes how it is ended."""

    def __init__(self, ends_after=None, stubborn=False):
        self.looks, self.ends_after, self.stubborn, self.done = 0, ends_after, stubborn, []

    def poll(self):
        self.looks += 1
        return 3 if self.ends_after is not None and self.looks > self.ends_after else None

    def terminate(self):
        self.done.append("terminate")

    def kill(self):
        self.done.append("kill")

    def wait(self, seconds=None):
        if self.stubborn and "kill" not in self.done:
            raise subprocess.TimeoutExpired("tritonserver", seconds)
        self.done.append("wait")


@pytest.fixture
def clock(monkeypatch):
    """Of which each look takes a second."""
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(module.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + 1))
    return now


@pytest.fixture
def start(tmp_path, monkeypatch, clock, installed):
    """Starts a server that is ready after some looks and says this; returns its command."""

    def start(process, ready_after=0, said="", gpu=False, **options):
        given, looks = [], []

        def popen(command, *, stdout, stderr, env):
            assert command[:2] == ["/bin/sh", "-c"] and command[3] == "sh"
            given.append(command[4:])
            stdout.write(said.encode())
            return process

        def is_ready(server):
            looks.append(server)
            return len(looks) > ready_after

        monkeypatch.setattr(module.subprocess, "Popen", popen)
        monkeypatch.setattr(module, "_is_ready", is_ready)
        monkeypatch.setattr(module, "_without_gpu", lambda: not gpu)
        with running(installed(stub=False, onnxruntime=True), tmp_path / "repository", **options) as server:
            assert process.done == []
            return given[0], server

    return start


@pytest.mark.parametrize("gpu", [True, False])
def test_how_it_is_started_and_ended(start, tmp_path, gpu):
    process = Process()
    command, server = start(process, gpu=gpu, flags=["--x"], port=(port := module._free_ports(1)[0]))
    assert command[:3] == [
        str(tmp_path / "tritonserver"), f"--model-repository={tmp_path / 'repository'}",
        f"--backend-directory={tmp_path / 'backends'}",
    ]  # fmt: skip
    for number, name in enumerate(("http", "grpc", "metrics")):
        assert f"--{name}-port={port + number}" in command and f"--{name}-address=127.0.0.1" in command
    assert ("--allow-gpu-metrics=false" in command) is not gpu and command[-1] == "--x"
    assert (server.http, server.grpc) == (f"http://127.0.0.1:{port}", f"127.0.0.1:{port + 1}")
    assert server.metrics == f"http://127.0.0.1:{port + 2}/metrics" and process.done == ["terminate", "wait"]


def test_it_is_waited_for(start, clock):
    process = Process()
    command, _ = start(process, ready_after=3, seconds=10.0)
    assert process.looks == 4 and clock == [3.0]
    ports = {word.rpartition("=")[2] for word in command if "-port=" in word}
    assert len(ports) == 3 and "0" not in ports


@pytest.mark.parametrize(
    ("process", "options", "said"),
    [(Process(ends_after=2), {}, "tritonserver ended with exit code 3:\nE0 no GPU\nsome failure"),
     (Process(stubborn=True), {}, "tritonserver was not ready within 5 s:\nE0 no GPU\nsome failure")],
)  # fmt: skip
def test_why_it_is_not_ready(start, process, options, said):
    with pytest.raises(BenchmarkError) as caught:
        start(process, ready_after=99, seconds=5.0, said="I0 fine\nE0 no GPU\nsome failure\nI0 bye\n")
    assert str(caught.value).startswith(said)
    assert process.done == (["terminate", "kill", "wait"] if process.stubborn else ["terminate", "wait"])


def test_the_end_of_what_it_said(tmp_path):
    (tmp_path / "log").write_text("".join(f"I{i} fine\n" for i in range(50)))
    server = types.SimpleNamespace(log=tmp_path / "log")
    shown = module._last_words(server).splitlines()
    assert shown == [f"I{i} fine" for i in range(38, 50)]  # a dozen


@pytest.mark.parametrize(
    ("answer", "ready"),
    [(200, True), (204, False), (urllib.error.URLError("refused"), False), (ConnectionResetError(), False)],
)
def test_whether_all_models_are_ready(monkeypatch, answer, ready):
    asked = []

    class Reply(io.BytesIO):
        status = answer

    def urlopen(address, timeout):
        asked.append(address)
        if isinstance(answer, Exception):
            raise answer
        return Reply()

    monkeypatch.setattr(module.urllib.request, "urlopen", urlopen)
    assert module._is_ready(types.SimpleNamespace(http="http://127.0.0.1:1")) is ready
    assert asked == ["http://127.0.0.1:1/v2/health/ready"]


def test_another_package_in_the_environment_would_answer(environment, tmp_path):
    """One that was installed before this one was changed; the same one, and none, are right."""
    here = pathlib.Path(module.__file__).parents[2]
    given, _ = environment(package=str(here / "__init__.py"))
    assert find_server(given).stub is not None
    shutil.copytree(here, tmp_path / "vit_convert", ignore=shutil.ignore_patterns("__pycache__"))
    given, _ = environment(package=str(tmp_path / "vit_convert" / "__init__.py"))
    assert find_server(given).stub is not None
    (tmp_path / "vit_convert" / "serve" / "triton" / "prove.py").write_text("")
    with pytest.raises(UsageError, match="has another vit_convert installed"):
        find_server(given)
