"""A tiny conversion, run in this process."""

import json
import pathlib
from collections.abc import Callable

import numpy as np
import pytest

from vit_convert.__main__ import main
from vit_convert.families.random import write_random_checkpoint
from vit_convert.report.record import Report

CONFIG = """
from vit_convert.config import default_config


def get_config():
    config = default_config()
    config.checkpoint = {checkpoint!r}
    config.precision = "fp32"
    config.engine.backend = "none"
    config.check.num_images = 2
    return config
"""


class Conversion:
    """Runs the command line on one config file and reads what it left.

    Attributes:
        config: the config file; its bundle is `out/tiny`.
        bundle: the bundle's folder.
    """

    def __init__(self, folder: pathlib.Path, checkpoint: pathlib.Path):
        self.config = folder / "tiny.py"
        self.config.write_text(CONFIG.format(checkpoint=str(checkpoint)))
        self.workdir = folder / "out"
        self.bundle = self.workdir / "tiny"

    def arguments(self, *flags: str) -> list[str]:
        return [f"--config={self.config}", f"--workdir={self.workdir}", *flags]

    def __call__(self, *flags: str) -> int:
        return main(["vit_convert", *self.arguments(*flags)])

    def report(self) -> dict:
        """The report, which has the form of its schema."""
        found = json.loads((self.bundle / "report.json").read_text())
        assert Report.problems(found) == []
        return found

    def statuses(self) -> dict[str, str]:
        return {row["name"]: row["status"] for row in self.report()["stages"]}


@pytest.fixture(scope="session")
def checkpoint_file(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """mu/16 at 32x32 with 10 classes: one block of width 32."""
    path = tmp_path_factory.mktemp("checkpoint") / "mu.npz"
    write_random_checkpoint(path, "mu/16", image_size=(32, 32), num_classes=10)
    return path


@pytest.fixture
def convert(tmp_path: pathlib.Path, checkpoint_file: pathlib.Path) -> Conversion:
    """The command line on the tiny checkpoint."""
    return Conversion(tmp_path, checkpoint_file)


@pytest.fixture
def images(tmp_path: pathlib.Path) -> Callable[..., pathlib.Path]:
    """Writes a folder of PNG files of the sizes given."""
    from PIL import Image

    def write(*sizes: tuple[int, int]) -> pathlib.Path:
        folder = tmp_path / "images"
        folder.mkdir()
        for i, (height, width) in enumerate(sizes):
            pixels = np.random.default_rng(i).integers(0, 256, (height, width, 3), np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")
        return folder

    return write
