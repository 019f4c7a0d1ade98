"""Config files that fail, and what is said of them; how they are found and split from their argument."""

import pathlib

import pytest

from vit_convert.core.config_files import find_config, load_config, split_argument
from vit_convert.core.errors import CheckpointError, UsageError

HEAD = "from vit_convert.core.config import default_config\n\n\ndef get_config(words='none'):\n"


@pytest.fixture
def load(tmp_path):
    path = tmp_path / "mine"  # a config is Python, whatever its file is called

    def load(text: str, argument: str = ""):
        path.write_text(text)
        return load_config(str(path), argument)

    return load


def test_what_it_returns(load):
    assert load(f"{HEAD}    return words, __file__") == ("none", load(f"{HEAD}    return __file__"))
    assert load(f"{HEAD}    return words", "B/16") == "B/16"
    with pytest.raises(UsageError, match=r"mine:B/16: its get_config\(\) takes no argument") as error:
        load("def get_config():\n    return 3", "B/16")
    assert error.value.fix.startswith("--config=") and error.value.fix.endswith("mine")
    assert load("def get_config():\n    return 3") == 3


@pytest.mark.parametrize(
    ("body", "words", "fix"),
    [
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'", " PYTHONPATH names"),
        ("raise ValueError('why')", "ValueError: why", ""),
        ("raise SystemExit(3)", "SystemExit: it ends the process with 3", ""),
        ("return None.x", "AttributeError: 'NoneType' object has no attribute 'x'", ""),
    ],
)
def test_a_file_that_fails(load, body, words, fix):
    with pytest.raises(UsageError) as error:
        load(f"{HEAD}    {body}")
    assert f"mine: {words}" in str(error.value) and f"mine:5: {body})" in str(error.value)
    whole = "--debug shows the whole traceback."
    assert error.value.fix == (f"{whole}{fix} folders to import from." if fix else whole)


def test_our_own_errors_and_interrupts_pass(load):
    with pytest.raises(CheckpointError, match=r"^gone$"):
        load(f"from vit_convert.core.errors import CheckpointError\n{HEAD}    raise CheckpointError('gone')")
    with pytest.raises(KeyboardInterrupt):
        load(f"{HEAD}    raise KeyboardInterrupt")


@pytest.mark.parametrize(
    ("key", "near"), [("precison", "precision"), ("batch.maks", "max"), ("engine.workspace_gb", "workspace_gib")]
)
def test_an_unknown_key_of_a_config(load, key, near):
    last = key.split(".")[-1]
    with pytest.raises(UsageError, match=rf"unknown key '{last}'\. Did you mean {near}.*\(.*mine:6: config\.{key} = 3"):
        load(f"{HEAD}    config = default_config()\n    config.{key} = 3")


@pytest.mark.parametrize(
    ("given", "parts"),
    [("vit.py:B/16", ("vit.py", "B/16")), ("vit", ("vit", "")), ("a:b:c", ("a", "b:c")), (":x", ("", "x"))],
)
def test_the_argument_is_what_follows_the_colon(given, parts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert split_argument(given) == parts
    pathlib.Path("odd:name.py").write_text("")
    assert split_argument("odd:name.py") == ("odd:name.py", "")  # a file that is called so


def test_what_is_available_is_listed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("configs").mkdir()
    for name in ("configs/zzz.py", "configs/notes.txt", "here.py"):
        pathlib.Path(name).write_text("")
    with pytest.raises(UsageError, match=r"--config=zz: no such file here or in configs/\.") as error:
        find_config("zz")
    available = error.value.fix.removeprefix("Available configs: ").split(", ")
    assert {"zzz.py", "vit_b32.py"} <= {*available} and not {"here.py", "notes.txt"} & {*available}
    assert available == sorted(set(available))
