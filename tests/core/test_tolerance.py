"""What each precision has to meet, and what is said of one that does not."""

import pytest

from vit_convert.core.compare import Tolerance
from vit_convert.core.config import QUANTIZED
from vit_convert.core.defaults import default_config
from vit_convert.core.tolerance import agreement_miss, judges_blocks, tolerance_for, top1_miss


@pytest.fixture
def config():
    """Seven numbers, none like another."""
    found = default_config()
    with found.unlocked():
        numbers = {"atol": 1e-7, "rtol": 2e-4, "engine_rtol": 3e-3, "cosine": 0.95, "fp16_cosine": 0.94}
        found.check.update(numbers | {"int8_cosine": 0.93, "min_agreement": 97.0, "max_top1_drop": 2.0})
    return found


UNBOUNDED = (0.0, float("inf"))


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
