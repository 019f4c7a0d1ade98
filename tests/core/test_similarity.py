"""Similarities of a pair against the formulas written out, and how rankings are compared."""

import dataclasses

import numpy as np
import pytest

from vit_convert.config import default_config
from vit_convert.core import similarity
from vit_convert.core.errors import UsageError
from vit_convert.core.pair import PairFacts, is_pair, read_pair
from vit_convert.core.similarity import compare_rankings, logits_of, probabilities_of, zero_shot_top1
from vit_convert.core.tolerance import similarity_misses

CLIP = PairFacts(100.0, None, "softmax", {})
SIGLIP = PairFacts(117.33, -12.93, "sigmoid", {})
RNG = np.random.default_rng(3)
IMAGES, TEXTS = RNG.standard_normal((7, 16)).astype(np.float32), RNG.standard_normal((12, 16)).astype(np.float32)


def cosine(a, b):
    return sum(x * y for x, y in zip(a, b)) / (sum(x * x for x in a) * sum(y * y for y in b)) ** 0.5


@pytest.mark.parametrize("pair", [CLIP, SIGLIP])
def test_probabilities_are_those_of_the_formula(pair):
    found = probabilities_of(logits_of(IMAGES, TEXTS, pair), pair)
    for i, image in enumerate(IMAGES.astype(float)):
        logits = [pair.logit_scale * cosine(image, text) + (pair.logit_bias or 0) for text in TEXTS.astype(float)]
        if pair is CLIP:
            expected = np.exp(logits) / np.sum(np.exp(logits))
        else:
            expected = [1 / (1 + np.exp(-logit)) for logit in logits]
        np.testing.assert_allclose(found[i], expected, rtol=1e-9)


def test_large_logits_overflow_nothing():
    with np.errstate(over="raise", invalid="raise"):
        assert probabilities_of(np.array([[800.0, -800.0]]), SIGLIP).tolist() == [[1.0, 0.0]]
        assert probabilities_of(np.array([[3000.0, 0.0]]), dataclasses.replace(CLIP)).tolist() == [[1.0, 0.0]]


def test_equal_embeddings_differ_in_nothing_whatever_their_length():
    found = compare_rankings((IMAGES, TEXTS), (4 * IMAGES, 0.5 * TEXTS), CLIP)
    assert (found.images, found.texts, found.top1, found.recall) == (7, 12, 100.0, 100.0)
    assert found.max_cosine_error < 1e-15 and found.max_logit_error < 1e-12


def test_a_ranking_that_differs_is_counted():
    """Texts are the axes, so that an image's numbers are their order."""
    texts, order = np.eye(7), np.array([[7.0, 6, 5, 4, 3, 2, 1]] * 4)
    swapped = order.copy()
    swapped[0, [0, 1]] = 6, 7  # JAX's first is second
    swapped[1] = [3, 4, 5, 6, 7, 2, 1]  # fifth
    swapped[2] = [2, 3, 4, 5, 6, 7, 1]  # sixth
    found = compare_rankings((order, texts), (swapped, texts), CLIP)
    assert (found.top1, found.recall) == (25.0, 75.0)
    expected = max(cosine(a, t) - cosine(b, t) for a, b in zip(order, swapped) for t in texts)
    assert found.max_cosine_error == pytest.approx(expected)
    tied = np.ones((4, 7))  # of equal texts the first is taken, as by argmax
    assert compare_rankings((order, texts), (tied, texts), CLIP).top1 == 100.0


def test_images_are_taken_some_at_a_time(monkeypatch):
    other = IMAGES + np.float32(0.3) * RNG.standard_normal(IMAGES.shape).astype(np.float32)
    whole = compare_rankings((IMAGES, TEXTS), (other, TEXTS), SIGLIP)
    assert whole.max_cosine_error > 0.01
    monkeypatch.setattr(similarity, "_ROWS", 2)
    assert dataclasses.asdict(compare_rankings((IMAGES, TEXTS), (other, TEXTS), SIGLIP)) == pytest.approx(
        dataclasses.asdict(whole)
    )


def test_not_a_number():
    broken = TEXTS.copy()
    broken[3, 2] = np.nan
    found = compare_rankings((IMAGES, TEXTS), (IMAGES, broken), CLIP)
    assert found.max_cosine_error == float("inf") and (found.top1, found.recall) == (0.0, 0.0)
    with pytest.raises(ValueError, match="shape"):
        compare_rankings((IMAGES, TEXTS), (IMAGES, TEXTS[:5]), CLIP)


def test_zero_shot_takes_the_mean_of_a_class_over_its_templates():
    """Two classes of two prompts each; long prompts do not outweigh short ones."""
    pair = dataclasses.replace(CLIP, classes=2, templates=2)
    prompts = np.array([[100.0, 0.0], [0.6, 0.8], [0.0, 1.0], [-1.0, 0.0]])
    first, second = np.array([1.6, 0.8]) / 2, np.array([-1.0, 1.0]) / 2
    images = RNG.standard_normal((50, 2))
    expected = [int(cosine(image, second) > cosine(image, first)) for image in images]
    assert zero_shot_top1(images, prompts, np.array(expected), pair) == 100.0
    assert zero_shot_top1(images, prompts, np.array([1 - expected[0], *expected[1:]]), pair) == 98.0


@pytest.mark.parametrize(
    ("precision", "change", "said"),
    [
        ("fp32", {"max_cosine_error": 1e-4}, []),
        ("fp32", {"max_cosine_error": 2e-4}, ["off by 0.0002; allowed 0.000101"]),
        ("fp16", {"max_cosine_error": 0.009}, []),
        ("fp16", {"max_cosine_error": float("nan")}, ["off by nan"]),
        ("fp16", {"top1": 98.9}, ["first for 98.90 % of 500 images; needed 99 %"]),
        ("int8", {"top1": 90.0, "max_cosine_error": 0.1}, []),
        (
            "int8",
            {"top1": 89.0, "recall": 98.0},
            ["needed 90 %", "among the first 5 for 98.00 % of 500 images; needed 99 %"],
        ),
    ],
)
def test_what_is_too_far_from_jax(precision, change, said):
    found = similarity.Ranking(
        **{
            **dict.fromkeys(("max_cosine_error", "max_logit_error", "max_probability_error"), 0.0),
            "images": 500,
            "texts": 9,
            "top1": 100.0,
            "recall": 100.0,
            **change,
        }
    )
    misses = similarity_misses(default_config(), precision, found, judges_ranks=True)
    assert len(misses) == len(said) and all(part in miss for part, miss in zip(said, misses))
    of_noise = similarity_misses(default_config(), precision, found, judges_ranks=False)
    assert of_noise == [miss for miss in misses if "off by" in miss]  # an order of noise means nothing


def test_the_record_of_a_pair(tmp_path):
    assert not is_pair(tmp_path)
    for text, message in (
        ("{", "not the record of a pair"),
        ('{"logit_scale": "x"}', "not the record"),
        ("[]", "not the record"),
    ):
        (tmp_path / "pair.json").write_text(text)
        with pytest.raises(UsageError, match=message):
            read_pair(tmp_path)
    assert PairFacts.from_dict(SIGLIP.to_dict()) == SIGLIP
    for change in ({"similarity": "max"}, {"logit_scale": float("inf")}, {"logit_bias": float("nan")}):
        with pytest.raises(UsageError, match="are not those of a pair"):
            dataclasses.replace(SIGLIP, **change)
