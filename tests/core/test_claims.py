"""What pyproject.toml claims is what CI runs, and run.sh finds the Pythons to run it with."""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
import tomllib

from vit_convert.__main__ import parse_config

ROOT = pathlib.Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CI = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
# of pyenv, for a version that is not switched on
SHIM = '#!/bin/sh\necho "command not found in this version" >&2\nexit 127\n'


def test_pythons_that_are_claimed_are_run():
    claimed = re.findall(r"Python :: (3\.\d+)", " ".join(PROJECT["classifiers"]))
    assert claimed == ["3.10", "3.11", "3.12", "3.13"]
    assert PROJECT["requires-python"] == ">=3.10,<3.14"
    assert set(re.findall(r"\b3\.1\d\b", CI)) == set(claimed)


def test_every_dependency_has_both_bounds():
    listed = [
        *PROJECT["dependencies"],
        *(line for lines in PROJECT["optional-dependencies"].values() for line in lines),
    ]
    for line in listed:
        bounded = re.match(r"[\w-]+>=[\d.]+,<[\d.]+(;|$)", line)
        assert bounded or "==" in line.split(";")[0] or line.startswith("vit_convert["), line


def run_sh(*arguments, **environment):
    return subprocess.run(
        [ROOT / "run.sh", *arguments],
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", **environment},
        timeout=120,
    )


def executable(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def only_python3(tmp_path):
    """A PATH on which this Python is called python3 and nothing else, beside shims that fail under its own name and
    others'."""
    for name in ("python3.11", "python3.12", "python3.13"):
        executable(tmp_path / "bin" / name, SHIM)
    executable(tmp_path / "bin" / "python3", f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    return f"{tmp_path / 'bin'}:/usr/bin:/bin"


def test_python_is_found_behind_a_shim_that_fails(only_python3):
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    found = run_sh("python", PATH=only_python3, PYTHON=version)
    assert (found.returncode, found.stdout.strip()) == (0, sys.executable)


def test_python_of_pyenv_is_found_though_no_shim_works(tmp_path):
    for name in ("python3.11", "python3.12", "python3.13", "python3", "python"):
        executable(tmp_path / "bin" / name, SHIM)
    there = executable(tmp_path / "pyenv" / "versions" / "3.12.99" / "bin" / "python", "#!/bin/sh\necho /of/pyenv\n")
    path = f"{tmp_path / 'bin'}:/usr/bin:/bin"
    assert run_sh("python", PATH=path, PYTHON="3.12", PYENV_ROOT=str(tmp_path / "pyenv")).stdout.strip() == "/of/pyenv"
    there.unlink()
    missing = run_sh("python", PATH=path, PYTHON="3.99")
    assert missing.returncode == 1
    assert "no Python 3.99 found" in missing.stderr


def test_python_that_is_given_and_does_not_run(tmp_path):
    refused = run_sh("python", PYTHON=str(executable(tmp_path / "broken", SHIM)))
    assert refused.returncode == 1
    assert "broken is not an interpreter" in refused.stderr


# Stands in for an interpreter: makes environments of copies of itself, in which pip and the project do nothing but
# tell.
FAKE = """#!/bin/bash
case "$*" in
  *ensurepip*) echo "$0" ;;
  *base_prefix*) echo "{version} of {home}" ;;
  "-m venv --clear "*) rm -rf "$4" && mkdir -p "$4/bin" && touch "$4/pyvenv.cfg" && cp "$0" "$4/bin/python" ;;
  *) echo "ran: {version} $*" ;;
esac
"""


@pytest.fixture
def fake(tmp_path):
    def make(version, home="/a"):
        return str(executable(tmp_path / f"python{version}", FAKE.format(version=version, home=home)))

    return make


def test_environment_is_made_once(fake, tmp_path):
    demo = {"PYTHON": fake("3.12.1"), "VENV": str(tmp_path / "a venv"), "WORKDIR": "elsewhere"}
    first, second = run_sh(**demo), run_sh(**demo)
    assert "installing vit_convert[all] for Python 3.12.1" in first.stderr and "pip install" in first.stdout
    assert second.stderr == ""
    assert second.stdout == "ran: 3.12.1 -m vit_convert --config vit_digits.py --workdir elsewhere\n"


def test_environment_of_another_python_is_made_anew(fake, tmp_path):
    venv = str(tmp_path / "venv")
    run_sh(PYTHON=fake("3.12.1"), VENV=venv)
    other = run_sh(PYTHON=fake("3.13.0"), VENV=venv)
    assert f"{venv} has Python 3.12.1 of /a; created anew with 3.13.0 of /a" in other.stderr
    assert "ran: 3.13.0 -m vit_convert" in other.stdout
    assert "ran: 3.13.0 -m vit_convert" in run_sh(VENV=venv).stdout  # none is asked for: the one that is there will do


@pytest.mark.parametrize("left", [SHIM, None])
def test_environment_that_does_not_run_any_more(fake, tmp_path, left):
    venv = tmp_path / "venv"
    run_sh(PYTHON=fake("3.12.1"), VENV=str(venv))
    (venv / "bin" / "python").unlink()
    if left:
        executable(venv / "bin" / "python", left)
    again = run_sh(PYTHON=fake("3.12.1"), VENV=str(venv))
    assert "does not run any more; created anew" in again.stderr
    assert again.returncode == 0


def test_folder_that_is_no_environment_is_left_alone(fake, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    refused = run_sh(PYTHON=fake("3.12.1"), VENV=str(tmp_path / "mine"))
    assert refused.returncode == 1 and "not an environment; it is left as it is" in refused.stderr
    assert os.listdir(tmp_path / "mine") == ["thesis.txt"]


def test_usage():
    shown = run_sh("what")
    assert shown.returncode == 2
    assert "./run.sh test" in shown.stderr and "VENV the folder" in shown.stderr


def test_wheel_holds_what_its_configs_name(tmp_path):
    """Laid out as an installed wheel has it: `configs` in the package, and beside them what the shipped model is made
    of."""
    build = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]["build"]["targets"][
        "wheel"
    ]
    for source, place in build["force-include"].items():
        copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        copy(ROOT / source, tmp_path / place)
    config, _ = parse_config(["vit_convert", f"--config={tmp_path / 'vit_convert' / 'configs' / 'vit_digits.py'}"])
    for named in (config.checkpoint, config.calibration.data, config.evaluation.data):
        assert pathlib.Path(named).is_relative_to(tmp_path) and pathlib.Path(named).exists()
