"""One tower from the command line: a causal text tower and a NaFlex, which takes no images, through every stage."""

import importlib.util

import pytest

from vit_convert.families.random import main as random_main

CASES = {
    "text": ("CLIP-mu/16", "safetensors:txt", "CLIP-mu, ", "12 tokens", "texts"),
    "patches": ("SigLIP2-mu/16-naflex", "npz:img", "SigLIP custom, ", "256 patches", "images"),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", CASES)
def test_converts_and_builds(convert, capsys, kind):
    variant, part, called, takes, noise = CASES[kind]
    suffix, _, tower = part.partition(":")
    path = convert.config.parent / f"{kind}.{suffix}"
    assert random_main(["random", f"--variant={variant}", "--depth=2", f"--output={path}"]) == 0
    flags = [f"--config.checkpoint={path}:{tower}", "--config.precision=fp16,int8"]
    if importlib.util.find_spec("tensorrt_rtx") is not None:
        flags.append("--config.engine.backend=rtx")
    assert convert(*flags, "--config.calibration.num_images=8") == 0
    said = capsys.readouterr().err
    assert called in said and takes in said and f"8 {noise}" in said
    report = convert.report()
    assert report["checkpoint"]["image_size"] == [] and report["checkpoint"]["output"] == "embedding"
    assert all(check["passed"] for check in report["checks"].values()) and {"fp16", "int8"} <= set(report["checks"])
    if len(flags) == 3:
        assert len(list(convert.bundle.glob("engines/rtx-*/*.plan"))) >= 2
