"""A real bundle of a tiny random model, written by the conversion itself, to build, verify and measure."""

import pathlib
import shutil

import pytest
import simulated_gpu
from block_engine import FIXED, RANGE
from engine_graphs import BATCH, IMAGE, block
from tiny_bundle import convert_tiny

from vit_convert.engine.runtime.engine import Engine


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The bundle, made once; tests take a copy."""
    pytest.importorskip("jax2onnx")
    return convert_tiny(
        tmp_path_factory.mktemp("converted"),
        IMAGE,
        40,
        lowerings=("matmul",),
        batch=BATCH,
        benchmark={"batches": (1, 4), "streams": (1, 2), "seconds": 0.02},
    )


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
