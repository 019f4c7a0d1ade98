"""Each tower of a pair has its own batches, precision, keeps and calibration over the common keys."""

import pytest

from vit_convert.config import default_config
from vit_convert.core.config import of_tower
from vit_convert.core.errors import UsageError
from vit_convert.core.tower_config import tower_keys


@pytest.fixture
def config():
    found = default_config()
    found.checkpoint, found.precision, found.batch.max, found.calibration.data = "a.npz", "fp16", 32, "images/"
    found.evaluation.data, found.evaluation.prompts, found.tokenizer = "labelled/", "classes.txt", "spiece.model"
    found.image_size = (64, 64)
    return found


def test_what_is_said_for_one_tower_lies_over_what_is_said_for_both(config):
    config.image.batch.max, config.image.keep_fp16, config.image.calibration.method = 128, ("block_11",), "mse"
    config.text.precision, config.text.keep_fp32, config.text.calibration.data = "fp16,int8", ("head",), "prompts.txt"
    config.text.calibration.max_error = 1 / 4  # exact in float
    image, text = (of_tower(config, tower) for tower in ("image", "text"))
    assert (image.batch.max, image.precision, image.keep_fp16, image.keep_fp32) == (128, "fp16", ("block_11",), ())
    assert (text.batch.max, text.precision, text.keep_fp16, text.keep_fp32) == (32, "fp16,int8", (), ("head",))
    assert (image.calibration.method, text.calibration.method) == ("mse", "entropy")
    assert (image.calibration.data, text.calibration.data) == ("images/", "prompts.txt")
    assert (image.calibration.max_error, text.calibration.max_error) == (default_config().calibration.max_error, 0.25)


def test_images_are_no_prompts_and_prompts_no_images(config):
    image, text = (of_tower(config, tower) for tower in ("image", "text"))
    assert (image.checkpoint, text.checkpoint, image.name, text.name) == ("a.npz:img", "a.npz:txt", "image", "text")
    assert (image.calibration.data, image.evaluation.data, image.image_size) == ("images/", "labelled/", (64, 64))
    assert (text.calibration.data, text.evaluation.data, text.image_size) == ("", "", None)
    assert (image.evaluation.prompts, image.tokenizer) == ("", "")
    assert (text.evaluation.prompts, text.tokenizer) == ("classes.txt", "spiece.model")


def test_a_tower_may_lie_in_a_file_of_its_own(config):
    config.text.checkpoint = "https://host/b.npz#sha256=00"
    assert of_tower(config, "image").checkpoint == "a.npz:img"
    assert of_tower(config, "text").checkpoint == "https://host/b.npz:txt#sha256=00"


@pytest.mark.parametrize(
    ("image", "text"),
    [("a.npz:img", "b.npz:txt"), ("a.npz:image", "b.npz:text"), ("gs://x/a.npz:img#sha256=00", "gs://x/b.npz:txt")],
)
def test_a_path_that_names_its_tower_already_stays_as_it_is(config, image, text):
    config.checkpoint, config.text.checkpoint = image, text
    assert [of_tower(config, tower).checkpoint for tower in ("image", "text")] == [image, text]


@pytest.mark.parametrize(("tower", "key"), [("image", "checkpoint"), ("text", "text.checkpoint")])
def test_a_path_that_names_the_other_tower_is_refused(config, tower, key):
    config.checkpoint, config.text.checkpoint = "a.npz:txt", "b.npz:img"
    with pytest.raises(UsageError, match=rf"config\.{key}=.*the {tower} tower's file belongs there"):
        of_tower(config, tower)


@pytest.mark.parametrize(
    ("tower", "key", "value", "said"),
    [
        ("text", "batch.max", 0, r"config\.text: config\.batch\.max=0"),
        ("image", "precision", "fp12", r"config\.image: config\.precision='fp12'"),
        ("text", "calibration.method", "best", r"config\.text: config\.calibration\.method='best'"),
    ],
)
def test_what_is_wrong_is_named_with_its_tower(config, tower, key, value, said):
    group = config[tower]
    *groups, last = key.split(".")
    for name in groups:
        group = group[name]
    group[last] = value
    with pytest.raises(UsageError, match=said):
        of_tower(config, tower)
    other = "image" if tower == "text" else "text"
    assert of_tower(config, other).batch.max == 32


def test_a_tower_is_known_by_its_name(config):
    """As a word out of a file or a flag is: none of Python's own copies."""
    image, text = (tower_keys(config, "".join(tower)) for tower in (["i", "mage"], ["te", "xt"]))
    assert "image_size" in image and "image_size" not in text and "checkpoint" in text and "checkpoint" not in image
    assert "prompts" in text.evaluation and "prompts" not in image.evaluation
    assert of_tower(config, "".join(["te", "xt"])).checkpoint == "a.npz:txt"


def test_a_value_of_another_type_is_named_with_its_tower(config):
    config.image.posemb_grid = 7  # pairs of numbers; a tower's own is not of any type until it is taken
    with pytest.raises(UsageError, match=r"^config\.image: config\.posemb_grid=7: "):
        of_tower(config, "image")
    config.image.posemb_grid = (2, 3)
    assert of_tower(config, "image").posemb_grid == (2, 3)


@pytest.mark.parametrize(("tower", "key"), [("text", "image_size"), ("text", "layout"), ("image", "checkpoint")])
def test_keys_that_a_tower_has_not(config, tower, key):
    with pytest.raises(AttributeError, match=key):
        setattr(config[tower], key, "x")
