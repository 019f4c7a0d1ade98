"""One command takes a checkpoint of two towers to a pair: two bundles, what they are together, compared with JAX."""

import contextlib
import importlib
import json
import pathlib
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

from vit_convert.__main__ import main, parse_config
from vit_convert.convert import fresh_report
from vit_convert.core import onnx_file
from vit_convert.core.bundle import Bundle, read_json
from vit_convert.core.errors import CheckError, UsageError
from vit_convert.core.lock import hold
from vit_convert.core.manifest import Manifest
from vit_convert.core.pair_results import SimilarityResult
from vit_convert.families.load import load_checkpoint
from vit_convert.families.random import write_random_checkpoint
from vit_convert.report.record import PairReport
from vit_convert.text.prompting import Prompting

sentencepiece = pytest.importorskip("sentencepiece", reason="the extra `text` is not installed")

SIDE, LENGTH, IMAGES = 32, 8, 12
CLASSES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
DIGITS = pathlib.Path(__file__).parents[2] / "checkpoints/digits"  # real images, each in a folder of its class
CONFIG = """
from vit_convert import default_config


def get_config():
    config = default_config()
    config.checkpoint, config.engine.backend, config.precision = "mu.npz", "none", "int8"
    config.calibration.data, config.evaluation.data = "calibration.zip", "heldout.zip"
    config.evaluation.num_images = 12
    config.evaluation.prompts, config.evaluation.templates = "classes.txt", ("a photo of a {}", "{}")
    config.tokenizer, config.calibration.num_images = "spiece.model", 8
    config.text.batch.max, config.text.keep_fp16 = 256, ("head",)
    config.check.min_agreement = config.check.int8_agreement = 0.0  # of random weights, texts may be equally near
    return config
"""


