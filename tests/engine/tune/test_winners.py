"""What `tune` makes of its trials: the fastest of each precision and batch, what it leads by, the words that get it,
the table."""

import pytest

from vit_convert.core.tune_results import TunedTrial, TuneResult, Winner
from vit_convert.engine.tune import winners as code

USUAL = {"engine.opt_level": 3, "keep_fp32": [], "engine.tf32": False}


def trial(lowering, *rates, precision="fp16", profile="fixed 8", passed=True, noise=0.5, **more):
    """A finished trial, measured at batch 8 and, where there is a second rate, at 64."""
    sizes = [int(word) for word in profile.split()[1].split("-")]
    return {
        "key": f"{lowering}, {profile}, {precision}",
        "lowering": lowering,
        "profile": profile,
        "sizes": dict(zip(("min", "opt", "max"), sizes if len(sizes) == 3 else 3 * sizes)),
        "precision": precision,
        "options": dict(USUAL),
        "passed": passed,
        "fused_attention": None,
        "rows": [
            {"batch": batch, "images_per_second": rate, "noise_percent": noise} for batch, rate in zip((8, 64), rates)
        ],
        **more,
    }


def winners(trials, usual):
    return [found.to_dict() for found in code.winners(map(TunedTrial.from_dict, trials), usual)]


def config_words(winner):
    return code.config_words(Winner.from_dict(winner))


def tune_table(result):
    return code.tune_table(TuneResult.from_dict(result))


def test_winners_are_verified_ones():
    trials = [trial("default", 80.0), trial("default", 100.0, profile="fixed 8"), trial("fast", 130.0)]
    (found,) = winners([*trials, trial("wrong", 200.0, passed=False), {"failed": "x"}], USUAL)
    assert (found["lowering"], found["ratio"]) == ("fast", 1.3)  # to the default lowering at its best
    assert winners([trial("wrong", 1.0, passed=False)], USUAL) == []


def test_one_of_each_precision_and_batch_in_order():
    trials = [
        trial("matmul", 50.0, 70.0, precision="int8"),
        trial("default", 40.0, 90.0, precision="int8", profile="range 1-8-64", noise=1.25),
        trial("default", 30.0, 20.0),
    ]
    found = [
        (row["precision"], row["batch"], row["lowering"], row["images_per_second"], row["ratio"])
        for row in winners(trials, USUAL)
    ]
    assert found == [
        ("fp16", 8, "default", 30.0, 1.0),
        ("fp16", 64, "default", 20.0, 1.0),
        ("int8", 8, "matmul", 50.0, 1.25),
        ("int8", 64, "default", 90.0, 1.0),
    ]


def test_a_winner_says_how_it_is_got():
    options = {"engine.opt_level": 5, "keep_fp32": ["head"], "engine.tf32": False, "engine.new": "x"}
    (found,) = winners([trial("matmul", 33.333, profile="range 1-8-64", noise=1.25, options=options)], USUAL)
    assert found == {
        "precision": "fp16",
        "batch": 8,
        "key": "matmul, range 1-8-64, fp16",
        "lowering": "matmul",
        "profile": "range 1-8-64",
        "sizes": {"min": 1, "opt": 8, "max": 64},
        "options": {"engine.opt_level": 5, "keep_fp32": ["head"], "engine.new": "x"},
        "images_per_second": 33.333,
        "noise_percent": 1.25,
        "ratio": None,  # the default lowering was not tried
        "within_noise_of": "",  # nor any other
    }
    assert config_words(found) == (
        "--config.engine.lowering=matmul --config.batch.min=1 --config.batch.opt=8 --config.batch.max=64"
        """ --config.batch.profiles="()" --config.engine.opt_level=5"""
        """ --config.keep_fp32="('head',)" --config.engine.new=x"""
    )
    (plain,) = winners([trial("default", 1.0)], USUAL)
    sizes = "--config.batch.min=8 --config.batch.opt=8 --config.batch.max=8"
    assert config_words(plain) == f'--config.engine.lowering= {sizes} --config.batch.profiles="()"'


