"""A real bundle of a tiny random model, written by the conversion itself, to build, verify and measure."""

import pathlib
import shutil

import ml_collections
import numpy as np
import pytest
import simulated_gpu
from block_engine import FIXED, RANGE
from engine_graphs import BATCH, IMAGE, block

from vit_convert.engine.runtime.engine import Engine


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The bundle, made once; tests take a copy."""
    pytest.importorskip("jax2onnx")
    from vit_convert.convert import convert
    from vit_convert.core import config as configs
    from vit_convert.families.random import write_random_checkpoint

    folder = tmp_path_factory.mktemp("converted")
    write_random_checkpoint(folder / "tiny.npz", "mu/16", image_size=IMAGE[:2], num_classes=10)
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (40, *IMAGE), np.uint8)
    np.savez(folder / "images.npz", images=pixels, labels=generator.integers(0, 10, 40))
    given = {
        "checkpoint": str(folder / "tiny.npz"),
        "target": "trt8",
        "precision": "fp32,fp16",
        "lowerings": ("matmul",),
        "batch": BATCH,
        "evaluation": {"data": str(folder / "images.npz")},
        "engine": {"backend": "none"},
        "benchmark": {"batches": (1, 4), "streams": (1, 2), "seconds": 0.02},
    }
    convert(configs.complete(ml_collections.ConfigDict(given), "tiny"), folder, quiet=True)
    return folder / "tiny"


@pytest.fixture
def bundle_path(converted: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """A copy of the bundle for one test."""
    return pathlib.Path(shutil.copytree(converted, tmp_path / "tiny"))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch):
    """The simulated GPU: (backend, driver)."""
    return simulated_gpu.install(monkeypatch)


@pytest.fixture
def load(gpu, tmp_path: pathlib.Path):
    """Loads an engine of one block into the simulated GPU; its graph is tmp_path/model.onnx."""

    def make(ranges=(FIXED, RANGE), **options):
        graph = block(tmp_path / "model.onnx")
        return Engine(
            gpu[0], simulated_gpu.write_plan(tmp_path / "fp32.plan", graph, ranges, **options), onnx_path=graph
        )

    return make


@pytest.fixture
def engines(bundle_path: pathlib.Path, gpu):
    """Puts engines for the simulated GPU into the bundle: a range, and batch 4 fixed."""

    def put(*precisions: str, **options):
        ranges = [[(size, *IMAGE) for size in (4, 4, 4)], [(size, *IMAGE) for size in BATCH.values()]]
        for precision in precisions:
            path = bundle_path / "engines" / "tensorrt-8.6.0-sm90" / f"{precision}.plan"
            simulated_gpu.write_plan(path, bundle_path / "model.onnx", ranges, precision=precision, **options)
        return bundle_path

    return put
