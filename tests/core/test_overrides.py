"""`--config.key=value` words: which are taken out of a command line, what is left of it, and what the config then
holds."""

import ml_collections
import pytest
from ml_collections import config_dict

from vit_convert.core.errors import UsageError
from vit_convert.core.overrides import apply_overrides, dotted_keys, split_overrides


@pytest.fixture
def config():
    batch = ml_collections.ConfigDict({"max": 64, "deep": ml_collections.ConfigDict({"er": 1})})
    values = {"name": "x", "taps": False, "batch": batch, "grid": config_dict.placeholder(tuple), "rtol": 1e-3}
    return ml_collections.ConfigDict(values)


def test_keys_have_their_groups_in_front(config):
    assert sorted(dotted_keys(config)) == ["batch.deep.er", "batch.max", "grid", "name", "rtol", "taps"]


def test_other_words_are_left_in_their_order(config):
    words = [
        "--config=vit.py",
        "-v",
        "--config.name=y",
        "a",
        "--workdir",
        "out",
        "--noconfig",
        "--",
        "config.name=z",
        "--xconfig.name=z",
    ]
    left = [word for word in words if word != "--config.name=y"]
    assert split_overrides(words, config) == (["--config.name=y"], left)
    assert words[2] == "--config.name=y"  # the list itself is the caller's


@pytest.mark.parametrize(
    ("words", "taken", "left"),
    [
        (["--config.name", "y"], "--config.name=y", []),
        (["-config.name", "y", "z"], "--config.name=y", ["z"]),
        (["--config.batch.deep.er=2"], "--config.batch.deep.er=2", []),
        (["--config.batch.max", "-1"], "--config.batch.max=-1", []),  # a number, not a flag
        (["--config.name=a=b"], "--config.name=a=b", []),
        (["--config.name="], "--config.name=", []),
        (["--config.name=two\nlines"], "--config.name=two\nlines", []),
        (["--config.taps"], "--config.taps=true", []),
        (["--config.taps", "out"], "--config.taps=true", ["out"]),
        (["--config.taps", "--quiet"], "--config.taps=true", ["--quiet"]),
        (["--config.taps=0"], "--config.taps=0", []),
        (["--noconfig.taps"], "--config.taps=false", []),
        (["-noconfig.taps", "out"], "--config.taps=false", ["out"]),
    ],
)
def test_what_is_taken(config, words, taken, left):
    assert split_overrides(words, config) == ([taken], left)


@pytest.mark.parametrize(
    ("words", "said", "fix"),
    [
        (["--config.nmae=y"], "--config.nmae: unknown key. Did you mean name", "--help lists"),
        (["--config.nmae"], "--config.nmae: unknown key", "--help"),
        (["--config.batch=1"], "--config.batch: unknown key", "--help"),  # a group
        (["--config.name"], "--config.name: no value given", "--config.name=VALUE"),
        (["--config.name", "--quiet"], "--config.name: no value given", "--config.name=VALUE"),
        (["--noconfig.taps=true"], "--noconfig.taps=true: takes no value", "--config.taps=VALUE"),
        (
            ["--noconfig.batch.max"],
            "only a switch can be turned off this way, and batch.max holds 64",
            "--config.batch.max=VALUE",
        ),
        (
            ["--noconfig.batch.max=3"],
            "only a switch can be turned off this way, and batch.max holds 64",
            "--config.batch.max=VALUE",
        ),
        *(
            (
                ["--config.taps", word],
                f"--config.taps {word}: a switch takes its value after '='",
                f"Write --config.taps={word}.",
            )
            for word in ("true", "t", "1", "false", "f", "0", "True", "FALSE")  # absl's words for them
        ),
        (
            ["--noconfig.taps", "0", "out"],
            "--noconfig.taps 0: a switch takes its value after '='",
            "Write --noconfig.taps=0.",
        ),
    ],
)
def test_what_is_refused(config, words, said, fix):
    with pytest.raises(UsageError) as error:
        split_overrides(words, config)
    assert said in str(error.value) and fix in error.value.fix


def test_values_are_set_in_the_config_itself(config):
    changed = apply_overrides(
        config, ["--config.batch.max=8", "--config.name=y", "--config.batch.max=9", "--config.rtol=0.5"]
    )
    assert (changed.batch.max, changed.name, changed.rtol, changed.batch.deep.er) == (9, "y", 0.5, 1)
    assert changed is config  # an own model may hang on it, which is not copied


def test_nothing_to_set(config):
    before = config.to_dict()
    assert apply_overrides(config, []).to_dict() == before


@pytest.mark.parametrize(
    "word", ["--config.batch.max=many", "--config.batch.max=" + "9" * 5000, "--config.rtol=" + "(" * 500]
)
def test_values_of_another_type(config, word):
    with pytest.raises(UsageError) as error:
        apply_overrides(config, ["--config.name=y", word])
    assert "--config.name=y" in str(error.value) and word[:20] in str(error.value) and "--help" in error.value.fix
