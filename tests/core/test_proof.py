"""Nothing unproved is recommended or served."""

import pytest

from vit_convert.core.check_results import GraphCheck, Verdict
from vit_convert.core.engine_results import EngineSummary, Proof
from vit_convert.core.proof import doubt
from vit_convert.core.recommend import Evidence, recommend_unmeasured

PASSED, FAILED = (GraphCheck.from_dict({"passed": passed}) for passed in (True, False))
VERIFIED, MISSED = (Proof.from_dict({"passed": passed}) for passed in (True, False))


def engine(precision, graph=None):
    name = "model.onnx" if precision == "fp32" else f"model.{precision}.onnx"
    return EngineSummary.from_dict(
        {"precision": precision, "path": f"engines/x/{precision}.plan", "graph": graph or name}
    )


@pytest.mark.parametrize(
    ("precision", "graph", "found", "check", "words"),
    [
        ("fp16", "model.fp16.onnx", None, PASSED, ""),
        ("fp16", "model.fp16.onnx", None, FAILED, "model.fp16.onnx did not pass its check"),
        ("fp16", "model.fp16.onnx", None, None, "model.fp16.onnx was not checked"),
        ("fp16", "model.fp16.onnx", MISSED, PASSED, "fp16 missed its tolerance"),
        ("fp16", "model.fp16.onnx", VERIFIED, FAILED, ""),  # the engine itself was seen to be right
        ("fp16", "model.onnx", None, PASSED, "by a flag"),  # TensorRT 8 lowers the fp32 graph, which nobody saw
        ("fp16", "plugin.onnx", None, PASSED, "by a flag"),
        ("fp16", "plugin.onnx", VERIFIED, None, ""),
        ("int8", "model.onnx", None, PASSED, "by a flag"),  # its own calibrator
        ("fp32", "model.onnx", None, PASSED, ""),
    ],
)
def test_what_proves_an_engine(precision, graph, found, check, words):
    said = doubt(precision, graph, found, {precision: check} if check else {})
    assert words in said and bool(said) == bool(words)


def test_tf32_is_no_fp32():
    assert "by a flag" in doubt("fp32", "model.onnx", None, {"fp32": PASSED}, lowered=True)
    assert doubt("fp32", "model.onnx", VERIFIED, {"fp32": PASSED}, lowered=True) == ""


def chosen(engines, checks, verified=(), verdicts=(), **options):
    verified = {engine(precision).path: found for precision, found in dict(verified).items()}
    verdicts = {precision: Verdict.from_dict(verdict) for precision, verdict in dict(verdicts).items()}
    found = recommend_unmeasured(engines, Evidence(verified, checks, verdicts, **options))
    return (found.precision, found.recommended_because) if found else ("", "")


def test_fp32_engines_that_round_to_tf32_are_not_recommended_on_their_graphs_check():
    both, checks = [engine("fp32"), engine("fp16")], {"fp32": PASSED, "fp16": PASSED}
    assert chosen([engine("fp32")], checks, tf32=True) == ("", "")
    assert chosen([engine("fp32")], checks, {"fp32": PASSED}, tf32=True) == ("fp32", "verified against JAX")
    assert chosen(both, checks, tf32=True)[0] == "fp16"  # whose graph says what it computes
    name, why = chosen(both, {"fp32": PASSED, "fp16": FAILED}, {"fp32": PASSED}, tf32=True)
    assert name == "fp32" and "model.fp16.onnx did not pass its check" in why


def test_fp16_that_failed_or_was_never_checked_is_not_recommended():
    assert chosen([engine("fp16")], {"fp32": PASSED, "fp16": FAILED}) == ("", "")
    assert chosen([engine("fp16")], {"fp32": PASSED}) == ("", "")
    assert chosen([engine("fp16", "model.onnx")], {"fp32": PASSED, "fp16": PASSED}) == ("", "")
    assert chosen([engine("fp16")], {"fp16": PASSED}, {"fp16": FAILED}) == ("", "")


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
def test_every_precision_has_to_be_proved(precision):
    assert chosen([engine(precision)], {precision: FAILED})[0] == ""
    assert chosen([engine(precision)], {precision: PASSED})[0] == precision


def test_what_remains_is_recommended_and_why_not_the_other():
    name, why = chosen(
        [engine("fp16"), engine("bf16"), engine("fp32")], {"fp16": FAILED, "bf16": FAILED, "fp32": PASSED}
    )
    assert name == "fp32" and why.startswith("its graph was checked against JAX")
    assert "model.fp16.onnx did not pass its check" in why and "model.bf16.onnx did not pass its check" in why
    name, why = chosen([engine("fp32"), engine("fp16")], {"fp32": PASSED}, {"fp16": PASSED})
    assert (name, why) == ("fp16", "verified against JAX")


def test_int8_is_never_recommended_on_faith():
    verdicts = {"int8": {"text": "int8 loses 0.1 points", "accurate": True}}
    engines = [engine("fp16"), engine("int8")]
    name, why = chosen(engines, {"fp16": PASSED, "int8": PASSED}, {"int8": PASSED}, verdicts)
    assert name == "fp16" and "int8 loses 0.1 points, and it has to prove itself faster" in why
    assert chosen([engine("int8")], {"int8": PASSED}, {"int8": PASSED}, verdicts)[0] == ""
    verdicts["int8"]["accurate"] = False
    assert chosen(engines, {"fp16": PASSED}, (), verdicts)[1].endswith("int8 loses 0.1 points")
