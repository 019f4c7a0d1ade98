"""Checkpoints to convert many of, written once."""

import pathlib
from collections.abc import Callable

import pytest

from vit_convert.families.random import write_random_checkpoint


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[pathlib.Path]:
    """Three of mu/16 at 32x32 with 10 classes, of different weights."""
    folder = tmp_path_factory.mktemp("zoo")
    paths = [folder / f"mu{seed}.npz" for seed in range(3)]
    for seed, path in enumerate(paths):
        write_random_checkpoint(path, "mu/16", image_size=(32, 32), num_classes=10, seed=seed)
    return paths


@pytest.fixture
def touch(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes empty files below a folder that is the current one."""
    monkeypatch.chdir(tmp_path)

    def make(*names: str) -> None:
        for name in names:
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()

    return make
