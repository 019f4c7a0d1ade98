"""Old names of keys, in a config file, on the command line and in a bundle's config.json, and of programs."""

import runpy

import ml_collections
import pytest

from vit_convert.core import config as configs
from vit_convert.core import renamed
from vit_convert.core.overrides import apply_overrides, split_overrides

OLD = {"spellings": "lowerings", "engine.spelling": "engine.lowering", "engine.int8_spelling": "engine.int8_lowering"}
VALUES = {"spellings": ("matmul",), "engine.spelling": "matmul", "engine.int8_spelling": "fused"}


@pytest.fixture(autouse=True)
def nothing_said():
    renamed._say.cache_clear()


def value_of(config, key):
    for part in key.split("."):
        config = config[part]
    return config


@pytest.mark.parametrize("old", OLD)
def test_config_file(old, capsys):
    config = configs.default_config()
    group, _, last = old.rpartition(".")
    setattr(config[group] if group else config, last, VALUES[old])
    complete = configs.complete(config, "x", check=False)
    assert value_of(complete, OLD[old]) == VALUES[old]
    assert capsys.readouterr().err == f"note: config key {last!r} is called {OLD[old].rpartition('.')[2]!r} now\n"


@pytest.mark.parametrize("old", OLD)
def test_command_line(old):
    config = configs.default_config()
    value = "('matmul',)" if old == "spellings" else VALUES[old]
    overrides, rest = split_overrides([f"--config.{old}={value}"], config)
    assert value_of(apply_overrides(config, overrides), OLD[old]) == VALUES[old] and rest == []


@pytest.mark.parametrize("old", OLD)
def test_config_of_an_earlier_version(old):
    group, _, last = old.rpartition(".")
    stored = {group: {last: VALUES[old]}} if group else {last: VALUES[old]}
    complete = configs.complete(ml_collections.ConfigDict(stored), "x", check=False)
    assert value_of(complete, OLD[old]) == VALUES[old]


def test_old_names_are_no_keys():
    config = configs.default_config()
    assert not {*OLD} & {*config.to_dict(), *(f"engine.{key}" for key in config.engine)}
    with pytest.raises(AttributeError):
        config.spelings = ()


def test_it_is_said_once(capsys):
    config = configs.default_config()
    config.spellings, config.spellings = (), ("matmul",)
    assert capsys.readouterr().err.count("note:") == 1


@pytest.mark.parametrize("old", OLD)
def test_an_old_name_reads_the_value_of_the_new_one(old):
    config = configs.default_config()
    group, _, last = old.rpartition(".")
    held = config[group] if group else config
    held[OLD[old].rpartition(".")[2]] = VALUES[old]
    assert held[last] == getattr(held, last) == VALUES[old]
    with pytest.raises(KeyError):
        held["speling"]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        *OLD.items(),
        ("a.b.spelling", "a.b.lowering"),
        ("spelling", "lowering"),
        ("spelling.x", "spelling.x"),
        ("engine.lowering", "engine.lowering"),
        ("spell", "spell"),
    ],
)
def test_the_last_word_is_what_was_renamed(old, new):
    assert renamed.current(old) == new


def test_a_program_under_its_old_name(tmp_path, monkeypatch, capsys):
    file = tmp_path / "mu.npz"
    monkeypatch.setattr("sys.argv", ["random", "--variant=mu/16", f"--output={file}"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("vit_convert.checkpoint.random", run_name="__main__")
    assert ended.value.code == 0 and file.is_file()
    said = "note: program 'vit_convert.checkpoint.random' is called 'vit_convert.families.random' now\n"
    assert capsys.readouterr().err == said
