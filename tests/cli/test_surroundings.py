"""The command line in a process of its own, in surroundings that are not the developer's."""

import json
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

PROJECT = pathlib.Path(__file__).parents[2]
# Python's own remedies off, as under a locale that has no UTF-8 at all.
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}

ON_ONE_CORE = """
import os
import runpy

os.umask(0o077)
os.sched_setaffinity(0, list(os.sched_getaffinity(0))[:1])
runpy.run_module("vit_convert", run_name="__main__", alter_sys=True)
"""


def environment(**changes):
    """This process's, with the project on the path from any folder; None removes a variable."""
    given = {**os.environ, "PYTHONPATH": str(PROJECT), "JAX_PLATFORMS": "cpu", **changes}
    return {name: value for name, value in given.items() if value is not None}


def run(*arguments, module="vit_convert", closed=(), **options):
    """Runs a command; `closed` names streams (stdout, stderr) whose reader is gone before anything is written."""
    options.setdefault("env", environment())
    reader, writer = os.pipe()
    os.close(reader)
    streams = {name: writer if name in closed else subprocess.PIPE for name in ("stdout", "stderr")}
    try:
        return subprocess.run([sys.executable, "-m", module, *arguments], **streams, **options, timeout=300)
    finally:
        os.close(writer)


@pytest.mark.parametrize("module", ["vit_convert", "vit_convert.engine"])
def test_help_into_a_closed_pipe(module):
    ended = run("--help", module=module, closed=["stdout"])
    assert (ended.returncode, ended.stderr) == (0, b"")


@pytest.mark.parametrize("module", ["vit_convert", "vit_convert.engine"])
def test_error_into_a_closed_pipe(module):
    assert run("--surplus", module=module, closed=["stderr"]).returncode == 2


@pytest.mark.parametrize("module", ["vit_convert", "vit_convert.engine"])
@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_help_on_a_terminal_without_utf8(module, encoding):
    ended = run("--help", module=module, env=environment(**ASCII, PYTHONIOENCODING=encoding))
    assert (ended.returncode, ended.stderr) == (0, b"")
    assert b"--quiet" in ended.stdout


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="one core is Linux's to give")
def test_strange_surroundings(convert, tmp_path):
    """A home, a UTF-8 locale, a second core, a reader of the output: a conversion needs none of them, and its numbers
    do not tell."""
    assert convert() == 0
    folder = tmp_path / "ein Ordner, ünïcode 模型"
    folder.mkdir()
    (folder / "tiny.py").write_bytes(convert.config.read_bytes())

    (tmp_path / "start.py").write_text(ON_ONE_CORE, encoding="utf-8")
    changes = {
        **ASCII,
        "HOME": None,
        "XDG_CACHE_HOME": None,
        "TZ": "Pacific/Kiritimati",
        "PYTHONPATH": f"{PROJECT}:{tmp_path}",
    }
    words = ["--config=tiny", f"--workdir={folder / 'out'}"]
    ended = run(*words, module="start", closed=["stdout", "stderr"], cwd=folder, env=environment(**changes))
    assert ended.returncode == 0
    bundle = folder / "out" / "tiny"
    assert json.loads((bundle / "report.json").read_bytes())["check"]["passed"]
    for name in ("logits", "images"):
        with np.load(bundle / "reference.npz") as found, np.load(convert.bundle / "reference.npz") as wanted:
            np.testing.assert_allclose(found[name], wanted[name], rtol=0, atol=1e-5 * np.abs(wanted[name]).max())
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", json.loads((bundle / "report.json").read_bytes())["date"])


def test_folder_whose_name_is_not_utf8(convert, tmp_path, capsys):
    convert.workdir = pathlib.Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    assert convert() == 2
    assert "its name is not UTF-8" in capsys.readouterr().err
    assert not convert.workdir.exists()


def test_closed_descriptors(convert):
    """Files that are opened next get the numbers 0, 1 and 2, and would get every message with them."""
    command = f'exec "{sys.executable}" -m vit_convert {" ".join(convert.arguments())} <&- >&- 2>&-'
    assert subprocess.run(["bash", "-c", command], env=environment(), timeout=300).returncode == 0
    for line in (convert.bundle / "events.jsonl").read_text(encoding="utf-8").splitlines():
        json.loads(line)


@pytest.mark.parametrize("platform", ["cuda", "no_such"])
def test_backend_that_does_not_start(convert, platform):
    """Without a GPU; where there is one with JAX's plugin, `cuda` would start."""
    ended = run(*convert.arguments(), env=environment(JAX_PLATFORMS=platform, CUDA_VISIBLE_DEVICES=""))
    assert ended.returncode == 2
    error = ended.stderr.decode().splitlines()
    assert error[-2].startswith(f"error: JAX_PLATFORMS={platform}: ")
    assert error[-1] == "  A conversion needs no GPU: JAX_PLATFORMS=cpu does."
    assert "Traceback" not in ended.stderr.decode()
