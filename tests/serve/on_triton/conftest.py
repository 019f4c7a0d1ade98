"""A bundle of the tiny model with labelled images, and engines as TensorRT would have left them there."""

import copy
import pathlib
import shutil
import sys

import fake_triton
import pytest
from tiny_bundle import convert_tiny

SIDE, CLASSES, LARGEST = 32, 10, 8


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The bundle, made once; tests that change it take `bundle_path`."""
    pytest.importorskip("jax2onnx")
    batch = {"min": 1, "opt": 4, "max": LARGEST}
    return convert_tiny(tmp_path_factory.mktemp("served"), (SIDE, SIDE, 3), 6, batch=batch)


@pytest.fixture
def bundle_path(converted: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """A copy of the bundle for one test."""
    return pathlib.Path(shutil.copytree(converted, tmp_path / "tiny"))


@pytest.fixture
def plan(bundle_path: pathlib.Path):
    """Puts an engine with its sidecar into the bundle, proved unless told otherwise; returns its path."""
    from vit_convert.core.bundle import Bundle
    from vit_convert.core.engine_results import EngineCheck
    from vit_convert.engine.backend.graph_file import graph_hashes
    from vit_convert.engine.backend.sidecar import Sidecar, plan_file, write_sidecar
    from vit_convert.engine.bundle_engines import keep_proof
    from vit_convert.engine.handoff import judged_by

    def put(
        arch="sm90", precision="fp16", version="8.6.1", batches=((1, 4, 8),), proved=True, backend="tensorrt", **options
    ):
        path = bundle_path / "engines" / f"{backend}-{version}-{arch}" / f"{precision}.plan"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(f"{arch} {precision} {version}".encode())
        record = {
            "backend": backend,
            "version": version,
            "targets": [arch],
            "precision": precision,
            "options": {"version_compatible": False, "hardware_compatible": False, "tf32": False, **options},
            "onnx": {"path": "model.onnx", **graph_hashes(bundle_path / "model.onnx")},
            "profiles": [{"images": [[size, SIDE, SIDE, 3] for size in triple]} for triple in batches],
            "inputs": [{"name": "images", "dtype": "float32", "shape": [-1, SIDE, SIDE, 3]}],
            "outputs": [{"name": "logits", "dtype": "float32", "shape": [-1, CLASSES]}],
        }
        write_sidecar(path, Sidecar.from_dict({**record, "plan": plan_file(path).to_dict()}))
        if proved:
            keep_proof(path, EngineCheck.from_dict({"passed": True}), judged_by(Bundle(bundle_path)))
        return path

    return put


@pytest.fixture
def utils(monkeypatch: pytest.MonkeyPatch):
    """Triton's module for Python models, in the place where they import it from."""
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", fake_triton)
    monkeypatch.setattr(fake_triton.MetricFamily, "values", copy.copy({}))
    return fake_triton
