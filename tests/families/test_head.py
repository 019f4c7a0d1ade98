"""A classifier's head kept, left out, missed or found untrained; and options that mean nothing to a family."""

import pathlib

import numpy as np
import pytest

from vit_convert.checkpoint.containers import Leaf
from vit_convert.core.errors import CheckpointError, UsageError
from vit_convert.core.signature import Output, Tensor
from vit_convert.families.family import RandomOptions
from vit_convert.families.head import classifier_signature, settle_head
from vit_convert.families.options import refuse_options

FILE = pathlib.Path("x/f.npz")


def leaves(kernel):
    held = {"head/kernel": kernel, "head/bias": np.ones(3, np.float32), "header": np.ones(1, np.float32)}
    return {name: Leaf(name, value.shape, value.dtype, lambda value=value: value) for name, value in held.items()}


def test_a_head_is_kept():
    kernel = np.zeros((2, 3), np.float32)
    kernel[1, 2] = 1e-30
    held = leaves(kernel)
    head = settle_head(held, 3, "logits", FILE)
    assert (head.leaves, head.num_classes, head.is_zero, head.warnings) == (held, 3, False, ())


@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize("num_classes", [0, 3])
def test_a_head_that_is_not_wanted(value, num_classes):
    # as if read
    head = settle_head(leaves(np.full((2, 3), value, np.float32)), num_classes, "".join(["feat", "ures"]), FILE)
    assert (list(head.leaves), head.num_classes, head.is_zero, head.warnings) == (["header"], 0, False, ())


def test_a_head_of_zeros():
    held = leaves(np.zeros((2, 3), np.float32))
    head = settle_head(held, 3, "logits", FILE)
    assert (head.leaves, head.num_classes, head.is_zero) == (held, 3, True)
    (warning,) = head.warnings
    assert (
        warning.startswith("f.npz: head/kernel is all zeros, so every class gets the same logit")
        and "outputs='features'" in warning
    )


def test_a_head_that_is_not_there():
    with pytest.raises(CheckpointError) as error:
        settle_head({}, 0, "logits", FILE)
    assert (str(error.value), error.value.fix) == (
        "x/f.npz: no head/kernel, so there are no logits",
        "Set outputs='features'.",
    )


@pytest.mark.parametrize(
    ("asked", "outputs", "first", "classes"),
    [
        ("auto", (), "", 3),
        ("logits", (), "", 3),
        ("features", (), "", 0),
        ("tokens", ("tokens",), "tokens", 0),
        ("grid,tokens", ("tokens", "grid"), "tokens", 0),  # in the order of the outputs, not of the words
        ("logits,features", ("logits", "features"), "logits", 3),
        ("features,tokens", ("features", "tokens"), "features", 0),
    ],
)
def test_outputs_of_a_model_that_gives_more(asked, outputs, first, classes):
    head = settle_head(leaves(np.ones((2, 3), np.float32)), 3, asked, FILE, ("tokens", "grid"))
    assert (head.outputs, head.output, head.num_classes) == (outputs, first, classes)
    assert ("head/kernel" in head.leaves) == bool(classes)


def test_several_outputs_of_a_model_that_gives_one():
    with pytest.raises(UsageError) as error:
        settle_head(leaves(np.ones((2, 3), np.float32)), 3, "logits,features", FILE)
    assert (str(error.value), error.value.fix) == (
        "x/f.npz: outputs='logits,features': this model gives one output",
        "Use logits.",
    )


def test_what_a_classifier_says_of_its_patches():
    asked = ("logits", "tokens", "grid", "features")
    found = classifier_signature((4, 6), 5, 9, outputs=asked, patches=(2, 3, 8))
    assert {output.name: output.shape for output in found.outputs} == {
        "logits": ("batch", 5),
        "tokens": ("batch", 6, 8),
        "grid": ("batch", 2, 3, 8),
        "features": ("batch", 9),
    }
    assert tuple(output.name for output in found.outputs) == asked


@pytest.mark.parametrize("tokens", [(), (7,)])
def test_what_a_classifier_takes_and_gives(tokens):
    logits, features = (classifier_signature((4, 6), num_classes, 9, tokens) for num_classes in (5, 0))
    assert logits.inputs == features.inputs == (Tensor("images", "float32", ("batch", 4, 6, 3), "NHWC"),)
    assert logits.outputs == (Output("logits", "float32", ("batch", *tokens, 5), judge="top1"),)
    assert features.outputs == (Output("features", "float32", ("batch", *tokens, 9)),)


@pytest.mark.parametrize(
    ("name", "value"), [("pool", "gap"), ("posemb", "sincos2d"), ("pre_logits", True), ("outlier_channels", 2)]
)
def test_options_that_mean_nothing(name, value):
    without = ("pool", "posemb", "pre_logits", "outlier_channels")
    refuse_options("f", RandomOptions(seed=7, depth=2), without)  # what it has
    refuse_options("f", RandomOptions(**{name: value}), [other for other in without if other != name])
    with pytest.raises(UsageError) as error:
        refuse_options("f", RandomOptions(**{name: value}), without)
    assert (str(error.value), error.value.fix) == (
        f"{name}={value!r}: has no meaning for family f",
        f"Leave {name} out.",
    )
