"""What the reference stage writes by which all else is judged, and the labels that it refuses; the model is a mean and
a product."""

import numpy as np
import pytest
from signatures import image_input
from stage_context import CLASSES, SIDE, change, forward, make_context, normalized, pixels

from vit_convert.core.errors import CalibrationError, CheckError
from vit_convert.core.signature import Output, Signature
from vit_convert.images.decode import pick
from vit_convert.images.noise import seeded_noise
from vit_convert.images.resize import resize
from vit_convert.stages.reference import REFERENCE, compute_reference, reference_files

RANGE = {"smallest": [2, 2], "optimal": [4, 4], "largest": [8, 8]}


class Model:
    """Notes its batches; of an image of one colour its logits are not finite, if it is told so."""

    signature = Signature(image_input((SIDE, SIDE)), (Output("logits", "float32", ("batch", CLASSES), judge="top1"),))
    taps = ("block_00",)

    def __init__(self, classes=CLASSES, flat=None):
        self.classes, self.flat, self.batches = classes, flat, []

    def run(self, values):
        self.batches.append(len(values))
        found = {name: value[..., : self.classes] for name, value in forward(values).items()}
        if self.flat is not None:
            found["logits"][np.ptp(values, axis=(1, 2)).max(1) == 0, 1] = self.flat
        return found


@pytest.fixture
def context(tmp_path):
    found = make_context(tmp_path / "b")
    found.scratch["model"] = Model()
    return found


def give_images(context, count=40, labels=None, folders=None):
    images = pixels(count, seed=3)
    np.save(context.bundle.images("evaluation"), images)
    change(context, "images", num_images=count, labelled=labels is not None)
    if labels is not None:
        np.save(context.bundle.labels("evaluation"), labels)
        change(context, "images", label_range=[int(min(labels)), int(max(labels))], class_folders=folders or [])
    return images


def load(path):
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


def holds(context, path, raw):
    """Whether a file holds these images as the graph takes them, and what the model gives for them."""
    found, wanted = load(path), {"images": normalized(raw), **forward(normalized(raw))}
    assert list(found) == [*wanted]
    # Values up to 4, products of three: some 1e-6 in float32.
    return all(
        found[name].shape == value.shape and np.abs(found[name] - value).max() < 1e-5 for name, value in wanted.items()
    )


def test_without_images_noise_of_the_models_size(context):
    change(context, "checkpoint", image_size=[6, 4])
    context.config.check.num_images = 3
    result = compute_reference(context)
    assert holds(context, context.bundle.reference, seeded_noise(3, 6, 4))
    assert result.to_dict() == {
        "source": "seeded noise",
        "num_images": 3,
        "tensors": ["block_00", "logits"],
        "summary": "3 images, seeded noise",
    }
    assert not context.bundle.predictions.exists()


def test_a_few_of_the_evaluation_images(context):
    images = give_images(context)
    context.config.check.num_images = 4
    result = compute_reference(context)
    assert holds(context, context.bundle.reference, images[pick(40, 4)])
    assert (result.source, result.num_images, result.summary) == (
        "evaluation images",
        4,
        "4 images, evaluation images",
    )
    assert result.top1 is None


@pytest.mark.parametrize(("layout", "kind"), [("NCHW", "float32"), ("NHWC", "uint8"), ("NCHW", "uint8")])
def test_images_are_kept_as_the_graph_takes_them(context, layout, kind):
    context.config.layout, context.config.input = layout, kind
    images = give_images(context)[pick(40, 4)]
    compute_reference(context)
    found = load(context.bundle.reference)
    kept = np.moveaxis(found["images"], 1, 3) if layout == "NCHW" else found["images"]
    assert kept.dtype == kind and np.abs(kept - (images if kind == "uint8" else normalized(images))).max() < 1e-6
    assert np.abs(found["logits"] - forward(normalized(images))["logits"]).max() < 1e-5


def test_a_range_has_a_file_for_each_of_three_sizes(context):
    images = give_images(context)[pick(40, 4)]
    change(context, "checkpoint", image_range=RANGE)
    result = compute_reference(context)
    root = context.bundle.root
    files = {(4, 4): root / "reference.npz", (2, 2): root / "reference.2x2.npz", (8, 4): root / "reference.8x4.npz"}
    assert reference_files(context) == files
    for size, path in files.items():
        assert holds(context, path, images if size == (4, 4) else np.stack([resize(image, *size) for image in images]))
    assert result.summary == "4 images, evaluation images, at 4x4, 2x2, 8x4"
    change(context, "images", labelled=True)
    assert REFERENCE.outputs(context) == [*files.values(), root / "evaluation_logits.npy"]


