"""A pair on a GPU host: engines on the simulated GPU against a forward pass in float64, and folders mixed up."""

import json
import shutil
import types

import numpy as np
import pytest
import simulated_gpu
from pair_by_hand import IMAGES, LENGTH, SIDE, TOKENS, embeddings, pixels, write_pair
from signatures import PREPROCESS

from vit_convert.core.bundle import Bundle, read_json, write_json
from vit_convert.core.errors import BenchmarkError, CheckError, UsageError
from vit_convert.core.signature import Output, Signature, Tensor
from vit_convert.engine import __main__ as command
from vit_convert.engine.pair_bundle import open_pair, samples_of
from vit_convert.images.patches import image_patches, packed_patches
from vit_convert.report.record import PairReport

SHAPES = {"image": (SIDE, SIDE, 3), "text": (LENGTH,)}


@pytest.fixture
def pair(tmp_path):
    return write_pair(tmp_path / "pair")


@pytest.fixture
def engines(gpu, monkeypatch, pair):
    """Writes engines of both towers for the simulated GPU, each output off by an error."""
    monkeypatch.setattr(command, "load_backend", lambda name, **_: gpu[0])

    def write(precision="fp32", **errors):
        for tower, shape in SHAPES.items():
            bundle = Bundle(pair / tower)
            ranges = [((1, *shape), (4, *shape), (4, *shape))]
            plan = bundle.plan("tensorrt", "8.6.0", "sm90", precision)
            simulated_gpu.write_plan(plan, bundle.onnx(), ranges, precision=precision, error=errors.get(tower, 0.0))

    return write


def verify(pair, *words):
    return command.main(["engine", "verify", str(pair), *words])


def test_engines_are_verified_one_by_one_and_together(engines, pair, capsys):
    engines()
    assert verify(pair) == 0
    whole = read_json(pair / "report.json")
    report = whole["engines"]["fp32"]
    assert PairReport.problems(whole) == [] and whole["name"] == "pair"
    assert report["passed"] and report["top1"] == report["recall"] == 100.0 and report["max_cosine_error"] < 1e-6
    image, text = embeddings("image", pixels(IMAGES)), embeddings("text", TOKENS)
    classes = text.reshape(3, 2, -1).mean(1)  # class after class, two templates each
    first = np.argmax(image @ (classes / np.linalg.norm(classes, axis=1, keepdims=True)).T, axis=1)
    assert report["zero_shot"] == report["zero_shot_jax"] == pytest.approx(100 * np.mean(first == np.arange(9) % 3))
    assert "fp32 pair" in capsys.readouterr().out
    for tower in SHAPES:
        assert read_json(pair / tower / "report.json")["verify"]["passed"]


def test_each_tower_may_pass_and_the_pair_not(engines, pair, capsys):
    """An error that a cosine of 0.98 allows in each tower, and that moves the cosine of an image and a text."""
    engines("int8", text=0.06)
    write_json(pair / "report.json", {"name": "pair", "of a later version": 1})
    words = ("--precision=int8", "--config.check.int8_similarity=0.001", "--config.text.check.int8_cosine=0.5")
    assert verify(pair, *words) == CheckError.exit_code
    shown = capsys.readouterr()
    assert "the engines' similarities are not JAX's: int8: the cosine of an image and a text is off by" in shown.err
    assert "FAILED" in shown.out and read_json(pair / "report.json")["engines"]["int8"]["passed"] is False
    assert (
        verify(
            pair,
            *words[:1],
            "--config.check.int8_similarity=1",
            "--config.text.check.int8_cosine=0.5",
            "--config.check.int8_agreement=0",
        )
        == 0
    )
    found = read_json(pair / "report.json")
    assert found["engines"]["int8"]["passed"] is True and found["of a later version"] == 1


def test_a_tower_that_misses_is_said_after_the_other_was_looked_at(engines, pair, capsys):
    engines(image=0.5)
    assert verify(pair) == CheckError.exit_code
    assert read_json(pair / "text/report.json")["verify"]["passed"] is True
    assert "engines" not in read_json(pair / "report.json", {})


def test_overrides_of_one_tower(engines, pair, monkeypatch):
    seen = {}
    monkeypatch.setitem(
        command.COMMANDS, "build", lambda host: seen.update({host.bundle.root.name: host.config.batch.max})
    )
    assert command.main(["engine", "build", str(pair), "--config.batch.max=8", "--config.text.batch.max=1024"]) == 0
    assert seen == {"image": 8, "text": 1024}


@pytest.mark.parametrize("mistake", ["another tower", "unfinished", "no tower", "no evaluation"])
def test_folders_that_are_no_whole_pair(engines, pair, tmp_path, capsys, mistake):
    engines()
    if mistake == "another tower":  # of another conversion
        other = write_pair(tmp_path / "other")
        record = json.loads((other / "pair.json").read_text())
        write_json(pair / "pair.json", {**record, "graphs": {**record["graphs"], "text": "0" * 64}})
        said, code = "is not the text tower that", UsageError.exit_code
    elif mistake == "unfinished":
        manifest = read_json(pair / "manifest.json")
        write_json(pair / "manifest.json", {"stages": [{**row, "status": "stale"} for row in manifest["stages"]]})
        said, code = "stage pair is not done", UsageError.exit_code
    elif mistake == "no tower":
        shutil.rmtree(pair / "text")
        said, code = "text: holds no manifest.json", UsageError.exit_code
    else:
        (pair / "text/evaluation_tokens.npy").unlink()
        said, code = "evaluation_tokens.npy: there is no such file", BenchmarkError.exit_code
    assert verify(pair) == code and said in capsys.readouterr().err


def test_without_evaluation_data_the_reference_stands_in(gpu, tmp_path):
    pair = write_pair(tmp_path / "bare", evaluated=False)
    facts, bundles = open_pair(pair)
    assert facts.classes == 0 and set(bundles) == {"image", "text"}


def test_a_naflex_tower_is_fed_the_patches_that_its_folder_keeps(tmp_path):
    """By kind, whatever the inputs are called; they are no tokens, though no input takes images."""
    pytest.importorskip("PIL")  # images are resized with it
    bundle, generator = Bundle(tmp_path), np.random.default_rng(1)
    sizes = [(30, 90), (8, 8), (90, 31)]
    images = [generator.integers(0, 256, (*size, 3)).astype(np.uint8) for size in sizes]
    np.save(bundle.images("evaluation"), np.stack([packed_patches(image, 8, 20) for image in images]))
    kinds = {"mask": ("int32", ()), "where": ("int32", (2,)), "cut": ("float32", (192,))}
    inputs = tuple(Tensor(name, dtype, ("batch", 20, *more)) for name, (dtype, more) in kinds.items())
    output = Output("embedding", "float32", ("batch", 4), judge="embedding")
    kept = {bundle.images("evaluation"), bundle.embeddings}
    files = type("Files", (), {"__contains__": lambda self, path: path in kept, "wrong": lambda self, path: ""})()
    facts = types.SimpleNamespace(
        signature=Signature(inputs, (output,)), files=files, patches=(20, 8), preprocess=PREPROCESS
    )
    (feeds,) = samples_of(bundle, facts)
    for place, image in enumerate(images):
        for name, right in zip(("cut", "where", "mask"), image_patches(image, 8, 20)):
            np.testing.assert_array_equal(feeds[name][place], right)
