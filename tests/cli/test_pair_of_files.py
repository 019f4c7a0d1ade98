"""A pair whose towers lie in two files, as TIPS's: one command, one pair."""

import contextlib

import numpy as np
import pytest

import vit_convert
from vit_convert.__main__ import main
from vit_convert.checkpoint.containers import read_container
from vit_convert.core.bundle import read_json
from vit_convert.core.errors import CheckpointError, UsageError
from vit_convert.families.random import write_random_checkpoint

CONFIG = """
from vit_convert import default_config


def get_config():
    config = default_config()
    config.checkpoint, config.text.checkpoint = "image.npz", "text.npz"
    config.engine.backend, config.precision = "none", "fp16"
    config.text.calibration.data, config.check.num_images = "ids.npy", 2
    return config
"""


@pytest.fixture
def files(tmp_path):
    write_random_checkpoint(tmp_path / "image.npz", "TIPSv2-mu/14", image_size=(28, 28), depth=1)
    write_random_checkpoint(tmp_path / "text.npz", "TIPS-mu/14", towers="text", depth=1)
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(1, 80, (4, 64)))
    (tmp_path / "tips.py").write_text(CONFIG)
    return tmp_path


def convert(folder, *words):
    with contextlib.chdir(folder):
        return main(["vit_convert", "--config=tips.py", "--quiet", *words])


def test_two_files_are_one_pair(files):
    assert convert(files) == 0
    root = files / "out/tips"
    record, temperature = read_json(root / "pair.json"), read_container(files / "text.npz")["temperature_contrastive"]
    assert record["similarity"] == "softmax" and record["logit_scale"] == pytest.approx(1 / float(temperature))
    report = read_json(root / "report.json")
    assert report["status"] == "done" and all(row["passed"] for row in report["checks"].values())
    images = np.random.default_rng(1).random((3, 28, 28, 3), np.float32)
    with vit_convert.Session(root) as session:
        image, text = session.image(images), session.text(np.load(files / "ids.npy"))
        found = session.similarity(image, text)
    logits = image.astype(np.float64) @ text.astype(np.float64).T / float(temperature)
    right = np.exp(logits - logits.max(1, keepdims=True))
    np.testing.assert_allclose(found, right / right.sum(1, keepdims=True), atol=1e-6)
    assert convert(files) == 0  # and nothing is done again
    assert {row["status"] for row in read_json(root / "report.json")["stages"]} == {"fresh"}


def test_files_that_are_no_pair(files, capsys):
    assert convert(files, "--config.text.checkpoint=image.npz") == UsageError.exit_code
    assert "image.npz:txt: the checkpoint has no such tower" in capsys.readouterr().err
    arrays = dict(np.load(files / "text.npz"))
    del arrays["temperature_contrastive"]
    np.savez(files / "text.npz", **arrays)
    assert convert(files) == CheckpointError.exit_code
    assert "temperature_contrastive: missing" in capsys.readouterr().err
