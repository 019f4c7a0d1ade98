"""What each precision has to meet, and what is said of one that does not."""

import pytest

from vit_convert.core.compare import Tolerance
from vit_convert.core.config import QUANTIZED
from vit_convert.core.defaults import default_config
from vit_convert.core.similarity import Ranking
from vit_convert.core.tolerance import (
    agreement_miss,
    allowed_similarity_error,
    judges_blocks,
    similarity_misses,
    tolerance_for,
    top1_miss,
)


@pytest.fixture
def config():
    """Numbers of which none is like another."""
    found = default_config()
    with found.unlocked():
        numbers = {"atol": 1e-7, "rtol": 2e-4, "engine_rtol": 3e-3, "cosine": 0.95, "fp16_cosine": 0.94}
        numbers |= {"int8_cosine": 0.93, "min_agreement": 97.0, "max_top1_drop": 2.0, "fp16_similarity": 0.02}
        found.check.update(numbers | {"int8_similarity": 0.03, "int8_agreement": 90.0, "min_recall": 98.0})
    return found


UNBOUNDED, NAN = (0.0, float("inf")), float("nan")


@pytest.mark.parametrize("precision", ["fp32", "smooth"])
def test_fp32_is_judged_by_its_numbers(config, precision):
    assert judges_blocks(precision)
    assert tolerance_for(config, precision) == Tolerance(1e-7, 2e-4, 0.95)
    assert tolerance_for(config, precision, engine=True) == Tolerance(1e-7, 3e-3, 0.95)
    for engine in (False, True):  # TF32 rounds as fp16 does
        assert tolerance_for(config, precision, engine=engine, tf32=True) == Tolerance(*UNBOUNDED, 0.94)


@pytest.mark.parametrize(("precision", "cosine"), [("fp16", 0.94), ("bf16", 0.94), *((p, 0.93) for p in QUANTIZED)])
def test_lower_ones_are_judged_by_their_direction(config, precision, cosine):
    assert not judges_blocks(precision)
    for options in ({}, {"engine": True}, {"tf32": True}):
        assert tolerance_for(config, precision, **options) == Tolerance(*UNBOUNDED, cosine)


@pytest.mark.parametrize(
    ("top1", "of_jax", "words"),
    [
        (80.0, 82.0, ""),  # as much as is allowed is allowed
        (99.0, 82.0, ""),
        (79.5, 82.0, "top-1 is 79.50 %, 2.50 points below JAX's 82.00 %; allowed 2"),
    ],
)
def test_top1(config, top1, of_jax, words):
    assert top1_miss(config, top1, of_jax) == words


@pytest.mark.parametrize(
    ("precision", "agreement", "words"),
    [
        ("fp16", 97.0, ""),
        ("fp16", 100.0, ""),
        ("fp16", None, ""),
        ("fp16", 96.5, "agrees with JAX on 96.50 % of 40 images; needed 97 %"),
        ("fp32", 0.0, "agrees with JAX on 0.00 % of 40 images; needed 97 %"),
        *((precision, 10.0, "") for precision in QUANTIZED),
    ],
)
def test_agreement(config, precision, agreement, words):
    assert agreement_miss(config, precision, agreement, 40) == words


@pytest.mark.parametrize(
    ("precision", "graphs", "engines"),
    [
        ("fp32", 2e-4 + 1e-7, 3e-3 + 1e-7),  # of a cosine of 1, the largest
        ("fp16", 0.02, 0.02),
        ("bf16", 0.02, 0.02),
        *((precision, 0.03, 0.03) for precision in QUANTIZED),
    ],
)
def test_how_far_a_similarity_may_be(config, precision, graphs, engines):
    assert allowed_similarity_error(config, precision) == pytest.approx(graphs, rel=1e-12)
    assert allowed_similarity_error(config, precision, engine=True) == pytest.approx(engines, rel=1e-12)


def misses(config, precision="fp16", *, error=0.0, top1=100.0, recall=100.0, judges_ranks=True, **options):
    found = Ranking(40, 10, error, 0.0, 0.0, top1, recall)
    return similarity_misses(config, precision, found, judges_ranks=judges_ranks, **options)


OFF = "the cosine of an image and a text is off by"


@pytest.mark.parametrize(("error", "passes"), [(0.0, True), (0.02, True), (0.0201, False), (1.0, False), (NAN, False)])
def test_a_similarity_that_is_too_far_off_or_no_number_misses(config, error, passes):
    for judges_ranks in (True, False):
        found = misses(config, error=error, judges_ranks=judges_ranks)
        assert found == ([] if passes else [f"{OFF} {error:.3g}; allowed 0.02"])


def test_engines_have_their_own_allowance(config):
    assert misses(config, "fp32", error=2e-3) and not misses(config, "fp32", error=2e-3, engine=True)


@pytest.mark.parametrize(("precision", "needed"), [("fp32", 97), ("fp16", 97), *((name, 90) for name in QUANTIZED)])
def test_the_first_texts_of_images(config, precision, needed):
    """As many as are needed suffice; where nobody chose the images, their order means nothing."""
    assert misses(config, precision, top1=float(needed)) == [] == misses(config, precision, top1=needed + 1.0)
    assert misses(config, precision, top1=needed - 0.5) == [
        f"puts JAX's first text first for {needed - 0.5:.2f} % of 40 images; needed {needed} %"
    ]
    assert misses(config, precision, top1=0.0, recall=0.0, judges_ranks=False) == []


def test_the_first_five_texts_of_images(config):
    assert misses(config, recall=98.0) == [] == misses(config, recall=99.0)
    words = "JAX's first text is among the first 5 for 97.50 % of 40 images; needed 98 %"
    assert misses(config, recall=97.5) == [words]
    assert len(misses(config, error=1.0, top1=0.0, recall=0.0)) == 3
