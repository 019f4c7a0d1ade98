"""What is read of a bundle on a host without JAX, from a manifest written here by hand; nothing is made up of what is
missing."""

import hashlib

import by_hand
import numpy as np
import pytest
from by_hand import COMMAND
from signatures import PREPROCESS

from vit_convert.config import default_config
from vit_convert.core.benchmark_results import MeasuredModel
from vit_convert.core.bundle import Bundle, hash_value, write_json
from vit_convert.core.check_results import GraphCheck
from vit_convert.core.errors import BuildError, UsageError
from vit_convert.core.image_size import ImageRange
from vit_convert.engine.handoff import describe_model, judged_by, open_bundle, read_config, read_facts, require_graph_of
from vit_convert.images.preprocess import Preprocess

RESULTS = {
    "checkpoint": {
        "image_size": [32, 48],
        "output": "features",
        "preprocess": PREPROCESS,
        "variant": "B/16",
        "sha256": "c",
        "family": "vit",
    },
    "export": {"target": "trt8", "lowering": "plugin"},
    "reference": {"top1": 81.5},
    "check": {"precision": "fp32", "passed": True},
    "quantize": {"checks": {"fp16": {"precision": "fp16", "passed": False}}},
}


@pytest.fixture
def bundle(tmp_path):
    bundle = Bundle(tmp_path / "b")
    bundle.root.mkdir()
    return bundle


def conclude(bundle, results=RESULTS, **more):
    by_hand.conclude(bundle, results, **more)


def test_what_a_finished_conversion_says(bundle):
    conclude(bundle)
    facts = read_facts(bundle)
    assert (facts.image_size, facts.output, facts.preprocess) == ((32, 48), "features", PREPROCESS)
    assert (facts.dialect.name, facts.lowering, facts.top1) == ("trt8", "plugin", 81.5)
    assert facts.checks == {
        "fp32": GraphCheck.from_dict(RESULTS["check"]),
        "fp16": GraphCheck.from_dict(RESULTS["quantize"]["checks"]["fp16"]),
    }


def test_a_range_of_sizes(bundle):
    sizes = {"smallest": [16, 32], "optimal": [32, 48], "largest": [64, 96]}
    conclude(bundle, {**RESULTS, "checkpoint": {**RESULTS["checkpoint"], "image_range": sizes}})
    assert read_facts(bundle).image_size == ImageRange((16, 32), (32, 48), (64, 96))


def test_what_was_not_measured_is_not_known(bundle):
    """A conversion that ended with its export, by a version that named no lowering."""
    conclude(bundle, {"checkpoint": RESULTS["checkpoint"], "export": {"target": "trt10"}})
    facts = read_facts(bundle)
    assert (facts.lowering, facts.top1, facts.checks) == ("", None, {})
    assert list(facts.files) == []


@pytest.mark.parametrize("unfinished", ["checkpoint", "export"])
@pytest.mark.parametrize("status", ["running", "failed", "stale", None])
def test_a_conversion_that_has_not_come_far_enough(bundle, unfinished, status):
    if status is None:
        conclude(bundle, {name: result for name, result in RESULTS.items() if name != unfinished})
    else:
        conclude(bundle, **{unfinished: status})
    with pytest.raises(UsageError, match=rf"manifest\.json: stage {unfinished} is not done") as caught:
        read_facts(bundle)
    assert "--until=check" in caught.value.fix


def test_a_folder_without_a_manifest_is_no_bundle(bundle):
    with pytest.raises(UsageError, match=r"b: holds no manifest\.json"):
        open_bundle(str(bundle.root))
    conclude(bundle)
    assert open_bundle(str(bundle.root)).root == bundle.root


def test_a_graph_of_this_conversion_may_be_read_and_another_not(bundle):
    conclude(bundle, files={"export": {"model.onnx": b"graph", "model.onnx.data": b"weights"}})
    facts = read_facts(bundle)
    require_graph_of(facts, bundle.onnx())
    bundle.onnx("int8").write_bytes(b"left by another")
    with pytest.raises(BuildError, match=r"model\.int8\.onnx: no finished stage of this conversion made it") as caught:
        require_graph_of(facts, bundle.onnx("int8"))
    assert "config.precision" in caught.value.fix
    (bundle.root / "model.onnx.data").write_bytes(b"cut")
    with pytest.raises(BuildError, match=r"model\.onnx\.data: is not the file that stage export left"):
        require_graph_of(facts, bundle.onnx())


def test_engines_are_judged_by_the_reference_and_the_labelled_images_alone(bundle):
    judging = {"reference": {"reference.npz": b"r", "reference.32x32.npz": b"s", "evaluation_logits.npy": b"l"}}
    also = {"export": {"model.onnx": b"graph"}, "checkpoint": {"evaluation_labels.npy": b"e"}}
    conclude(bundle, files={**judging, **also})
    contents = {path: data for files in (*judging.values(), also["checkpoint"]) for path, data in files.items()}
    expected = hash_value({path: hashlib.sha256(data).hexdigest() for path, data in contents.items()})
    assert judged_by(bundle) == expected
    conclude(bundle, files={**judging, **also, "export": {"model.onnx": b"another"}})
    assert judged_by(bundle) == expected
    conclude(bundle, files={**judging, **also, "checkpoint": {"evaluation_labels.npy": b"others"}})
    assert judged_by(bundle) != expected


def test_what_a_measurement_is_of(bundle):
    conclude(
        bundle,
        {**RESULTS, "checkpoint": {**RESULTS["checkpoint"], "summary": "ViT B/16, 86,567,656 parameters, 224x224"}},
    )
    about = {"variant": "B/16", "summary": "ViT B/16, 86,567,656 parameters, 224x224", "sha256": "c"}
    assert describe_model(bundle) == MeasuredModel(**about, converted_by=COMMAND)
    conclude(bundle, {"checkpoint": {"family": "user"}})
    assert describe_model(bundle) == MeasuredModel(converted_by=COMMAND)


def test_the_config_that_a_bundle_was_made_with(bundle):
    with pytest.raises(UsageError, match=r"config\.json: missing or damaged") as caught:
        read_config(bundle)
    assert caught.value.fix == "Convert again."
    config = default_config()
    config.checkpoint, config.batch.max = "a.npz", 48
    write_json(bundle.config, config.to_dict())
    found = read_config(bundle)
    assert (found.checkpoint, found.batch.max, found.name) == ("a.npz", 48, "b")
    write_json(bundle.config, {"batch": {"maximum": 3}})
    with pytest.raises(UsageError, match="maximum"):
        read_config(bundle)


@pytest.mark.parametrize("channels_first", [False, True])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float16])
def test_what_a_graph_takes(dtype, channels_first):
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 5, 3), np.uint8)
    got = Preprocess.from_dict(PREPROCESS).graph_input(images, dtype, channels_first=channels_first)
    assert got.dtype == dtype and got.flags.c_contiguous
    if channels_first:
        assert got.shape == (2, 3, 3, 5)
        got = np.moveaxis(got, 1, 3)
    wanted = images.astype(np.float64)
    if dtype != np.uint8:  # which the graph normalises by itself
        wanted = (wanted / 255 - PREPROCESS["mean"]) / PREPROCESS["std"]
    # Values up to 3: half a step of float16 is 1e-3 there, and a product and a sum in float32 keep 4e-7.
    assert (
        got.shape == images.shape
        and np.abs(got - wanted).max() <= {np.uint8: 0, np.float32: 1e-6, np.float16: 1e-3}[dtype]
    )
