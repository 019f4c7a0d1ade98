"""What a text tower is checked and calibrated on: files of ids, prompts of classes, or seeded tokens."""

import json

import numpy as np
import pytest
from PIL import Image
from stage_context import change, make_context, pixels

from vit_convert.core.errors import CalibrationError, UsageError
from vit_convert.core.signature import Output, Signature, Tensor
from vit_convert.stages import calibration_samples as samples_module
from vit_convert.stages import text as module
from vit_convert.stages.calibration_samples import calibration_samples
from vit_convert.stages.images import IMAGES, decode_images

PAIR = {
    "tokenizer": "sentencepiece", "length": 4, "vocabulary": 9, "start": -1, "end": 1, "pad": 0, "lower": True,
    "sticky_end": True, "logit_scale": 1.0,
}  # fmt: skip


@pytest.fixture
def context(tmp_path):
    found = make_context(tmp_path / "b")
    rule = {key: value for key, value in PAIR.items() if key != "logit_scale"}
    change(found, "checkpoint", text=True, pair=rule, image_size=[], judge="embedding", output="embedding")
    texts = Tensor("tokens", "int32", ("batch", 4), below=9, end=1, pad=0)
    signature = Signature((texts,), (Output("embedding", "float32", ("batch", 3), judge="embedding"),))
    found.bundle.signature.write_text(json.dumps(signature.to_dict()))
    return found


@pytest.fixture
def ids(tmp_path):
    """A file of ten prompts' ids, and what it holds."""
    values = np.random.default_rng(0).integers(2, 9, (10, 4)).astype(np.int32)
    values[:, 3] = 1
    np.save(tmp_path / "ids.npy", values)
    return str(tmp_path / "ids.npy"), values


def test_where_prompts_are_looked_for(context):
    evaluation, calibration = context.config.evaluation, context.config.calibration
    assert (module.evaluation_source(context), module.calibration_source(context)) == ("", "")
    calibration.data = "c.txt"
    assert (module.evaluation_source(context), module.calibration_source(context)) == ("c.txt", "c.txt")
    evaluation.data = "e.txt"
    assert (module.evaluation_source(context), module.calibration_source(context)) == ("e.txt", "c.txt")
    evaluation.prompts = "p.txt"
    assert (module.evaluation_source(context), module.calibration_source(context)) == ("p.txt", "c.txt")
    calibration.data = ""
    assert module.calibration_source(context) == "p.txt"


def test_samples_of_towers(context, tmp_path):
    assert module.samples_file(context, "evaluation") == context.bundle.tokens("evaluation")
    change(context, "checkpoint", text=False)
    assert module.samples_file(context, "calibration") == context.bundle.images("calibration")


def test_what_tells_prompts_apart(context, tmp_path):
    config, files = context.config, {name: tmp_path / name for name in ("p.txt", "t.txt", "spiece.model")}
    for path in files.values():
        path.write_text("a")
    config.tokenizer, config.evaluation.templates = str(files["spiece.model"]), (str(files["t.txt"]), "a photo of {}")
    source = str(files["p.txt"])
    found = [module.identity(context, source)]
    for path in files.values():  # the content of each file counts
        path.write_text("b")
        found.append(module.identity(context, source))
    config.evaluation.templates = (str(files["t.txt"]), "a drawing of {}")
    found.append(module.identity(context, source))
    config.evaluation.prompts = source  # its lines are classes then
    found.append(module.identity(context, source))
    assert len({json.dumps(row) for row in found}) == len(found)
    assert found[-1] == module.identity(context, source)
    assert IMAGES.inputs(context) == [found[-1], 0] and IMAGES.outputs(context) == [context.bundle.tokens("evaluation")]


@pytest.mark.parametrize("key", ["tokenizer", "evaluation.prompts", "evaluation.data", "calibration.data"])
def test_a_file_that_is_not_there_is_missed_before_it_is_needed(context, key):
    context.config.update_from_flattened_dict({key: "gone.file"})
    with pytest.raises(CalibrationError, match=rf"^config\.{key} of the text tower: gone\.file: No such file$"):
        module.require_files(context.config)
    with pytest.raises(CalibrationError, match=r"gone\.file: No such file"):
        decode_images(context)


def test_no_prompts(context):
    found = decode_images(context)
    assert (found.num_images, found.summary) == (0, "no prompts") and not context.bundle.tokens("evaluation").exists()


def test_prompts_of_a_file(context, ids):
    path, values = ids
    context.config.evaluation.data = path
    assert decode_images(context).summary == "10 prompts"
    np.testing.assert_array_equal(np.load(context.bundle.tokens("evaluation")), values)
    context.config.evaluation.num_images = 4
    assert decode_images(context).num_images == 4
    # from the middle of each share of 2.5: the 1st, 3rd, 6th and 8th from 0
    np.testing.assert_array_equal(np.load(context.bundle.tokens("evaluation")), values[[1, 3, 6, 8]])


