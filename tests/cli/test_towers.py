"""One tower from the command line: a causal text tower and a NaFlex, which takes no images, through every stage."""

import importlib.util
import json

import numpy as np
import pytest

from vit_convert.core.errors import BenchmarkError
from vit_convert.families.random import main as random_main
from vit_convert.images.patches import image_patches
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


@pytest.mark.slow
def test_a_naflex_is_calibrated_and_checked_on_photographs(convert, capsys, tmp_path):
    """Of any aspect, each cut as `image_patches` cuts it, which is held against transformers elsewhere."""
    image = pytest.importorskip("PIL.Image")
    generator, photos = np.random.default_rng(5), tmp_path / "photos"
    photos.mkdir()
    sizes = [(60, 200), (200, 60), (120, 120), (33, 400)]
    pixels = [generator.integers(0, 256, (*size, 3)).astype(np.uint8) for size in sizes]
    for i, one in enumerate(pixels):
        image.fromarray(one).save(photos / f"{i}.png")
    path = tmp_path / "naflex.npz"
    assert random_main(["random", "--variant=SigLIP2-mu/16-naflex", "--depth=1", f"--output={path}"]) == 0
    data = [f"--config.calibration.data={photos}", f"--config.evaluation.data={photos}"]
    flags = [f"--config.checkpoint={path}:img", "--config.precision=int8", "--config.check.num_images=4", *data]
    assert convert(*flags) == 0
    said = capsys.readouterr().err
    assert "4 evaluation images" in said and "entropy, 4 images" in said and "noise" not in said
    known = np.load(convert.bundle / "reference.npz")
    for i, one in enumerate(pixels):
        for name, value in zip(("patches", "coordinates", "mask"), image_patches(one)):
            np.testing.assert_array_equal(known[name][i], value)
    assert len({*known["mask"].sum(axis=1).tolist()}) > 1  # of one batch
    embeddings = np.load(convert.bundle / "evaluation_embeddings.npy")
    np.testing.assert_allclose(embeddings, known["embedding"], atol=1e-6)
    assert convert(*flags, "--config.target=trt8", "--config.engine.calibrator=True") == 2
    assert "this tower takes patches" in capsys.readouterr().err
