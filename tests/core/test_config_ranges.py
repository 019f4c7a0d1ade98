"""Every number in the config has a range, and what lies outside is refused at the start by its key, its value and the
range."""

import math
import re

import ml_collections
import pytest

from vit_convert.core.config import complete, default_config
from vit_convert.core.config_ranges import RANGES, Range
from vit_convert.core.errors import UsageError
from vit_convert.core.overrides import dotted_keys

NO_NUMBERS = {
    "keep_fp32",
    "keep_fp16",
    "quantize_only",
    "lowerings",
    "evaluation.templates",
    "families",
}  # tuples of names


def read(config: ml_collections.ConfigDict, key: str):
    for part in key.split("."):
        config = config[part]
    return config


def numeric_keys() -> list[str]:
    """Read from the defaults alone: a new key is found here whether or not anybody gave it a range."""
    config = default_config()
    found = []
    for key in dotted_keys(config):
        value = read(config, key)
        if (isinstance(value, int | float) and not isinstance(value, bool)) or (
            isinstance(value, tuple) and key not in NO_NUMBERS
        ):
            found.append(key)
    return [*found, "posemb_grid"]  # a placeholder


def config_with(key: str, value) -> ml_collections.ConfigDict:
    """A config that differs from the defaults in one key, however the batch sizes would then lie to each other."""
    config = default_config()
    config.checkpoint, config.name = "a.npz", "x"
    group, _, field = key.rpartition(".")
    (config[group] if group else config)[field] = value
    return config


def given(key: str, value):
    number = (
        (value,)
        if isinstance(read(default_config(), key), tuple)
        else (value, value)
        if key == "posemb_grid"
        else value
    )
    return complete(config_with(key, number), "x")


def test_every_number_has_a_range():
    assert set(numeric_keys()) == set(RANGES)


@pytest.mark.parametrize("key", numeric_keys())
def test_the_default_lies_in_its_range(key):
    value = read(default_config(), key)
    for number in value or () if RANGES[key].many else (value,):
        assert RANGES[key].holds(number)


@pytest.mark.parametrize("key", numeric_keys())
def test_what_lies_outside_is_refused_with_key_value_and_range(key):
    allowed = RANGES[key]
    whole = isinstance(read(default_config(), key), int) or allowed.many
    wrong = [-1, -(10**6), 10**12, 10**30] if whole else [-1.0, -1e-9, float("nan"), float("inf"), float("-inf"), 1e30]
    for value in wrong:
        with pytest.raises(UsageError, match=re.escape(f"config.{key}=")) as error:
            given(key, value)
        assert str(allowed) in str(error.value), (key, value)
        assert f"{value:g}" in str(error.value) or repr(value) in str(error.value)
        assert error.value.exit_code == 2


@pytest.mark.parametrize("key", [key for key in numeric_keys() if not key.startswith("batch.m") and key != "batch.opt"])
def test_both_ends(key):
    """The batch sizes must also rise, and have a test of their own."""
    allowed = RANGES[key]
    for end, excluded in ((allowed.low, allowed.above), (allowed.high, allowed.below)):
        if excluded:
            with pytest.raises(UsageError, match=re.escape(key)):
                given(key, end)
        else:
            given(key, end)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("engine.opt_level", 9),
        ("engine.opt_level", 6),
        ("engine.workspace_gib", 0.0),
        ("benchmark.seconds", 0.0),
        ("num_classes", -1),
    ],
)
def test_what_tensorrt_and_the_clock_would_refuse_later(key, value):
    """TensorRT's builder_optimization_level goes from 0 to 5."""
    with pytest.raises(UsageError, match=re.escape(key)):
        given(key, value)


@pytest.mark.parametrize("key", ["batch.profiles", "benchmark.batches", "benchmark.streams", "posemb_grid"])
@pytest.mark.parametrize("value", [True, 1.0, "1", (1,), None])
def test_what_is_no_whole_number(key, value):
    with pytest.raises(UsageError, match=re.escape(key)):
        complete(config_with(key, (value, value)), "x")


@pytest.mark.parametrize("key", ["batch.max", "check.num_images"])
def test_a_switch_is_no_number(key):
    with pytest.raises(UsageError, match=re.escape(key)):
        complete(config_with(key, True), "x")


