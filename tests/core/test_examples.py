"""The examples in docstrings do what they say, and every public name has one."""

import contextlib
import doctest
import importlib
import io
import pathlib

import numpy as np
import pytest
from pair_by_hand import IMAGES, TOKENS, pixels, write_pair

import vit_convert
from vit_convert.__main__ import main
from vit_convert.families.random import write_random_checkpoint

PACKAGE = pathlib.Path(vit_convert.__file__).parent
WITH_EXAMPLES = sorted(
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py")
    if ">>> " in path.read_text(encoding="utf-8")
)


@pytest.fixture(scope="module")
def at_hand(tmp_path_factory):
    """What examples may use: `out/tiny`, a bundle, and `images` that its graph takes; `out/pair`, a pair of towers,
    and `pixels` and `tokens` that these take."""
    folder = tmp_path_factory.mktemp("examples")
    write_random_checkpoint(folder / "mu.npz", "mu/16", image_size=(32, 32), num_classes=10)
    (folder / "tiny.py").write_text(
        "from vit_convert import default_config\n\n\ndef get_config():\n    config = default_config()\n"
        "    config.checkpoint, config.engine.backend = 'mu.npz', 'none'\n    return config\n"
    )
    with contextlib.chdir(folder):
        assert main(["vit_convert", "--config=tiny.py", "--config.precision=fp32", "--quiet"]) == 0
        images = np.load("out/tiny/reference.npz")["images"]
    write_pair(folder / "out/pair")
    return folder, {"vit_convert": vit_convert, "images": images, "pixels": pixels(IMAGES[:4]), "tokens": TOKENS[:3]}


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_examples(name, at_hand, monkeypatch):
    folder, names = at_hand
    monkeypatch.chdir(folder)
    module, said = importlib.import_module(name), io.StringIO()
    runner = doctest.DocTestRunner(verbose=False)
    found = [test for test in doctest.DocTestFinder(recurse=True).find(module, name, extraglobs=names) if test.examples]
    assert found
    with contextlib.redirect_stdout(said):
        for test in found:
            runner.run(test, out=said.write)
    assert runner.failures == 0, said.getvalue()


@pytest.mark.parametrize("name", vit_convert.__all__)
def test_each_public_name_has_an_example(name):
    assert ">>> " in getattr(vit_convert, name).__doc__


def test_a_name_that_is_not_public():
    with pytest.raises(AttributeError, match="no attribute 'Sesion'"):
        vit_convert.Sesion  # noqa: B018