def write_inputs(folder: pathlib.Path) -> None:
    """A random SigLIP of two blocks and 96 words, labelled images, classes, and a tokenizer of one sentence."""
    write_random_checkpoint(folder / "mu.npz", "SigLIP-mu/16", image_size=(SIDE, SIDE), length=LENGTH)
    for name in ("calibration.zip", "heldout.zip"):
        shutil.copy(DIGITS / name, folder / name)
    (folder / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    (folder / "text.txt").write_text(f"a photo of a {' '.join(CLASSES)}\n" * 20)
    ids = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
    options = {"vocab_size": 40, "hard_vocab_limit": False, "minloglevel": 2, "num_threads": 1, **ids}
    trainer = sentencepiece.SentencePieceTrainer
    trainer.train(input=str(folder / "text.txt"), model_prefix=str(folder / "spiece"), **options)
    (folder / "pair.py").write_text(CONFIG)


def convert(folder: pathlib.Path, *words: str) -> int:
    """Runs the command in a folder."""
    with contextlib.chdir(folder):
        return main(["vit_convert", "--config=pair.py", "--quiet", *words])


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """The finished pair; tests that change something take a copy."""
    folder = tmp_path_factory.mktemp("pair")
    write_inputs(folder)
    assert convert(folder) == 0
    return folder


@pytest.fixture
def copied(converted, tmp_path):
    return pathlib.Path(shutil.copytree(converted, tmp_path / "copy"))


def files_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_pair_is_two_bundles_and_its_record(converted):
    root = converted / "out/pair"
    record = read_json(root / "pair.json")
    stored = np.load(converted / "mu.npz")
    assert record["logit_scale"] == pytest.approx(np.exp(float(stored["t"][0]))) and record["similarity"] == "sigmoid"
    assert record["logit_bias"] == pytest.approx(float(stored["b"][0])) and record["text"]["length"] == LENGTH
    assert (record["classes"], record["templates"]) == (len(CLASSES), 2)
    for tower, taken, most in (("image", "images", 64), ("text", "tokens", 256)):
        bundle = Bundle(root / tower)
        assert [t["name"] for t in read_json(bundle.signature)["inputs"]] == [taken]
        report = read_json(bundle.report)
        assert all(check["passed"] for check in report["checks"].values()) and set(report["checks"]) == {
            "fp32",
            "fp16",
            "int8",
        }
        assert read_json(bundle.config)["batch"]["max"] == most
    tokens = np.load(root / "text/evaluation_tokens.npy")
    model = sentencepiece.SentencePieceProcessor(model_file=str(converted / "spiece.model"))
    prompts = [text for name in CLASSES for text in (f"a photo of a {name}", name)]
    assert tokens.tolist() == [(model.encode(text)[: LENGTH - 1] + [1] * LENGTH)[:LENGTH] for text in prompts]
    assert np.load(root / "text/calibration_tokens.npy").shape == (
        8,
        LENGTH,
    )  # of the prompts, as nothing else is given


def test_similarities_are_those_of_a_float64_pass_over_jaxs_embeddings(converted):
    """The formula with scale, bias and sigmoid, on what JAX and each graph give by themselves."""
    import onnxruntime

    root = converted / "out/pair"
    report, stored = read_json(root / "report.json"), np.load(converted / "mu.npz")
    scale, bias = np.exp(np.float64(stored["t"][0])), np.float64(stored["b"][0])

    def matrix(image, text):
        image, text = (
            x.astype(np.float64) / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True) for x in (image, text)
        )
        classes = text.reshape(len(CLASSES), 2, -1).mean(1)
        cosine = image @ (classes / np.linalg.norm(classes, axis=1, keepdims=True)).T
        return cosine, 1 / (1 + np.exp(-(scale * cosine + bias)))

    jax = matrix(*(np.load(root / tower / "evaluation_embeddings.npy") for tower in ("image", "text")))
    pixels = np.load(root / "image/evaluation_images.npy").astype(np.float32) / np.float32(127.5) - 1
    feeds = {"image": {"images": pixels}, "text": {"tokens": np.load(root / "text/evaluation_tokens.npy")}}
    for precision, name in (("fp32", "model.onnx"), ("fp16", "model.fp16.onnx")):
        graphs = [
            onnxruntime.InferenceSession(root / tower / name).run(None, given)[0] for tower, given in feeds.items()
        ]
        found, row = matrix(*graphs), report["checks"][precision]
        # The same graphs in batches of another size: fp32 sums differ by rounding.
        assert row["max_cosine_error"] == pytest.approx(np.abs(found[0] - jax[0]).max(), rel=0.3, abs=2e-6)
        steepest = scale / 4  # of the sigmoid, by which it makes an error of the cosine larger
        expected = np.abs(found[1] - jax[1]).max()
        assert row["max_probability_error"] == pytest.approx(expected, rel=0.3, abs=2e-6 * steepest)
        assert row["passed"] and row["images"] == IMAGES and row["texts"] == len(CLASSES)
    labels = np.load(root / "image/evaluation_labels.npy")
    assert report["zero_shot"]["jax"] == pytest.approx(100 * np.mean(jax[0].argmax(1) == labels))
    assert set(report["zero_shot"]) == {"classes", "templates", "num_images", "jax"}
    assert report["accuracy"] == {
        "jax": report["zero_shot"]["jax"],
        **{precision: row["zero_shot"] for precision, row in report["checks"].items()},
    }
    assert list(report["checks"]) == ["fp32", "fp16", "int8"] and PairReport.problems(report) == []
    assert report["checkpoint"]["num_params"] == sum(stored[name].size for name in stored.files if name not in "tb")


def test_again_nothing_is_done_and_one_tower_alone_where_its_key_changed(copied):
    root = copied / "out/pair"
    graphs = {name: path.stat().st_ino for name in ("image", "text") for path in [root / name / "model.onnx"]}
    before = Manifest.read(Bundle(root)).rows
    assert convert(copied) == 0
    after = Manifest.read(Bundle(root)).rows
    assert {name: row.status for name, row in after.items()} == {"pair": "fresh", "similarity": "fresh"}
    assert after["similarity"].result == before["similarity"].result
    with contextlib.chdir(copied):  # a batch asks this before it starts anything
        config = parse_config(["vit_convert", "--config=pair.py"])[0]
        assert fresh_report(config, "out")["name"] == "pair"
        config.text.check.cosine = 0.9
        assert fresh_report(config, "out") is None
    assert convert(copied, "--config.text.precision=fp16") == 0
    assert {name: (root / name / "model.onnx").stat().st_ino for name in graphs} == graphs  # neither was exported again
    assert not (root / "text/model.int8.onnx").exists() and (root / "image/model.int8.onnx").exists()
    checks = read_json(root / "report.json")["checks"]
    assert (checks["int8"]["image"], checks["int8"]["text"]) == ("int8", "fp16")


