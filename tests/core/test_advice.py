"""What is advised after a miss: each thing where it can help, and none that the config has already."""

import pytest

from vit_convert.core.advice import advice
from vit_convert.core.defaults import default_config


def said(precision="int8", *, engine=False, method="entropy", attention=False, lowering="", auto=False, tf32=False):
    config = default_config()
    config.calibration.method, config.calibration.attention = method, attention
    config.calibration.max_error, config.engine.tf32 = 0.002, tf32
    config.engine.int8_lowering = lowering
    if auto:
        config.precision = "auto"
    return advice(config, precision, engine=engine)


ENTROPY, LESS = "calibration.method=entropy instead of minmax", "calibration.max_error below 0.002"
FLOAT, AUTO, HIGHER = "calibration.attention=False", "precision=auto", "a higher config.plan.cosine"
OUTPUT = "a higher config.calibration.min_cosine"
EVERY = {ENTROPY, LESS, FLOAT, AUTO, HIGHER, OUTPUT}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, [LESS, AUTO]),
        ({"method": "minmax"}, [ENTROPY, AUTO]),
        ({"attention": True}, [FLOAT, LESS, AUTO]),
        ({"auto": True}, [LESS, HIGHER]),
        ({"lowering": "fused"}, [LESS, OUTPUT]),
        ({"lowering": "auto"}, [LESS, AUTO]),
        ({"auto": True, "lowering": "fused"}, [LESS, HIGHER]),  # the plan's budget takes the place of min_cosine
        ({"precision": "fp8"}, [AUTO]),  # its ranges are not by entropy
        ({"precision": "fp8", "method": "minmax", "attention": True}, [FLOAT, AUTO]),
    ],
)
def test_quantized(given, expected):
    for engine in (False, True):
        found = said(**given, engine=engine)
        places = [found.index(words) for words in expected]
        assert places == sorted(places) and not [words for words in EVERY - {*expected} if words in found]
        assert found.startswith("Try config.") or found.startswith("Try a higher")
        assert found.count("; then ") == len(expected) - 1
        assert found.endswith(" docs/checks.md has what each of them gained on a trained model.")


def test_nothing_left_to_try():
    assert said("fp8", lowering="fused").startswith("Stay with fp16. docs/checks.md")


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_graphs_that_miss(precision):
    assert said(precision) == "docs/checks.md says what usually causes it."


def test_engines_that_miss():
    assert said("fp32", engine=True).startswith("Build it again; if it still misses")
    assert said("fp32", engine=True, tf32=True).startswith("Build without engine.tf32; if it still misses")
    for precision in ("fp16", "bf16"):
        assert "config.keep_fp32" in said(precision, engine=True)


def test_a_graph_is_meant_unless_an_engine_is_named():
    config = default_config()
    for precision in ("fp32", "fp16", "bf16"):
        assert advice(config, precision) == advice(config, precision, engine=False) == said(precision)
        assert advice(config, precision) != advice(config, precision, engine=True)
