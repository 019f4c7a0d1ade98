"""Which engine is recommended, and what is said of one that does not pay."""

import pytest

from vit_convert.core.benchmark_results import BenchmarkRow, Recommendation
from vit_convert.core.engine_results import EngineSummary, Proof
from vit_convert.core.recommend import RESIDENT, Evidence, engine_of, recommend_measured, recommend_unmeasured
from vit_convert.engine.measure.benchmark import END_TO_END

PASSED = {"passed": True}


def row(precision, batch, rate, noise=0.5, transfers=RESIDENT):
    return BenchmarkRow.from_dict(
        {
            "precision": precision,
            "batch": batch,
            "images_per_second": rate,
            "noise_percent": noise,
            "transfers": transfers,
        }
    )


def recommend(rows, verified, min_gain=1.0):
    proofs = {precision: Proof.from_dict(found) for precision, found in verified.items()}
    return recommend_measured(rows, proofs, min_gain=min_gain)


def test_slower_int8_is_reported_and_fp16_recommended():
    # Figures of TensorRT 8.6 on an H200, where int8 has no fast kernels.
    rows = [row("fp16", 64, 7800.0), row("fp16", 256, 8406.0), row("int8", 64, 5270.0), row("int8", 256, 5187.0)]
    found = recommend(rows, {"fp16": {**PASSED, "top1": 98.4}, "int8": {**PASSED, "top1": 97.8}})
    assert found.precision == "fp16"
    assert found.reason == "int8 runs at 0.62x of fp16 at batch 256 (top-1 97.80 % against 98.40 %)"
    assert [(c.batch, c.ratio, c.pays) for c in found.comparisons] == [
        (64, 0.6756, False),
        (256, 0.6171, False),
    ]


def test_faster_and_verified_int8_is_recommended():
    rows = [row("fp16", 64, 100.0), row("fp16", 256, 100.0), row("int8", 64, 150.0), row("int8", 256, 180.0)]
    found = recommend(rows, {"fp16": PASSED, "int8": PASSED})
    assert found.precision == "int8" and found.reason == "int8 is at least 1.50x as fast as fp16"


@pytest.mark.parametrize(("min_gain", "pays"), [(0.0, True), (2.9, True), (3.1, False)])
def test_the_gain_that_pays_is_the_users(min_gain, pays):
    rows = [row("fp16", 8, 100.0, 0.1), row("int8", 8, 103.0, 0.1)]
    assert (recommend(rows, {"fp16": PASSED, "int8": PASSED}, min_gain).precision == "int8") == pays


@pytest.mark.parametrize(("rate", "noise", "pays"), [(103.0, 5.0, False), (103.0, 1.0, True), (100.8, 0.1, False)])
def test_a_gain_within_the_noise_is_none(rate, noise, pays):
    found = recommend([row("fp16", 8, 100.0), row("int8", 8, rate, noise)], {"fp16": PASSED, "int8": PASSED})
    assert (found.precision == "int8") == pays
    assert pays or ("within the noise of 5 %" if noise == 5.0 else "less than benchmark.min_gain") in found.reason


@pytest.mark.parametrize(
    ("verified", "word"),
    [({"fp16": PASSED, "int8": {"passed": False}}, "did not pass"), ({"fp16": PASSED}, "was not verified")],
)
def test_unproved_int8_is_not_recommended_however_fast(verified, word):
    found = recommend([row("fp16", 8, 100.0), row("int8", 8, 300.0)], verified)
    assert found.precision == "fp16" and word in found.reason


def test_fastest_unquantized_engine_wins_and_transfers_do_not_count():
    rows = [row("fp32", 8, 50.0), row("fp16", 8, 100.0), row("fp32", 8, 999.0, transfers=END_TO_END)]
    assert recommend(rows, {"fp32": PASSED, "fp16": PASSED}).precision == "fp16"
    assert recommend(rows, {"fp32": PASSED, "fp16": {"passed": False}}).precision == "fp32"


def test_nothing_proved_nothing_recommended():
    found = recommend([row("fp16", 8, 100.0)], {"fp16": {"passed": False}})
    assert found.precision == "" and found.reason == "no engine passed its check"
    found = recommend([row("fp16", 8, 100.0)], {})
    assert found.precision == "" and found.reason == "none of fp16 was verified: verify, then benchmark again"


