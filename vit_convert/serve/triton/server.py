"""A real Triton server on this machine: finds it, starts it on free loopback ports, waits for it, and stops it."""

import contextlib
import dataclasses
import json
import os
import pathlib
import resource
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence

from vit_convert.core.errors import BenchmarkError, UsageError
from vit_convert.serve.triton.repository import shim

_INSTALL = (
    "Make an environment of its own and install the extra `triton` there, or use NVIDIA's container: docs/serving.md."
)
_PACKAGE = pathlib.Path(__file__).parents[2]
_POLL_SECONDS = 0.05
_STACK_BYTES = 256 << 20  # of each thread, of which only what is used takes memory; for requests of up to 120 MB
_SHOWN_LINES = 12
_ABOUT = """
import importlib.util, json, sys, sysconfig
try:
    from numpy import __version__
except ImportError:
    __version__ = ""
package = importlib.util.find_spec("vit_convert")
about = [sysconfig.get_path("purelib"), sysconfig.get_config_var("LIBDIR"), "%d.%d" % sys.version_info[:2]]
print(json.dumps([*about, __version__, package.origin if package else ""]))
"""


@dataclasses.dataclass(frozen=True)
class Installed:
    """The location of a server's files.

    Attributes:
        binary: tritonserver.
        backends: its folder of backends.
        stub: of its Python backend, if that is not in `backends` already.
        python: the one for the Python backend, which provides its packages.
        libraries: folders of that Python's libpython and of other libraries that the server loads.
    """

    binary: pathlib.Path
    backends: pathlib.Path
    stub: pathlib.Path | None
    python: pathlib.Path
    libraries: str


@dataclasses.dataclass(frozen=True)
class Server:
    """A running server.

    Attributes:
        process: of tritonserver.
        http: "http://127.0.0.1:…".
        grpc: "127.0.0.1:…".
        metrics: "http://127.0.0.1:…/metrics".
        log: its output.
    """

    process: "subprocess.Popen[bytes]"
    http: str
    grpc: str
    metrics: str
    log: pathlib.Path


def find_server(environment: str | os.PathLike[str]) -> Installed:
    """Finds a server: in an environment with the extra `triton`, or on the PATH, as in NVIDIA's containers.

    Args:
        environment: a Python environment's folder.

    Raises:
        UsageError: there is none.
    """
    python = pathlib.Path(environment) / "bin" / "python"
    if not python.exists():
        raise UsageError(f"--environment={environment}: holds no bin/python", fix=_INSTALL)
    found = subprocess.run([python, "-I", "-c", _ABOUT], capture_output=True, text=True, check=False)
    if found.returncode != 0:
        raise UsageError(
            f"--environment={environment}: its Python does not run ({found.stderr.strip()[-200:]})", fix=_INSTALL
        )
    packages, libraries, version, numpy, package = json.loads(found.stdout)
    root = pathlib.Path(packages) / "pytriton" / "tritonserver"
    if (root / "bin" / "tritonserver").exists():
        stub = root / "python_backend_stubs" / version / "triton_python_backend_stub"
        if not stub.exists():
            raise UsageError(f"--environment={environment}: its server has no stub for Python {version}", fix=_INSTALL)
        if not numpy.startswith("1."):
            raise UsageError(
                f"--environment={environment}: its Python has {f'NumPy {numpy}' if numpy else 'no NumPy'}, with which "
                "this server would give wrong numbers",
                fix="Install the extra `triton` there: its NumPy is older than 2.",
            )
        if package and _sources(pathlib.Path(package).parent) != _sources(_PACKAGE):
            raise UsageError(
                f"--environment={environment}: its Python has another vit_convert installed ({package}), which would "
                "answer in place of this one",
                fix="Install this one there again, or uninstall it there: it is not needed.",
            )
        bundled = (
            pathlib.Path(packages) / "nvidia_pytriton.libs"
        )  # CUDA's runtime, which the stub finds only in its original place
        return Installed(
            root / "bin" / "tritonserver", root / "backends", stub, python, f"{libraries}{os.pathsep}{bundled}"
        )
    if binary := shutil.which("tritonserver"):
        folder = pathlib.Path(binary).resolve().parents[1]
        return Installed(pathlib.Path(binary), folder / "backends", None, python, libraries)
    raise UsageError(f"no tritonserver in {environment}, nor on the PATH", fix=_INSTALL)


def _sources(package: pathlib.Path) -> dict[str, bytes]:
    """The code of an installed package, by file."""
    return {path.relative_to(package).as_posix(): path.read_bytes() for path in package.rglob("*.py")}


