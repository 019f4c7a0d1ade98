"""Which engine of a bundle runs here, what was proved of it, and that an engine of another conversion is none of it."""

import pytest
import simulated_gpu
from by_hand import conclude
from engine_graphs import PROFILE, block
from signatures import PREPROCESS

from vit_convert.core.bundle import Bundle, hash_file, read_json, write_json
from vit_convert.core.engine_results import EngineCheck, Proof
from vit_convert.core.errors import BuildError
from vit_convert.engine.bundle_engines import (
    built_from,
    find_plan,
    keep_proof,
    open_engine,
    proof_of,
    require_conversion,
    require_model,
    require_proof,
)
from vit_convert.engine.handoff import judged_by

RESULTS = {
    "checkpoint": {"image_size": [32, 32], "output": "logits", "preprocess": PREPROCESS},
    "export": {"target": "trt8"},
    "check": {"precision": "fp32", "passed": True},
    "quantize": {"checks": {"fp16": {"passed": True}, "bf16": {"passed": False}}},
}
FILES = {"export": dict.fromkeys(("model.onnx", "model.fp16.onnx", "model.bf16.onnx", "lowerings/matmul.onnx"))}
HERE, OLDER, OTHER = "tensorrt-8.6.0-sm90", "tensorrt-8.5.0-sm90", "tensorrt-8.6.0-sm80"


@pytest.fixture
def bundle(tmp_path):
    """Finished, with four graphs of one block."""
    bundle = Bundle(tmp_path / "b")
    (bundle.root / "lowerings").mkdir(parents=True)
    for name in FILES["export"]:
        block(bundle.root / name)
    (bundle.root / "reference.npz").write_bytes(b"r")
    conclude(bundle, {**RESULTS, "reference": {}}, {**FILES, "reference": {"reference.npz": None}})
    return bundle


def write(bundle, precision="fp16", graph="model.fp16.onnx", folder=HERE, **changes):
    plan = bundle.root / "engines" / folder / f"{precision}.plan"
    simulated_gpu.write_plan(plan, bundle.root / graph, [PROFILE["images"]], precision=precision)
    record = read_json(f"{plan}.json")
    record["options"] |= changes.pop("options", {})
    write_json(f"{plan}.json", {**record, **changes})
    return plan


def test_the_engine_built_here_goes_before_those_of_other_hosts(bundle, gpu):
    own = bundle.root / "engines" / HERE / "fp16.plan"
    assert find_plan(gpu[0], bundle, "fp16") == own and not own.exists()
    write(bundle, folder=OLDER, version="8.5.0")
    write(bundle, folder=OTHER, targets=["sm80"])
    write(bundle, "int8", "model.onnx", OTHER)
    write(bundle, folder="rtx-8.6.0-sm90", backend="rtx")
    assert find_plan(gpu[0], bundle, "fp16") == own  # none of these runs here
    fits = write(bundle, folder=OTHER, targets=["sm80", "sm90"])
    assert find_plan(gpu[0], bundle, "fp16") == fits
    later = write(bundle, folder="tensorrt-8.6.0-sm86", targets=["sm90"])
    assert find_plan(gpu[0], bundle, "fp16") == fits  # of several that run, the first by name
    write(bundle)
    assert find_plan(gpu[0], bundle, "fp16") == own and later.exists()


@pytest.mark.parametrize("graph", ["model.fp16.onnx", "lowerings/matmul.onnx"])
def test_an_engine_of_this_conversion_is_opened_with_its_graph(bundle, gpu, graph):
    plan = write(bundle, graph=graph)
    assert built_from(bundle, plan) == bundle.root / graph
    engine = open_engine(gpu[0], bundle, plan)
    assert engine.path == plan and [spec.name for spec in engine.outputs] == ["logits"]
    (bundle.root / graph).write_bytes(b"another")
    with pytest.raises(BuildError, match=f"built from another {graph.rpartition('/')[2]}"):
        open_engine(gpu[0], bundle, plan)


def test_an_engine_of_an_earlier_conversion_is_refused_though_its_graph_is_gone(bundle, gpu):
    plan = write(bundle)
    conclude(bundle, RESULTS, {"export": {"model.onnx": None}})  # which makes no fp16
    for there in (True, False):
        with pytest.raises(
            BuildError, match=r"built from another model\.fp16\.onnx \([0-9a-f]{12}…\) than this conversion's"
        ) as caught:
            open_engine(gpu[0], bundle, plan)
        assert caught.value.fix == "Convert to the end, and build again."
        if there:
            (bundle.root / "model.fp16.onnx").unlink()
    bundle.manifest.unlink()
    require_conversion(bundle, plan)  # a plan that was copied alone is judged by its sidecar
    assert built_from(bundle, plan) is None