@pytest.fixture
def classes(context, tmp_path, monkeypatch):
    """Three classes in two templates, and what is made into tokens; a tokenizer that counts letters."""
    asked = []

    def tokens_of(prompts, prompting, tokenizer):
        asked.extend(prompts)
        return np.array([[len(prompt), prompting.length, 1, 0] for prompt in prompts], np.int32)

    monkeypatch.setattr("vit_convert.text.tokens.tokens_of", tokens_of)
    (tmp_path / "classes.txt").write_text("cat\nsnake\nox\n")
    context.config.evaluation.prompts = str(tmp_path / "classes.txt")
    context.config.evaluation.templates = ("a {}", "the {}!")
    return asked


def test_prompts_of_classes(context, classes):
    found = decode_images(context)
    assert classes == ["a cat", "the cat!", "a snake", "the snake!", "a ox", "the ox!"]
    assert (found.num_images, found.classes, found.templates) == (6, 3, 2)
    assert found.summary == "6 prompts: 3 classes, 2 templates"
    assert np.load(context.bundle.tokens("evaluation"))[:, 0].tolist() == [5, 8, 7, 10, 4, 7]
    context.config.evaluation.templates = ("a {}",)
    assert decode_images(context).summary == "3 prompts: 3 classes, 1 template"


@pytest.mark.parametrize(("key", "value"), [("num_images", 4), ("data", "x.txt")])
def test_some_of_the_classes_cannot_be_asked_for(context, classes, key, value):
    context.config.evaluation[key] = value
    with pytest.raises(UsageError, match=rf"config\.evaluation\.{key}={value!r} of the text tower") as caught:
        decode_images(context)
    assert f"config.text.evaluation.{key}" in caught.value.fix


def test_calibration_on_a_file_of_its_own(context, ids):
    path, values = ids
    context.config.calibration.data, context.config.calibration.num_images = path, 2
    found, source = calibration_samples(context)
    assert source == path
    np.testing.assert_array_equal(found, values[[2, 7]])
    np.testing.assert_array_equal(np.load(context.bundle.tokens("calibration")), found)


def test_calibration_on_the_prompts_of_classes(context, classes):
    decode_images(context)
    context.config.calibration.num_images = 3
    found, source = calibration_samples(context)
    assert source == context.config.evaluation.prompts
    np.testing.assert_array_equal(found, np.load(context.bundle.tokens("evaluation"))[[1, 3, 5]])
    np.testing.assert_array_equal(np.load(context.bundle.tokens("calibration")), found)


@pytest.mark.parametrize(("asked", "count"), [(512, 32), (5, 5)])
def test_without_prompts_on_seeded_tokens_with_a_warning(context, asked, count):
    context.config.calibration.num_images = asked
    found, source = calibration_samples(context)
    assert source == "seeded noise" and found.shape == (count, 4) and found.min() >= 0 and found.max() < 9
    np.testing.assert_array_equal(np.load(context.bundle.tokens("calibration")), found)
    np.testing.assert_array_equal(calibration_samples(context)[0], found)
    assert "ranges come from seeded tokens" in context.bundle.events.read_text()


def test_tensorrts_own_calibrator_takes_images(context):
    context.config.engine.calibrator = True
    with pytest.raises(UsageError, match=r"config\.engine\.calibrator: .* a text tower takes tokens"):
        calibration_samples(context)


def test_tensorrts_own_calibrator_takes_images_of_one_size(tmp_path):
    context = make_context(tmp_path / "b", checkpoint={"patches": 9})
    context.config.engine.calibrator = True
    with pytest.raises(UsageError, match=r"config\.engine\.calibrator: .* this tower takes patches") as caught:
        calibration_samples(context)
    assert caught.value.fix == "Leave engine.calibrator off: INT8 is then written into the graph."


def test_labels_beside_calibration_images_are_not_read(tmp_path):
    """Not even a table that names none of them."""
    context = make_context(tmp_path / "b")
    for number, image in enumerate(pixels(2)):
        (tmp_path / "a").mkdir(exist_ok=True)
        Image.fromarray(image).save(tmp_path / "a" / f"{number}.png")
    (tmp_path / "a" / "labels.csv").write_text("other.png,1\n")
    context.config.calibration.data = str(tmp_path / "a")
    found, _ = calibration_samples(context)
    np.testing.assert_array_equal(found, pixels(2))


def test_images_of_a_file_or_noise(tmp_path):
    """Of a model of images."""
    context = make_context(tmp_path / "b")
    context.config.calibration.num_images = 3
    found, source = calibration_samples(context)
    assert source == "seeded noise" and found.shape == (3, 4, 4, 3) and found.dtype == np.uint8
    assert "ranges come from noise" in context.bundle.events.read_text()
    np.testing.assert_array_equal(np.load(context.bundle.images("calibration")), found)
    np.savez(tmp_path / "a.npz", images=pixels(6))
    context.config.calibration.data = str(tmp_path / "a.npz")
    found, source = calibration_samples(context)
    assert source == str(tmp_path / "a.npz")
    np.testing.assert_array_equal(found, pixels(6)[[1, 3, 5]])
    assert samples_module._NOISE_IMAGES == 32
