"""What the images stage decodes, and where labels mean nothing."""

import numpy as np
import pytest
from stage_context import change, make_context, pixels

from vit_convert.core.errors import UsageError
from vit_convert.images.sources import open_images
from vit_convert.stages.images import IMAGES, decode_images


@pytest.fixture
def context(tmp_path):
    return make_context(tmp_path / "b")


@pytest.fixture
def data(context, tmp_path):
    """Twelve images with these labels, which the config names."""

    def data(labels):
        np.savez(tmp_path / "a.npz", images=pixels(12), **({} if labels is None else {"labels": np.asarray(labels)}))
        context.config.evaluation.data = str(tmp_path / "a.npz")
        return str(tmp_path / "a.npz")

    return data


LABELS = [3, 1, 4, 1, 2, 3, 1, 2, 4, 4, 2, 3]


def told(context):
    events = context.bundle.events
    return events.read_text() if events.exists() else ""


def test_without_data_there_is_nothing_to_do(context):
    found = decode_images(context)
    assert (found.num_images, found.labelled, found.label_range, found.summary) == (
        0,
        False,
        None,
        "no evaluation data",
    )
    assert IMAGES.inputs(context) == ["noise", 0] and IMAGES.outputs(context) == []


def test_labelled_images(context, data):
    path = data(LABELS)
    change(context, "checkpoint", judge="top1")
    context.config.evaluation.num_images = 5
    found = decode_images(context)
    assert (found.num_images, found.labelled, found.summary) == (5, True, "5 evaluation images")
    assert found.label_range == (1, 4) and found.class_folders == ()  # also of those that are not taken
    images, labels = (np.load(file) for file in IMAGES.outputs(context))
    assert images.shape == (5, 4, 4, 3) and labels.shape == (5,) and "no top-1" not in told(context)
    assert IMAGES.inputs(context) == [[path, open_images(path, labelled=True).fingerprint], 5]


@pytest.mark.parametrize(
    ("checkpoint", "why"),
    [({"judge": "cosine", "output": "features"}, "the output is features"),
     ({"judge": "top1", "zero_head": True}, "the head is all zeros")],
)  # fmt: skip
def test_labels_of_a_model_without_classes_are_left_out(context, data, checkpoint, why):
    data(LABELS)
    change(context, "checkpoint", **checkpoint)
    found = decode_images(context)
    assert (found.num_images, found.labelled, found.label_range) == (12, False, None)
    assert f"evaluation.data has labels, and {why}: no top-1 is measured" in told(context)


def test_a_pairs_images_keep_their_labels_and_are_not_judged_by_themselves(context, data):
    """The pair compares them with the names of classes."""
    data(LABELS)
    change(context, "checkpoint", judge="embedding", output="embedding")
    found = decode_images(context)
    assert (found.labelled, found.label_range) == (False, (1, 4)) and "no top-1" not in told(context)
    assert np.load(context.bundle.labels("evaluation")).tolist() == LABELS


def test_images_without_labels(context, data):
    data(None)
    change(context, "checkpoint", judge="top1")
    found = decode_images(context)
    assert (found.num_images, found.labelled, found.label_range, found.class_folders) == (12, False, None, None)


def test_prompts_of_a_model_of_images_alone(context):
    change(context, "checkpoint", path="a.npz")
    context.config.evaluation.prompts = "classes.txt"
    with pytest.raises(UsageError, match=r"config\.evaluation\.prompts=classes\.txt: a\.npz is not a pair of towers"):
        decode_images(context)
