"""Engines of the lowerings with our own kernels on a real GPU: INT8 between convolutions, and all in FP16.

    VIT_CONVERT_BUNDLE=path/of/a/bundle VIT_CONVERT_RESULTS=results.json python -m pytest -m gpu
    tests/gpu/test_fused_on_gpu.py

Needs what test_build_on_gpu.py does, the library of kernels, and a bundle converted with `--config.precision=fp16,int8
--config.engine.int8_lowering=fused --config.lowerings="('kernels',)"`, of heads of 64. Use a small model.
"""

import shutil

import numpy as np
import pytest
from gpu_bundle import BACKEND, run, tiled

from vit_convert import kernels
from vit_convert.core.bundle import Bundle, read_json
from vit_convert.core.compare import compare
from vit_convert.engine.handoff import read_config
from vit_convert.engine.runtime.engine import Engine
from vit_convert.engine.runtime.session import Session

pytestmark = pytest.mark.gpu

SIZES = ("--config.batch.min=1", "--config.batch.opt=64", "--config.batch.max=256", "--config.batch.profiles=(1,256)")
BATCHES = (1, 2, 3, 7, 64, 65, 255, 256)


@pytest.fixture(scope="module", autouse=True)
def _needed(bundle):
    if not kernels.library().is_file():
        pytest.skip(f"no {kernels.library()}")
    if read_config(bundle).engine.int8_lowering != "fused" or not bundle.lowering("kernels").is_file():
        pytest.skip("the bundle has no such lowerings")


def outputs(plan, reference, output):
    with Session(Engine(BACKEND, plan)) as session:
        return {batch: session.run(tiled(reference, batch))[output] for batch in BATCHES}


def require_close(found, reference, output, cosine, record_property, name):
    """Every batch is as near to JAX as it has to be, and an image comes out alike wherever it stands in a batch."""
    worst = {}
    for batch, got in found.items():
        assert np.isfinite(got).all()
        worst[batch] = compare(reference[output][np.arange(batch) % len(reference["images"])], got).cosine
    record_property(name, {"cosine": worst})
    assert min(worst.values()) > cosine
    alike = found[256][np.arange(256) % len(reference["images"]) == 0]
    scale = np.abs(alike).max()
    assert np.abs(alike - alike[0]).max() <= 1e-3 * scale  # one engine, one profile, one image


def test_int8_between_our_kernels(bundle, facts, reference, tmp_path, record_property):
    copy = Bundle(shutil.copytree(bundle.root, tmp_path / "bundle", ignore=shutil.ignore_patterns("engines")))
    assert run("build", copy.root, "--precision=int8", batches=SIZES) == 0
    assert run("verify", copy.root, "--precision=int8", batches=SIZES) == 0
    names = {"precision": "int8", "backend": BACKEND.name, "version": BACKEND.version}
    (built,) = [row for row in read_json(copy.report)["engines"] if names.items() <= row.items()]
    record_property("built", {"int8_layers": built["int8_layers"], "graph": built["graph"]})
    assert built["graph"] == "fused.int8.onnx" and built["int8_layers"] > 0
    plan = copy.plan(BACKEND.name, BACKEND.version, BACKEND.arch, "int8")
    cosine = read_config(copy).check.int8_cosine
    require_close(outputs(plan, reference, facts.output), reference, facts.output, cosine, record_property, "int8")


def test_our_kernels_in_fp16(bundle, facts, reference, tmp_path, record_property):
    copy = Bundle(shutil.copytree(bundle.root, tmp_path / "bundle", ignore=shutil.ignore_patterns("engines")))
    words = ("--precision=fp16", "--config.engine.lowering=kernels")
    assert run("build", copy.root, *words, batches=SIZES) == 0 and run("verify", copy.root, *words, batches=SIZES) == 0
    plan = copy.plan(BACKEND.name, BACKEND.version, BACKEND.arch, "fp16")
    assert read_json(f"{plan}.json")["onnx"]["path"] == "kernels.onnx"
    cosine = read_config(copy).check.fp16_cosine
    require_close(outputs(plan, reference, facts.output), reference, facts.output, cosine, record_property, "fp16")