@pytest.mark.parametrize(
    ("allowed", "text"),
    [
        (Range(0, 5), "a whole number from 0 to 5"),
        (Range(1, 65_536, many=True), "whole numbers from 1 to 65,536"),
        (Range(0.0, 1.0, below=True), "a number from 0, below 1"),
        (Range(0.0, 3600.0, above=True), "a number above 0, at most 3600"),
    ],
)
def test_ranges_in_words(allowed, text):
    assert str(allowed) == text


# What each key takes, smallest and largest, as the README's tables, --help and TensorRT's own documentation say it.
WHOLE = {
    "num_classes": (0, 10_000_000),
    "posemb_grid": (1, 4096),
    **dict.fromkeys(("batch.min", "batch.opt", "batch.max", "batch.profiles", "benchmark.batches"), (1, 65_536)),
    **dict.fromkeys(("calibration.num_images", "plan.num_images"), (1, 100_000_000)),
    "calibration.batch_size": (1, 4096),
    "evaluation.num_images": (0, 100_000_000),  # 0 takes all
    "check.num_images": (1, 1024),
    "engine.opt_level": (0, 5),
    "benchmark.streams": (1, 64),
    "plan.runs": (0, 10_000),
}
SMALLEST = math.nextafter(0.0, 1.0)
REAL = {
    **dict.fromkeys(("plan.cosine", "check.cosine", "check.fp16_cosine", "check.int8_cosine"), (0.0, 1.0)),
    "calibration.min_cosine": (0.0, 1.0),
    **dict.fromkeys(("plan.accuracy_budget", "check.max_top1_drop", "check.min_agreement"), (0.0, 100.0)),
    **dict.fromkeys(("check.int8_agreement", "check.min_recall"), (0.0, 100.0)),
    **dict.fromkeys(("check.fp16_similarity", "check.int8_similarity"), (0.0, 2.0)),  # cosines are from -1 to 1
    **dict.fromkeys(("check.atol", "check.rtol", "check.engine_rtol"), (0.0, 1e6)),
    "calibration.max_error": (SMALLEST, 1.0),
    "calibration.smooth": (0.0, math.nextafter(1.0, 0.0)),
    "engine.workspace_gib": (SMALLEST, 4096.0),
    "benchmark.seconds": (SMALLEST, 3600.0),
    "benchmark.min_gain": (0.0, 1000.0),
}


def test_both_tables_name_every_key():
    assert set(WHOLE) | set(REAL) == set(RANGES)


@pytest.mark.parametrize("key", WHOLE)
def test_whole_numbers_to_their_ends(key):
    low, high = WHOLE[key]
    assert [RANGES[key].holds(number) for number in (low - 1, low, low + 1, high - 1, high, high + 1)] == [
        False,
        *[True] * 4,
        False,
    ]
    assert not any(RANGES[key].holds(number) for number in (float(low), high - 0.5, True, "1", None))


@pytest.mark.parametrize("key", REAL)
def test_real_numbers_to_their_ends(key):
    low, high = REAL[key]
    inside = [low, math.nextafter(low, 1.0), high / 2, math.nextafter(high, 0.0), high]
    assert all(RANGES[key].holds(number) for number in inside)
    outside = (
        math.nextafter(low, -1.0),
        math.nextafter(high, math.inf),
        math.nan,
        math.inf,
        -math.inf,
        True,
        "0.5",
        None,
    )
    assert not any(RANGES[key].holds(number) for number in outside)
    assert RANGES[key].holds(1) == (high >= 1)  # --config.check.atol=1


@pytest.mark.parametrize(
    ("key", "value", "said", "fix"),
    [
        ("engine.opt_level", 9, "config.engine.opt_level=9: must be a whole number from 0 to 5", ""),
        ("check.rtol", -0.5, "config.check.rtol=-0.5: must be a number from 0 to 1e+06", ""),
        (
            "batch.profiles",
            (4, 0),
            "config.batch.profiles=(4, 0): must be whole numbers from 1 to 65,536",
            'For example --config.batch.profiles="(1,8)".',
        ),
    ],
)
def test_refusals_say_the_value_and_what_to_give(key, value, said, fix):
    with pytest.raises(UsageError) as error:
        complete(config_with(key, value), "x")
    assert (str(error.value), error.value.fix) == (said, fix)


def test_every_number_of_a_tuple_is_looked_at():
    for place in range(3):
        values = [1, 2, 3]
        values[place] = 0
        with pytest.raises(UsageError, match=re.escape("config.benchmark.streams=")):
            complete(config_with("benchmark.streams", tuple(values)), "x")


def test_a_placeholder_without_a_value_is_in_range():
    assert complete(config_with("posemb_grid", None), "x").posemb_grid is None
