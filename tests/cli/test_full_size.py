"""One full-size conversion, ViT-B/32 with random weights, to real FP16 and INT8 engines: what the small models cannot
show."""

import json

import pytest

from vit_convert.__main__ import main
from vit_convert.families.random import write_random_checkpoint


@pytest.mark.slow
def test_b32_to_engines(tmp_path):
    pytest.importorskip("tensorrt_rtx")
    checkpoint = tmp_path / "B32.npz"
    write_random_checkpoint(checkpoint, "B/32")
    argv = [
        "vit_convert",
        "--config=vit_b32.py",
        f"--config.checkpoint={checkpoint}",
        f"--workdir={tmp_path}",
        "--quiet",
    ]
    assert (
        main([*argv, "--config.engine.backend=rtx", "--config.check.num_images=2", "--config.calibration.num_images=8"])
        == 0
    )
    report = json.loads((tmp_path / "vit_b32" / "report.json").read_text())
    assert report["checkpoint"]["num_params"] == 88_224_232
    assert report["onnx"]["nodes_per_block"] <= 30 and report["onnx"]["num_shapes"] <= 1
    assert {precision for precision, check in report["checks"].items() if check["passed"]} == {"fp32", "fp16", "int8"}
    sizes = {engine["precision"]: engine["bytes"] for engine in report["engines"]}
    # Weights dominate: 88 M in two bytes each, and about 84 M of them in one byte.
    assert 170e6 < sizes["fp16"] < 200e6 and 90e6 < sizes["int8"] < 120e6