def test_batches_that_not_every_engine_was_measured_at_do_not_decide():
    rows = [row("fp16", 1, 90.0), row("fp32", 1, 50.0), row("fp32", 256, 100.0)]
    assert recommend(rows, {"fp32": PASSED, "fp16": PASSED}).precision == "fp16"


def test_int8_without_anything_to_compare_with_is_not_recommended():
    found = recommend([row("int8", 8, 300.0)], {"int8": PASSED})
    assert found.precision == "" and found.reason == "no unquantized engine passed its check, to compare with"


def test_one_pass_proves_no_gain():
    found = recommend([row("fp16", 8, 100.0), row("int8", 8, 150.0, noise=None)], {"fp16": PASSED, "int8": PASSED})
    assert found.precision == "fp16" and found.reason == "int8 runs at 1.50x of fp16 at batch 8, by only one pass"


def test_the_engine_that_a_benchmark_recommends():
    built = [("fp16", "tensorrt", "8.6.0"), ("int8", "tensorrt", "8.6.0"), ("int8", "tensorrt", "10.1")]
    built.append(("int8", "rtx", "8.6.0"))
    rows = [
        EngineSummary.from_dict({"precision": precision, "backend": backend, "version": version, "path": f"{i}"})
        for i, (precision, backend, version) in enumerate(built)
    ]
    chosen = Recommendation.from_dict({"precision": "int8", "reason": "twice as fast"})
    found = engine_of(chosen, "tensorrt", "8.6.0", rows)
    assert EngineSummary.part_of(found) == rows[1] and found.recommended_because == "twice as fast"
    again = EngineSummary.from_dict({**rows[1].to_dict(), "path": "built later"})
    assert engine_of(chosen, "tensorrt", "8.6.0", [*rows, again]).path == "built later"
    assert engine_of(Recommendation.from_dict({"reason": "none"}), "tensorrt", "8.6.0", rows) is None
    assert engine_of(None, "tensorrt", "8.6.0", rows) is None


def engine(path, precision="fp16"):
    about = {"backend": "tensorrt", "version": "8.6.1", "arch": "sm90", "precision": precision, "graph": "model.onnx"}
    return EngineSummary.from_dict({**about, "path": path, "bytes": 1, "build_seconds": 1.0})


def test_before_a_benchmark_an_engine_that_missed_leaves_the_next_one():
    verified = {"a.plan": Proof.from_dict({"passed": False}), "b.plan": Proof.from_dict(PASSED)}
    found = recommend_unmeasured([engine("a.plan"), engine("b.plan")], Evidence(verified, {}, {}))
    assert found.path == "b.plan" and "verified against JAX" in found.recommended_because


def test_every_quantized_precision_is_told_of_where_nothing_plain_was_measured():
    found = recommend([row("int8", 8, 10.0), row("fp8", 8, 10.0)], {"int8": {"passed": False}})
    assert "int8 did not pass its check" in found.reason and "fp8 was not verified" in found.reason


def test_engines_without_a_batch_in_common_are_compared_at_their_largest():
    rows = [row("fp16", 8, 100.0), row("fp16", 1, 900.0), row("fp32", 4, 50.0)]
    assert recommend(rows, {"fp32": PASSED, "fp16": PASSED}).precision == "fp16"


@pytest.mark.parametrize(("rate", "pays"), [(150.2, True), (149.8, False)])
def test_noise_is_in_percent(rate, pays):
    found = recommend([row("fp16", 8, 100.0), row("int8", 8, rate, 50.0)], {"fp16": PASSED, "int8": PASSED})
    assert [comparison.pays for comparison in found.comparisons] == [pays]


@pytest.mark.parametrize("known", ["fp16", "int8"])
def test_an_accuracy_is_compared_only_with_another(known):
    verified = {"fp16": PASSED, "int8": PASSED, known: {**PASSED, "top1": 98.0}}
    found = recommend([row("fp16", 8, 100.0), row("int8", 8, 50.0)], verified)
    assert found.precision == "fp16" and "top-1" not in found.reason
