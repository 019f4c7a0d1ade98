"""Mistakes in the code of a family from outside: one message with its name and its line, and never a success that
proves less."""

import dataclasses
import enum
import pathlib
import types

import captioned
import numpy as np
import pytest

from vit_convert.core.errors import CheckpointError, ExportError
from vit_convert.core.model import missing_results
from vit_convert.families.family import Asked, RandomOptions, TowerFamily
from vit_convert.families.load import load_checkpoint
from vit_convert.families.outside import guarded

ASKED = Asked(pathlib.Path("a.npz"))


def family(**parts):
    """Captioned, with some parts in place of its own."""
    held = {name: getattr(captioned.FAMILY, name) for name in ("name", "layouts", "variants")}
    methods = {
        name: getattr(captioned.FAMILY, name) for name in ("match", "load", "model", "has_variant", "write_random")
    }
    return guarded(types.SimpleNamespace(**{**held, **methods, **parts}), "mine.py:FAMILY")


def fails(*_):
    raise ValueError("a slip of mine")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    path = tmp_path_factory.mktemp("outside") / "a.npz"
    captioned.FAMILY.write_random(path, "captioned", RandomOptions(depth=3))
    return load_checkpoint(path, families=(f"{captioned.__file__}:FAMILY",))


@pytest.mark.parametrize(
    ("part", "arguments"),
    [
        ("match", (["a"],)),
        ("load", ({}, None, ASKED)),
        ("model", (None,)),
        ("has_variant", ("S",)),
        ("write_random", ("a.npz", "S", RandomOptions())),
        ("towers", (["a"], None)),
    ],
)
def test_what_its_code_raises(part, arguments):
    with pytest.raises(ExportError) as error:
        getattr(family(**{part: fails}), part)(*arguments)
    assert str(error.value).startswith(f"config.families: {part} of mine.py:FAMILY: ValueError: a slip of mine (")
    assert "test_outside_mistakes.py:" in str(error.value)


def test_what_it_refuses_itself_is_said_as_it_says_it():
    def refuse(*_):
        raise CheckpointError("a.npz: not today", fix="Come back.")

    with pytest.raises(CheckpointError, match=r"^a\.npz: not today$"):
        family(load=refuse).load({}, None, ASKED)


@pytest.mark.parametrize(
    ("part", "found", "said"),
    [
        ("match", True, "TypeError: it returned a bool, not a Enum"),
        ("load", None, "TypeError: it returned a NoneType, not a Loaded"),
        ("model", (1, 2), "TypeError: it returned a tuple, not a Model"),
    ],
)
def test_what_it_returns_is_of_the_right_kind(part, found, said):
    arguments = {"match": (["a"],), "load": ({}, None, ASKED), "model": (None,)}[part]
    with pytest.raises(ExportError, match=said):
        getattr(family(**{part: lambda *_: found}), part)(*arguments)


def test_of_no_layout():
    assert family(match=lambda names: None).match(["a"]) is None
    layout = enum.Enum("Layout", ["A"]).A
    assert family(match=lambda names: layout).match(["a"]) is layout


def test_towers_are_those_of_a_family_with_towers():
    """`isinstance` with a protocol looks at the class, from Python 3.12 on."""
    assert isinstance(family(towers=lambda names, layout: ["text"]), TowerFamily)
    assert family(towers=lambda names, layout: ["text"]).towers([], None) == ("text",)
    assert not isinstance(family(), TowerFamily)


def test_its_reference(loaded):
    """What `run` raises is told like the rest; what it returns passes."""
    images, caption = np.zeros((2, 8, 8, 3), np.float32), np.zeros((2, 5), np.int32)
    model = family().model(loaded)
    assert missing_results(model, model.run(images, caption), 2) == ""
    broken = family(model=lambda loaded: dataclasses.replace(model, run=fails)).model(loaded)
    with pytest.raises(ExportError, match=r"Model\.run of mine\.py:FAMILY: ValueError: a slip of mine"):
        broken.run(images, caption)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda found: found.pop("block_01"), "it returned no block_01, but scores, pair, block_00, block_02"),
        (lambda found: found.pop("pair"), "it returned no pair, but "),
        (lambda found: found.update(pair=found["pair"][:1]), "pair has the shape (1, 16), for a batch of 2"),
        (lambda found: found.update(block_02=np.float32(1)), "block_02 has the shape (), for a batch of 2"),
        (lambda found: found.clear(), "it returned no scores, but nothing"),
    ],
)
def test_a_reference_that_lacks_something(loaded, change, said):
    """A block that is left out would be compared with nothing, and the rest would pass."""
    model = loaded.family.model(loaded)
    found = model.run(np.zeros((2, 8, 8, 3), np.float32), np.zeros((2, 5), np.int32))
    change(found)
    assert missing_results(model, found, 2).startswith(said)
    assert missing_results(model, [*found.values()], 2) == "it returned a list, not a dictionary of arrays"


def test_no_conversion_succeeds_with_a_block_unproved(loaded, monkeypatch, tmp_path, capsys):
    from vit_convert.__main__ import main

    text = pathlib.Path(captioned.__file__).read_text()
    (tmp_path / "mine.py").write_text(
        text.replace("for name, value in found.items()", 'for name, value in found.items() if "0" not in name')
    )
    (tmp_path / "config.py").write_text(
        "from vit_convert.config import default_config\n\n\ndef get_config():\n    config = default_config()\n"
        f"    config.families = ({str(tmp_path / 'mine.py:FAMILY')!r},)\n    config.checkpoint = {str(loaded.path)!r}\n"
        "    config.precision, config.engine.backend = 'fp32', 'none'\n    return config\n"
    )
    code = main(["vit_convert", f"--config={tmp_path / 'config.py'}", f"--workdir={tmp_path / 'out'}", "--quiet"])
    assert code == ExportError.exit_code
    assert "the run of the captioned model: it returned no block_00" in capsys.readouterr().err
