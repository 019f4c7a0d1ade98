"""A config file with an own model, and the command that converts it."""

import json
import pathlib

from vit_convert.__main__ import main

HEADER = """
import dataclasses
import sys
from collections import namedtuple

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vit_convert.config import default_config


def draw(shapes):
    rng = np.random.default_rng(0)
    return jax.tree_util.tree_map(
        lambda leaf: np.abs(rng.standard_normal(leaf.shape) / 6 + 0.1).astype(leaf.dtype), shapes
    )


def variables(module, **arguments):
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    return draw(jax.eval_shape(lambda: module.init(keys, jnp.zeros((1, 16, 16, 3)), **arguments)))


W = (np.arange(15, dtype=np.float32).reshape(3, 5) - 7) / 10


def pooled(x):
    return x.mean((1, 2))
"""


class Own:
    """One config file in a folder of its own.

    Args:
        folder: gets the file and the bundle.
    """

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self.config = folder / "mine.py"
        self.bundle = folder / "out/mine"

    def convert(self, source: str, model: str, *flags: str, settings: str = "") -> int:
        """Writes the config with these definitions and `config.model = <model>`, and converts; returns the exit
        code."""
        ending = f"""
def get_config():
    config = default_config()
    config.model = {model}
    config.image_size = (16, 16)
    config.engine.backend = "none"
    config.precision = "fp32"
    {settings}
    return config
"""
        self.config.write_text(f"{HEADER}\n{source}\n{ending}")
        return self.again(*flags)

    def again(self, *flags: str) -> int:
        return main(["vit_convert", f"--config={self.config}", f"--workdir={self.folder / 'out'}", "--quiet", *flags])

    def report(self) -> dict:
        return json.loads((self.bundle / "report.json").read_text())

    def stage(self, name: str) -> dict:
        """What a stage left in the manifest."""
        stages = json.loads((self.bundle / "manifest.json").read_text())["stages"]
        return next(row["result"] for row in stages if row["name"] == name)

    def line(self, text: str) -> int:
        """The number of the line of the config file that holds a text."""
        lines = self.config.read_text().splitlines()
        return next(number for number, line in enumerate(lines, start=1) if text in line)
