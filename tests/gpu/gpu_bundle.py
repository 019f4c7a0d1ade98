"""What the tests on a GPU share: the bundle that they are given, the TensorRT of this host, and how its commands are
run."""

import os

import numpy as np
import pytest

from vit_convert.engine import __main__ as command
from vit_convert.engine.backend import cuda
from vit_convert.engine.backend.trt import load_backend

if cuda.gpu() is None:
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)
GIVEN = os.environ.get("VIT_CONVERT_BUNDLE", "")
if not GIVEN:
    pytest.skip("VIT_CONVERT_BUNDLE names no bundle", allow_module_level=True)
pytest.importorskip("tensorrt")
BACKEND = load_backend("tensorrt")
BATCHES = ("--config.batch.min=1", "--config.batch.opt=4", "--config.batch.max=8", "--config.batch.profiles=(16,)")
# Builds in half the time.
ONE_PROFILE = ("--config.batch.min=1", "--config.batch.opt=4", "--config.batch.max=16", "--config.batch.profiles=()")


def run(*words, batches=BATCHES):
    """Runs a command of `python -m vit_convert.engine` and returns its exit code."""
    return command.main(["engine", *map(str, words), "--backend=tensorrt", *batches])


def tiled(reference, batch):
    """So many images of the reference, in turn."""
    return reference["images"][np.arange(batch) % len(reference["images"])]
