"""One tower from the command line: a causal text tower and a NaFlex, which takes no images, through every stage."""

import importlib.util
import json

import numpy as np
import pytest

from vit_convert.core.errors import BenchmarkError
from vit_convert.families.random import main as random_main
from vit_convert.serve.session import FallbackSession

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


@pytest.mark.slow
def test_texts_of_a_range_of_lengths(convert, capsys):
    """Checked at three lengths, built with profiles over them, served at any; longer ones are refused by name."""
    path = convert.config.parent / "clip.safetensors"
    assert random_main(["random", "--variant=CLIP-mu/16", f"--output={path}"]) == 0
    flags = [f"--config.checkpoint={path}:txt", "--config.precision=fp16,int8", "--config.calibration.num_images=8"]
    has_rtx = importlib.util.find_spec("tensorrt_rtx") is not None
    flags += ["--config.engine.backend=rtx"] if has_rtx else []
    assert convert(*flags, "--config.text_length=dynamic:3..12@6") == 0
    assert "3 to 12 tokens, tuned for 6" in capsys.readouterr().err
    signature = json.loads((convert.bundle / "signature.json").read_text())
    assert signature["inputs"][0]["shape"] == ["batch", "length"]
    lengths = ["6 tokens", "3 tokens", "12 tokens"]
    assert [[*check["sizes"]] for check in convert.report()["checks"].values()] == [lengths] * 3
    for sidecar in convert.bundle.glob("engines/rtx-*/*.plan.json"):
        shapes = json.loads(sidecar.read_text())["profiles"][-1]["tokens"]
        assert [shape[1] for shape in shapes] == [3, 6, 12]
    assert len([*convert.bundle.glob("engines/rtx-*/*.plan")]) == 2 * has_rtx
    with FallbackSession(convert.bundle) as session:
        for length in (3, 6, 12):
            name = "reference.npz" if length == 6 else f"reference.{length}.npz"
            known = np.load(convert.bundle / name)
            assert known["tokens"].shape[1] == length
            np.testing.assert_allclose(session.run(known["tokens"])["embedding"], known["embedding"], atol=1e-6)
        for length in (2, 13):
            with pytest.raises(BenchmarkError, match=rf"tokens \[1, {length}\]: .* the model takes 3 to 12"):
                session.run(np.ones((1, length), np.int32))
    assert convert(*flags, "--config.text_length=dynamic:3..13") == 2