def test_a_sidecar_that_names_no_graph(bundle):
    plan = write(bundle)
    write_json(f"{plan}.json", {"onnx": {"sha256": "0"}})
    require_conversion(bundle, plan)  # `check_sidecar` refuses it in its own words
    assert built_from(bundle, plan) is None
    write_json(f"{plan}.json", {"onnx": {"path": "lowerings"}})
    assert built_from(bundle, plan) is None  # a folder


def test_an_engine_stands_for_the_model_that_it_was_built_from(bundle):
    plan = write(bundle, model={"sha256": hash_file(bundle.onnx())})
    require_model(bundle, plan)
    bundle.onnx().write_bytes(b"another")
    with pytest.raises(BuildError, match=r"fp16\.plan: built from another model\.onnx than is there now") as caught:
        require_model(bundle, plan)
    assert caught.value.fix == "Convert to the end, and build again."
    bundle.onnx().unlink()
    require_model(bundle, plan)  # there is none that could go on in its place


def test_what_the_model_itself_was_built_into_is_compared_when_it_is_opened(bundle):
    plan = write(bundle, "fp32", "model.onnx", model={"sha256": "of another"})
    require_model(bundle, plan)
    require_model(bundle, write(bundle))  # an earlier version kept no model
    with pytest.raises(BuildError):
        require_model(bundle, write(bundle, model={"sha256": "of another"}))


MISSED = EngineCheck.from_dict({"passed": False})
FOUND = {"passed": True, "tolerance": "t", "max_rel": 1e-3, "cosine": 0.9999, "top1": 81.0, "agreement": 99.0}
PASSED = EngineCheck.from_dict(FOUND)


def test_a_proof_is_of_the_engine_and_of_what_judged_it(bundle):
    plan = write(bundle)
    assert proof_of(plan, "j") is None
    keep_proof(plan, PASSED, "j")
    assert read_json(f"{plan}.json")["proof"] == {**FOUND, "judge": "j"}
    assert proof_of(plan, "j") == Proof(**FOUND, judge="j") and proof_of(plan, "k") is None
    keep_proof(plan, MISSED, "j")
    assert proof_of(plan, "j").passed is False
    write(bundle)  # another engine in its place
    assert proof_of(plan, "j") is None


@pytest.mark.parametrize(
    ("precision", "graph", "options", "said"),
    [
        ("fp16", "model.fp16.onnx", {}, ""),
        ("bf16", "model.bf16.onnx", {}, "model.bf16.onnx did not pass its check"),
        ("fp8", "model.onnx", {}, "by a flag"),
        ("fp16", "lowerings/matmul.onnx", {}, "by a flag"),
        ("fp32", "model.onnx", {}, ""),
        ("fp32", "model.onnx", {"tf32": True}, "by a flag"),
    ],
)
def test_what_nobody_checked_is_not_served_until_it_is_verified(bundle, precision, graph, options, said):
    plan = write(bundle, precision, graph, options=options)
    if said:
        with pytest.raises(BuildError, match=said) as caught:
            require_proof(bundle, plan)
        assert str(caught.value).startswith(f"{plan}: ")
        assert caught.value.fix == f"python -m vit_convert.engine verify {bundle.root}"
    else:
        require_proof(bundle, plan)
    keep_proof(plan, PASSED, judged_by(bundle))
    require_proof(bundle, plan)
    keep_proof(plan, MISSED, judged_by(bundle))
    with pytest.raises(BuildError, match=f"{precision} missed its tolerance"):
        require_proof(bundle, plan)
    keep_proof(plan, PASSED, "of another reference")
    if said:
        with pytest.raises(BuildError, match=said):
            require_proof(bundle, plan)


def test_a_plan_that_was_copied_alone_has_its_own_proof_or_none(bundle):
    plan = write(bundle)
    bundle.manifest.unlink()
    with pytest.raises(BuildError, match=r"model\.fp16\.onnx was not checked against JAX"):
        require_proof(bundle, plan)
    keep_proof(plan, PASSED, "whoever")
    require_proof(bundle, plan)


@pytest.mark.parametrize("missing", ["precision", "onnx", "options"])
def test_a_damaged_sidecar_is_not_judged_here(bundle, missing):
    plan = write(bundle, "bf16", "model.bf16.onnx")
    record = read_json(f"{plan}.json")
    del record[missing]
    write_json(f"{plan}.json", record)
    require_proof(bundle, plan)  # it does not load: `check_sidecar` says why
