"""Verification of a dynamic engine on the simulated GPU: at the size it is tuned for and at two others, from uint8
pixels."""

import ml_collections
import numpy as np
import pytest
import simulated_gpu
from reconverted import as_left

from vit_convert.core import config as configs
from vit_convert.core.bundle import Bundle
from vit_convert.core.errors import CheckError
from vit_convert.core.image_size import ImageRange
from vit_convert.core.progress import Progress
from vit_convert.engine.commands import verify_bundle
from vit_convert.engine.handoff import read_config, read_facts
from vit_convert.engine.host import EngineHost

RANGE = [[1, 32, 32, 3], [4, 64, 64, 3], [8, 96, 96, 3]]


@pytest.fixture(scope="module")
def dynamic(tmp_path_factory):
    """A bundle for 32 to 96 pixels."""
    pytest.importorskip("jax2onnx")
    from vit_convert.convert import convert
    from vit_convert.families.random import write_random_checkpoint

    folder = tmp_path_factory.mktemp("dynamic")
    write_random_checkpoint(folder / "tiny.npz", "mu/16", image_size=(64, 64), num_classes=10)
    given = {
        "checkpoint": str(folder / "tiny.npz"),
        "image_size": "dynamic:32..96",
        "input": "uint8",
        "precision": "fp32",
        "engine": {"backend": "none"},
    }
    convert(configs.complete(ml_collections.ConfigDict(given), "tiny"), folder, quiet=True)
    return folder / "tiny"


def host_of(gpu, bundle):
    return EngineHost.open(gpu[0], bundle, read_config(bundle), Progress(quiet=True))


@pytest.mark.parametrize("spoiled", [None, "reference.npz", "reference.32x32.npz", "reference.96x64.npz"])
def test_every_size_is_judged(dynamic, monkeypatch, spoiled):
    gpu = simulated_gpu.install(monkeypatch)
    bundle = Bundle(dynamic)
    plan = dynamic / "engines" / "tensorrt-8.6.0-sm90" / "fp32.plan"
    simulated_gpu.write_plan(plan, bundle.onnx(), [RANGE], precision="fp32")
    facts = read_facts(bundle)
    assert facts.image_size == ImageRange((32, 32), (64, 64), (96, 96))
    kept = (dynamic / spoiled).read_bytes() if spoiled else b""
    try:
        if spoiled:
            with np.load(dynamic / spoiled) as file:
                arrays = {name: file[name] for name in file.files}
            np.savez(dynamic / spoiled, **{**arrays, "logits": arrays["logits"] + 1})
            as_left(dynamic, spoiled)
            height, width = arrays["images"].shape[1:3]
            with pytest.raises(CheckError, match=f"of {height}x{width}: max abs"):
                verify_bundle(host_of(gpu, bundle), precisions=("fp32",))
            return
        found = verify_bundle(host_of(gpu, bundle), precisions=("fp32",))
        rows = found.engines["fp32"].rows
        assert {row.image_size for row in rows} == {(64, 64), (32, 32), (96, 64)} and all(row.passed for row in rows)
    finally:
        if spoiled:
            (dynamic / spoiled).write_bytes(kept)
            as_left(dynamic, spoiled)