def test_top1_of_all_labelled_images_in_batches(context):
    right = forward(normalized(pixels(70, seed=3)))["logits"].argmax(1)
    labels = right.copy()
    labels[60:] = (labels[60:] + 1) % CLASSES
    images = give_images(context, 70, labels)
    result = compute_reference(context)
    assert (
        result.top1 == pytest.approx(100 * 60 / 70) and result.summary == "4 images, evaluation images, top-1 85.71 %"
    )
    assert context.scratch["model"].batches == [4, 32, 32, 6]
    predictions = np.load(context.bundle.predictions)
    assert (
        predictions.shape == (70, CLASSES) and np.abs(predictions - forward(normalized(images))["logits"]).max() < 1e-5
    )


def refusal(context, error):
    with pytest.raises(error) as caught:
        compute_reference(context)
    return str(caught.value), caught.value


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(("labels", "named"), [((0, 5), 5), ((-1, 4), -1), ((-3, 9), -3), ((4, 1000), 1000)])
def test_labels_that_the_head_has_not(context, known, labels, named):
    """By what the checkpoint says before anything runs, else by the first output."""
    give_images(context, 2, np.array(labels))
    context.config.evaluation.data = "val"
    if not known:
        change(context, "checkpoint", num_classes=None)
    message, error = refusal(context, CalibrationError)
    assert message == f"evaluation.data=val: label {named}, the head has classes 0 to 4" and error.exit_code == 6
    assert error.fix == "Labels count from 0, in the order of the head."
    assert (context.scratch["model"].batches == []) == known and not context.bundle.predictions.exists()


def test_ilsvrcs_own_numbering_is_named(context):
    give_images(context, 2, np.array([1, 1000]))
    change(context, "checkpoint", num_classes=1000)
    assert "A label of 1000 is ILSVRC's own numbering." in refusal(context, CalibrationError)[1].fix


@pytest.mark.parametrize(
    ("count", "shown"), [(2, "(c0, c1)"), (8, "(c0, c1, c2, c3, c4, c5, c6, c7)"), (9, "c6, c7, …)")]
)
def test_class_folders_that_are_not_the_heads(context, count, shown):
    give_images(context, 5, np.arange(5) % 2, [f"c{i}" for i in range(count)])
    context.config.evaluation.data = "val"
    message, error = refusal(context, CalibrationError)
    assert message.startswith(f"evaluation.data=val: {count} class folders (c0, c1") and shown in message
    assert "the head has 5 classes" in message and "classes.txt" in error.fix


def test_labels_that_are_the_heads(context):
    give_images(context, 5, np.arange(5), [*"abcde"])
    assert compute_reference(context).top1 is not None
    give_images(context, 5, np.array([0, 4, 0, 4, 0]))
    assert compute_reference(context).top1 is not None


def test_a_user_models_classes_are_told_by_its_output(context):
    give_images(context, 3, np.array([0, 1, 3]))
    change(context, "checkpoint", num_classes=None)
    context.scratch["model"] = Model(classes=3)
    assert "label 3, the head has classes 0 to 2" in refusal(context, CalibrationError)[0]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_output_that_is_not_finite_is_the_models_own(context, value):
    """The image's number is told to within its batch; of the few that are kept, the tensor."""
    images = give_images(context, 70, np.zeros(70, np.int64))
    images[40] = 77
    np.save(context.bundle.images("evaluation"), images)
    context.scratch["model"] = Model(flat=value)
    message, error = refusal(context, CheckError)
    assert (
        message == "logits: the JAX model itself gives NaN or infinity on evaluation images 32 to 63"
        and error.exit_code == 5
    )
    assert not context.bundle.predictions.exists()
    images[:] = 77
    np.save(context.bundle.images("evaluation"), images)
    assert refusal(context, CheckError)[0] == "logits: the JAX model itself gives NaN or infinity on evaluation images"


def test_what_the_stage_depends_on(context):
    assert REFERENCE.after == ("checkpoint", "images") and REFERENCE.inputs(context) == [4, "NHWC", "float32"]
    assert REFERENCE.outputs(context) == [context.bundle.reference]
