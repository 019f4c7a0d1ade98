"""A picture, where matplotlib is there."""

import sys

import numpy as np
import pytest
from PIL import Image

from vit_convert.core.picture import draw


def paint(axes):
    axes.plot([0, 1], [0, 1], "#ff0000", linewidth=8, label="what it shows")


def test_an_image_of_the_size_that_is_asked_for(tmp_path):
    pytest.importorskip("matplotlib")
    import matplotlib
    from matplotlib import pyplot

    matplotlib.use("svg")
    assert draw(tmp_path / "a.png", (4.0, 2.5), paint) == ""
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    with Image.open(tmp_path / "a.png") as image:
        assert (image.format, image.size) == ("PNG", (480, 300))  # at 120 dots an inch
        pixels = np.asarray(image.convert("RGB"))
    assert (pixels == (255, 0, 0)).all(-1).sum() > 1000  # the line, from corner to corner
    assert pyplot.get_fignums() == []  # nothing is kept of it
    assert matplotlib.get_backend().lower() == "agg"  # which opens no window


def test_by_the_files_ending(tmp_path):
    pytest.importorskip("matplotlib")
    assert draw(tmp_path / "a.b.svg", (3.0, 2.0), paint) == ""
    text = (tmp_path / "a.b.svg").read_text()
    assert text.startswith("<?xml") and "<svg" in text and "what it shows" in text  # in the legend


def test_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert draw(tmp_path / "a.png", (3.0, 2.0), paint) == "matplotlib is not installed"
    assert not [*tmp_path.iterdir()]
