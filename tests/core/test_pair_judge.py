"""Who stands in for a tower that lacks a precision, and how the similarities of a pair are judged: embeddings on a
circle, whose cosines are known."""

import numpy as np
import pytest

from vit_convert.core.defaults import default_config
from vit_convert.core.pair import PairFacts
from vit_convert.core.pair_judge import PairJudge, stand_in

ALL = ("fp32", "bf16", "fp16", "int8", "fp8")


@pytest.mark.parametrize(
    ("precision", "has", "expected"),
    [
        *((name, ALL, name) for name in ALL),
        ("int8", ("fp32", "fp16"), "fp16"),
        ("int8", ("fp32", "bf16"), "bf16"),
        ("fp8", ("fp32", "bf16", "fp16", "int8"), "fp16"),  # int8 is another, not a higher one
        ("fp16", ("fp32", "int8"), "fp32"),
        ("fp16", ("int8",), ""),
        ("fp32", ("fp16", "int8"), ""),  # never a lower one
        ("int8", (), ""),
    ],
)
def test_the_next_higher_one_stands_in(precision, has, expected):
    assert stand_in(precision, has) == expected


def circle(*degrees):
    """Embeddings of length 1."""
    angle = np.radians(degrees)
    return np.stack([np.cos(angle), np.sin(angle)], 1).astype(np.float32)


RIGHT = circle(0, 60, 120), circle(10, 70, 130)
PAIR = PairFacts(10.0, None, "softmax", {}, classes=3, templates=1)


def judge(labels=None, engine=False, tf32=False, ranks=True):
    config = default_config()
    with config.unlocked():
        config.engine.tf32 = tf32
        config.check.fp16_similarity, config.check.max_top1_drop = 0.02, 1.0
    labels = None if labels is None else np.asarray(labels)
    return PairJudge(config, PAIR, RIGHT, labels, ranks, engine)


USED = {"image": "fp16", "text": "fp32"}


def test_the_same_embeddings_pass():
    found = judge([0, 1, 2]).check("fp16", USED, RIGHT)
    assert (
        found.passed and found.misses == () and (found.precision, found.image, found.text) == ("fp16", *USED.values())
    )
    assert (found.images, found.texts, found.top1, found.recall) == (3, 3, 100.0, 100.0)
    assert found.max_cosine_error == 0.0 and (found.zero_shot, found.zero_shot_jax) == (100.0, 100.0)


def test_how_far_they_are_apart():
    """Images turned by three degrees: the cosine to a text 70 degrees away changes most, to one of 73 or 67."""
    found = judge().check("fp16", USED, (circle(3, 63, 123), RIGHT[1]))
    degrees = np.array([10, 70, 130])[None] - np.array([0, 60, 120])[:, None]
    error = np.abs(np.cos(np.radians(degrees - 3)) - np.cos(np.radians(degrees))).max()
    assert found.max_cosine_error == pytest.approx(error, abs=1e-6)
    assert not found.passed and "off by" in found.misses[0] and found.zero_shot is None is found.zero_shot_jax


def test_labels_are_held_against_jax():
    """Every image goes to the next class: none is right any more, by labels as by ranks."""
    turned = circle(60, 120, 0), RIGHT[1]
    found = judge([0, 1, 2]).check("fp16", USED, turned)
    assert (found.zero_shot, found.zero_shot_jax) == (0.0, 100.0)
    assert found.misses[-1].startswith("zero-shot top-1 is 0.00 %, 100.00 points below JAX's 100.00 %")
    assert judge([2, 2, 2]).zero_shot(RIGHT) == pytest.approx(100 / 3)
    assert judge().zero_shot(RIGHT) is None


def test_ranks_of_nobodys_images_mean_nothing():
    turned = circle(0.5, 59.5, 119.5), circle(130, 70, 10)  # the texts in another order
    with_ranks, without = (judge(ranks=ranks).check("fp16", USED, turned) for ranks in (True, False))
    assert any("first text first" in miss for miss in with_ranks.misses)
    assert not any("first" in miss for miss in without.misses)


@pytest.mark.parametrize(
    ("precision", "engine", "tf32", "passes"),
    [
        ("fp32", True, True, True),
        ("fp32", True, False, False),
        ("fp32", False, True, False),
        ("fp16", True, False, True),
    ],
)
def test_fp32_engines_that_may_round_to_tf32_are_judged_as_fp16(precision, engine, tf32, passes):
    near = circle(0.2, 60.2, 120.2), RIGHT[1]  # 0.0035 off: more than fp32 may be, less than fp16
    assert judge(engine=engine, tf32=tf32).check(precision, USED, near).passed is passes