def test_ratio_is_to_four_places():
    (found,) = winners([trial("default", 300.0), trial("matmul", 400.02)], USUAL)
    assert found["ratio"] == 1.3334


@pytest.mark.parametrize(
    ("rates", "noises", "within"),
    [
        ((101.0, 100.0), (0.5, 0.4), ""),  # 1 % ahead
        ((101.0, 100.0), (0.5, 0.6), "default, fixed 8"),
        ((101.0, 100.0), (None, 1.1), "default, fixed 8"),  # one pass tells no noise
        ((101.0, 100.0), (1.1, None), "default, fixed 8"),
        ((101.0, 100.0), (None, 0.5), ""),
        ((101.0, 100.0), (0.5, None), ""),
        ((101.0, 100.0), (None, None), ""),
        ((150.0, 100.0), (25.0, 25.0), "default, fixed 8"),  # as much as both together is no lead
        ((150.0, 100.0), (25.0, 24.5), ""),
        ((100.0, 100.0), (0.0, 0.0), "matmul, fixed 8"),  # the first of two that are level
        ((120.0, 100.0), (15.0, 1.0), ""),
    ],
)
def test_a_lead_is_more_than_the_noise_of_both(rates, noises, within):
    rows = [trial("matmul", rates[0], noise=noises[0]), trial("default", rates[1], noise=noises[1])]
    if rates[0] == rates[1]:
        rows.reverse()
    (found,) = winners(rows, USUAL)
    assert found["within_noise_of"] == within


def test_the_next_engine_is_the_rival_and_not_the_same_one_timed_again():
    fast = trial("matmul", 101.0, noise=0.1)
    again = {**trial("matmul", 100.95, noise=0.1), "key": "again"}
    others = [trial("default", 100.5, noise=0.1), trial("plugin", 90.0, noise=50.0)]
    assert winners([*others, again, fast], USUAL)[0]["within_noise_of"] == ""  # 0.5 % before the next, which has 0.1
    assert winners([again, fast], USUAL)[0]["within_noise_of"] == ""
    for other in (
        trial("matmul", 100.95, profile="range 1-8-64", noise=0.1),
        trial("matmul", 100.95, noise=0.1, options={**USUAL, "engine.opt_level": 5}),
    ):
        assert winners([other, fast], USUAL)[0]["within_noise_of"] == f"matmul, {other['profile']}"


TABLE = """\
lowering       profile  precision  batch  images/s       fused attention
default        fixed 8       fp16      8     1,000               unknown
default        fixed 8       fp16     64     1,500               unknown
matmul    range 1-8-64       fp16      8     1,235  yes, fp16, 12 of 12                                         fastest
matmul    range 1-8-64       fp16     64     1,501  yes, fp16, 12 of 12  fastest, within the noise of default, fixed 8
plugin         fixed 8       fp16      8     9,999               unknown                           missed its tolerance
fused          fixed 8       fp16                                           failed: fused.onnx: node x: not supported
"""


def test_table():
    trials = [
        trial("default", 1000.0, 1500.0),
        trial("matmul", 1234.56, 1501.0, profile="range 1-8-64", fused_attention={"text": "yes, fp16, 12 of 12"}),
        trial("plugin", 9999.4, passed=False),
        {**trial("fused"), "failed": "/home/me/bundles/b16/lowerings/fused.onnx: node x: not supported"},
    ]
    best = winners(trials, USUAL)
    *lines, first, second = tune_table({"trials": trials, "winners": best}).splitlines()
    assert [line.split() for line in lines] == [line.split() for line in TABLE.splitlines()]
    assert (
        first == f"fp16 at batch 8: {config_words(best[0])}" and second == f"fp16 at batch 64: {config_words(best[1])}"
    )


def test_a_long_failure_is_cut():
    failed = {**trial("fused"), "failed": "x" * 79 + "yz"}
    assert tune_table({"trials": [failed], "winners": []}).endswith("failed: " + "x" * 79 + "y")