@pytest.mark.slow
def test_a_killed_conversion_is_no_pair_until_it_is_run_again(copied):
    """Killed in the text tower's export after the image tower was made anew: nothing is said of both any more."""
    import vit_convert

    root = copied / "out/pair"
    code = (
        "import os, signal, sys\nimport vit_convert.stages.export as stage\n"
        "import vit_convert.export.exporter as exporter\nreal = exporter.export_model\n"
        "def killed(model, path, **options):\n    if 'text' in str(path): os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return real(model, path, **options)\nexporter.export_model = killed\n"
        "from vit_convert.__main__ import main\nsys.exit(main(sys.argv))"
    )
    words = ["--config=pair.py", "--quiet", "--config.normalize=False", "--config.precision=fp32"]
    ended = subprocess.run([sys.executable, "-c", code, *words], cwd=copied, check=False, capture_output=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
    with pytest.raises(UsageError, match="stage pair is not done"):
        vit_convert.Session(root)
    assert not (root / "report.json").exists()
    assert convert(copied, *words[2:]) == 0
    with vit_convert.Session(root) as session:
        assert session.text(np.ones((2, LENGTH), np.int32)).shape[0] == 2


def test_two_at_once(copied, capsys):
    with hold(Bundle(copied / "out/pair"), "somebody"):
        assert convert(copied) == UsageError.exit_code
    assert "another conversion works on this bundle" in capsys.readouterr().err


@pytest.mark.slow
def test_what_a_pair_left_is_removed_by_a_single_model_of_that_name_and_the_reverse(copied):
    root = copied / "out/pair"
    (root / "mine.txt").write_text("kept")
    for_one = CONFIG.replace('"classes.txt", ("a photo of a {}", "{}")', '"", ()').replace('"spiece.model"', '""')
    (copied / "pair.py").write_text("\n".join(line for line in for_one.splitlines() if "config.text." not in line))
    assert convert(copied, "--config.checkpoint=mu.npz:img", "--config.precision=fp32") == 0
    assert not {"pair.json", "image", "text"} & {path.name for path in root.iterdir()}
    assert (root / "model.onnx").exists() and (root / "mine.txt").exists()
    (copied / "pair.py").write_text(CONFIG)
    assert convert(copied, "--config.precision=fp32", "--until=check") == 0
    assert not (root / "model.onnx").exists() and (root / "pair.json").exists() and (root / "mine.txt").exists()


def test_similarities_that_miss_are_said_in_the_report_and_by_the_exit_code(copied, capsys):
    assert (
        convert(copied, "--config.check.int8_similarity=1e-6", "--config.check.fp16_similarity=1e-7")
        == CheckError.exit_code
    )
    said = capsys.readouterr().err
    assert re.search(
        r"fp16: the cosine of an image and a text is off by .*; int8: the cosine of an image and a text", said
    )
    report = read_json(copied / "out/pair/report.json")
    assert (
        report["status"] == "failed" and report["checks"]["fp32"]["passed"] and not report["checks"]["fp16"]["passed"]
    )


@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        (("tokenizer", ""), 2, r"config\.tokenizer is empty, and 20 prompts are given"),
        (("evaluation.prompts", "three.txt"), 6, "label 9, evaluation.prompts lists 3 classes"),
        (("evaluation.prompts", "none.txt"), 6, "none.txt: No such file"),
        (("tokenizer", "gone.model"), 6, r"config\.tokenizer of the text tower: gone\.model: No such file"),
        (("text.checkpoint", "mu.npz:img"), 2, r"config\.text\.checkpoint=mu\.npz:img: the text tower's file belongs"),
        (("evaluation.templates", ("no place",)), 2, "template 'no place'"),
        (("text.evaluation.num_images", 3), 2, r"config\.evaluation\.num_images=3 of the text tower beside"),
        (("text.engine.calibrator", True), 2, "TensorRT's own calibrator takes images"),
        (("image.outputs", "tokens,grid"), 2, r"outputs='tokens,grid' of the image tower: a pair is compared by"),
        (("text.batch.max", 0), 2, r"config\.text: config\.batch\.max=0"),
        (("checkpoint", "mu.npz:img"), 2, r"config\.text\.batch\.max: mu\.npz:img is not a pair"),
    ],
)
def test_mistakes(copied, capsys, change, code, said):
    (copied / "three.txt").write_text("a\nb\nc\n")
    key, value = change
    (copied / "pair.py").write_text(
        CONFIG.replace("    return config", f"    config.{key} = {value!r}\n    return config")
    )
    assert convert(copied) == code
    assert re.search(said, capsys.readouterr().err)