@contextlib.contextmanager
def running(
    installed: Installed,
    repository: str | os.PathLike[str],
    *,
    flags: Sequence[str] = (),
    seconds: float = 120.0,
    port: int = 0,
) -> Iterator[Server]:
    """Runs a server until the block ends; all of its models are ready when the block starts.

    Args:
        installed: from `find_server`.
        repository: of the models.
        flags: further ones of tritonserver.
        seconds: how long to wait for it.
        port: of HTTP; gRPC and metrics have the next two; 0 for any that are free.

    Yields:
        The Server.

    Raises:
        BenchmarkError: it ends, or is not ready in time; the message includes the end of its output.
        UsageError: a port is taken.
    """
    with tempfile.TemporaryDirectory(prefix="vit_convert-triton-") as folder:
        work = pathlib.Path(folder)
        http, grpc, metrics = _require_free(range(port, port + 3)) if port else _free_ports(3)
        log = work / "log"
        command = [
            str(installed.binary),
            f"--model-repository={os.fspath(repository)}",
            f"--backend-directory={_backends(installed, work)}",
            *(f"--{name}-address=127.0.0.1" for name in ("http", "grpc", "metrics")),
            *(f"--{name}-port={port}" for name, port in (("http", http), ("grpc", grpc), ("metrics", metrics))),
            "--disable-auto-complete-config",
            "--strict-readiness=true",
            "--exit-on-error=true",
            *(["--allow-gpu-metrics=false"] if _without_gpu() else []),
            *flags,
        ]
        with open(log, "wb") as out:
            process = subprocess.Popen(
                _with_stack(command), stdout=out, stderr=subprocess.STDOUT, env=_environment(installed)
            )
        server = Server(
            process, f"http://127.0.0.1:{http}", f"127.0.0.1:{grpc}", f"http://127.0.0.1:{metrics}/metrics", log
        )
        try:
            _wait(server, seconds)
            yield server
        finally:
            _stop(process)


def _with_stack(command: Sequence[str]) -> list[str]:
    """The command with stacks large enough for the server's threads.

    Triton 2.51 copies the body of an HTTP request to the stack, and ends with a segmentation fault if it is larger than
    about half of that: at the usual limit of 8 MiB, by seven images of 224x224 in float32.
    """
    hard = resource.getrlimit(resource.RLIMIT_STACK)[1]
    size = _STACK_BYTES if hard == resource.RLIM_INFINITY else min(_STACK_BYTES, hard)
    return ["/bin/sh", "-c", f'ulimit -S -s {size // 1024}; exec "$@"', "sh", *command]


def _backends(installed: Installed, work: pathlib.Path) -> pathlib.Path:
    """Collects the server's backends, the stub in the place where it is looked for, and our replacement if there is no
    onnxruntime backend."""
    if installed.stub is None and (installed.backends / "onnxruntime").exists():
        return installed.backends
    folder = work / "backends"
    shutil.copytree(
        installed.backends, folder
    )  # no links: the server refuses a library behind a link that leaves the folder
    if installed.stub is not None:
        stub = folder / "python" / installed.stub.name
        shutil.copyfile(installed.stub, stub)
        stub.chmod(0o755)
        # The stub looks for packages in its own folder too, after what is installed, so that nothing needs to be.
        (folder / "python" / _PACKAGE.name).symlink_to(_PACKAGE)
    if not (folder / "onnxruntime").exists():
        (folder / "onnxruntime").mkdir()
        (folder / "onnxruntime" / "model.py").write_text(shim("onnx_standin"))
    return folder


def _environment(installed: Installed) -> dict[str, str]:
    def before(value: str, name: str) -> str:
        return os.pathsep.join(filter(None, (value, os.environ.get(name, ""))))

    # The stub embeds Python: the first `python3` on PATH determines the environment; libpython has its own folder.
    return {
        **(dict(os.environ) if installed.stub is None else _clean()),
        "PATH": before(str(installed.python.parent), "PATH"),
        "LD_LIBRARY_PATH": before(installed.libraries, "LD_LIBRARY_PATH"),
    }


def _clean() -> dict[str, str]:
    """Our environment without what leads our own Python to its packages: the server's could take NumPy 2 from there."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}


def _without_gpu() -> bool:
    return not os.path.exists("/dev/nvidiactl")


def _require_free(ports: Sequence[int]) -> Sequence[int]:
    """Refuses ports that are in use: another server there would answer instead of ours."""
    for port in ports:
        with socket.socket() as each:
            # ports of connections that just ended do not count
            each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                each.bind(("127.0.0.1", port))
            except OSError as e:
                raise UsageError(
                    f"port {port}: {e.strerror}", fix="Stop what listens there, or choose another --port."
                ) from e
    return ports


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _wait(server: Server, seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if (code := server.process.poll()) is not None:
            raise BenchmarkError(f"tritonserver ended with exit code {code}:\n{_last_words(server)}", fix=_INSTALL)
        if _is_ready(server):
            return
        time.sleep(_POLL_SECONDS)
    raise BenchmarkError(
        f"tritonserver was not ready within {seconds:g} s:\n{_last_words(server)}",
        fix="Wait longer with --ready_seconds.",
    )


def _is_ready(server: Server) -> bool:
    try:
        with urllib.request.urlopen(f"{server.http}/v2/health/ready", timeout=1) as reply:
            return reply.status == 200
    except (urllib.error.URLError, OSError):  # it does not listen yet, or some model is not ready
        return False


def _last_words(server: Server) -> str:
    lines = server.log.read_text(errors="replace").splitlines()
    told = [line for line in lines if line.startswith("E") or "error" in line.lower() or "fail" in line.lower()]
    return "\n".join((told or lines)[-_SHOWN_LINES:])


def _stop(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