@pytest.mark.slow
def test_engines_of_both_towers_are_built(copied):
    pytest.importorskip("tensorrt_rtx")
    from vit_convert.engine import __main__ as command

    root = copied / "out/pair"
    assert command.main(["engine", "build", str(root), "--backend=rtx", "--precision=fp16,int8", "--quiet"]) == 0
    for tower in ("image", "text"):
        built = {row["precision"]: row for row in read_json(root / tower / "report.json")["engines"]}
        assert set(built) == {"fp16", "int8"} and all((root / tower / row["path"]).is_file() for row in built.values())


@pytest.mark.slow
def test_a_text_tower_alone_is_calibrated_and_checked_on_prompts(copied):
    np.save(copied / "ids.npy", np.random.default_rng(1).integers(2, 90, (20, LENGTH)))
    (copied / "pair.py").write_text(
        "from vit_convert import default_config\n\n\ndef get_config():\n    config = default_config()\n"
        "    config.checkpoint, config.engine.backend, config.precision = 'mu.npz:txt', 'none', 'int8'\n"
        "    config.calibration.data, config.check.num_images = 'ids.npy', 5\n    return config\n"
    )
    assert convert(copied, "--config.name=alone") == 0
    bundle, ids = Bundle(copied / "out/alone"), np.load(copied / "ids.npy")
    assert np.load(bundle.tokens("calibration")).tolist() == ids.tolist()
    with np.load(bundle.reference) as reference:
        assert reference["tokens"].tolist() == ids[[2, 6, 10, 14, 18]].tolist()  # the middle of each fifth
    report = json.loads(bundle.report.read_text())
    assert report["calibration"]["source"] == "ids.npy" and report["reference"]["source"] == "evaluation prompts"


@pytest.mark.parametrize(("variant", "rule"), [("SigLIP-mu/16", (-1, 1, 1)), ("CLIP-mu/16", (94, 95, 0))])
def test_what_a_family_says_of_its_texts_is_what_prompts_are_made_by(tmp_path, variant, rule):
    path = tmp_path / ("mu.npz" if "SigLIP" in variant else "mu.safetensors")
    write_random_checkpoint(path, variant, image_size=(SIDE, SIDE))
    found = Prompting.of(load_checkpoint(f"{path}:txt").pair)
    assert (found.start, found.end, found.pad) == rule and found.lower and found.sticky_end


@pytest.mark.slow
def test_without_evaluation_data_a_pair_is_judged_by_what_the_checks_of_its_towers_computed(tmp_path, monkeypatch):
    """And by the same when the pair alone is judged again, from the files."""
    opened, real = [], onnx_file.open_session

    def note(path, *arguments, **options):
        opened.append(path.name)
        return real(path, *arguments, **options)

    importlib.import_module("vit_convert.checks.onnx_graph")  # keeps the real one: noted are the pair's own alone
    monkeypatch.setattr(onnx_file, "open_session", note)
    write_random_checkpoint(tmp_path / "mu.npz", "SigLIP-mu/16", image_size=(SIDE, SIDE), length=LENGTH)
    config = CONFIG[: CONFIG.index("    config.calibration")] + "    return config\n"
    (tmp_path / "pair.py").write_text(config.replace('"int8"', '"fp16"'))
    assert convert(tmp_path) == 0 and opened == []
    pair = Bundle(tmp_path / "out/pair")
    first = similarity(pair)
    assert first.source == "seeded noise" and [*first.checks] == ["fp32", "fp16"]
    pair.manifest.unlink()
    assert convert(tmp_path) == 0 and opened == ["model.onnx"] * 2 + ["model.fp16.onnx"] * 2
    again = similarity(pair)
    for name, row in first.checks.items():
        # the same numbers but for the order of sums, of which a batch of another size may have another
        assert row.max_cosine_error == pytest.approx(again.checks[name].max_cosine_error, abs=1e-6)
        assert (row.image, row.text, row.images, row.texts) == (name, name, 4, 4) and row.passed


def similarity(bundle: Bundle) -> SimilarityResult:
    """What the pair's stage found."""
    return SimilarityResult.from_dict(Manifest.read(bundle).result("similarity"))
