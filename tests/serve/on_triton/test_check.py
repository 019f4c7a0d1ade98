"""Each fault that Triton's protobuf lets through is named; the configs are as that protobuf gives them."""

import copy
import json

import pytest

from vit_convert.core.errors import UsageError
from vit_convert.serve.triton import check
from vit_convert.serve.triton.models_of import models_of
from vit_convert.serve.triton.offered import read_offered
from vit_convert.serve.triton.parts import Asked
from vit_convert.serve.triton.repository import write_models

GOOD = {
    "name": "tiny",
    "backend": "tensorrt",
    "default_model_filename": "model.plan",
    "max_batch_size": 8,
    "input": [{"name": "images", "data_type": "TYPE_FP32", "dims": ["32", "32", "3"]}],
    "output": [{"name": "logits", "data_type": "TYPE_FP32", "dims": ["10"], "label_filename": "labels.txt"}],
    "instance_group": [{"count": 1, "kind": "KIND_GPU", "profile": ["0"]}],
    "dynamic_batching": {"preferred_batch_size": [4]},
    "optimization": {"cuda": {"graphs": True, "graph_spec": [{"batch_size": 8}]}},
    "model_warmup": [{"name": "one", "batch_size": 1, "inputs": {"images": {"input_data_file": "images"}}}],
}
ENSEMBLE = {
    "name": "both",
    "platform": "ensemble",
    "max_batch_size": 8,
    "input": [{"name": "pictures", "data_type": "TYPE_FP32", "dims": ["32", "32", "3"]}],
    "output": [{"name": "scores", "data_type": "TYPE_FP32", "dims": ["10"]}],
    "ensemble_scheduling": {
        "step": [{"model_name": "tiny", "input_map": {"images": "pictures"}, "output_map": {"logits": "scores"}}]
    },
}


@pytest.fixture
def repository(bundle_path, plan, tmp_path):
    """A repository with one TensorRT model."""
    plan()
    write_models(tmp_path / "models", models_of(read_offered(bundle_path), Asked("tiny"))[:1])
    (tmp_path / "models" / "both" / "1").mkdir(parents=True)
    return tmp_path / "models"


def faults(repository, config, name="tiny"):
    return check._faults(repository / name / "config.pbtxt", {"config": config}, {"tiny": GOOD})


def changed(of, path, value):
    """A config with one value replaced; None removes it."""
    config = copy.deepcopy(of)
    *parents, last = path.split(".")
    node = config
    for part in parents:
        node = node[int(part)] if isinstance(node, list) else node[part]
    if value is None:
        del node[last]
    else:
        node[int(last) if isinstance(node, list) else last] = value
    return config


def test_nothing_is_wrong(repository):
    assert faults(repository, GOOD) == [] and faults(repository, ENSEMBLE, "both") == []


@pytest.mark.parametrize(
    ("path", "value", "fault"),
    [
        ("name", "other", "name 'other', the folder is 'tiny'"),
        ("backend", "", "neither a backend nor an ensemble"),
        ("input", [], "no input"),
        ("input.0.dims", [], "input images: no dims"),
        ("input.0.dims", ["16", "16", "3"], "input images: dims ['16', '16', '3'], the engine's are [32, 32, 3]"),
        ("input.0.data_type", "TYPE_FP16", "input images: TYPE_FP16, the engine's is float32"),
        ("input.0.name", "pixels", "input pixels: the engine has none of this name"),
        ("output.0.dims", ["7"], "labels.txt: 10 lines, logits has 7 classes"),
        ("output.0.label_filename", "none.txt", "none.txt: there is no such file"),
        ("max_batch_size", 16, "max_batch_size 16, the engine takes 8"),
        ("dynamic_batching.preferred_batch_size", [9], "preferred_batch_size 9, max_batch_size is 8"),
        ("instance_group.0.count", -3, "instance_group count -3"),
        ("instance_group.0.profile", ["1"], "profile 1, the engine has 1"),
        ("optimization.cuda.graph_spec.0.batch_size", 9, "graph_spec batch_size 9, max_batch_size is 8"),
        ("model_warmup.0.batch_size", 9, "model_warmup one: batch_size 9, max_batch_size is 8"),
        ("model_warmup.0.inputs.images.input_data_file", "cat", "model_warmup one: there is no warmup/cat"),
        ("default_model_filename", "other.plan", "1/other.plan: there is no such file"),
        ("cc_model_filenames", {"8.0": "model.plan"}, "cc_model_filenames 8.0: model.plan runs on 9.0"),
    ],
)
def test_one_value_is_wrong(repository, path, value, fault):
    assert fault in faults(repository, changed(GOOD, path, value))


@pytest.mark.parametrize(
    ("path", "value", "fault"),
    [
        ("0.model_name", "none", "step none: the repository has no such model"),
        ("0.input_map", {"pixels": "pictures"}, "step tiny: has no input pixels"),
        ("0.input_map", {"images": "nothing"}, "step tiny: nothing is given by no step before it"),
        ("0.input_map", {}, "step tiny: input images is given nothing"),
        ("0.output_map", {"features": "scores"}, "step tiny: has no output features"),
        ("0.output_map", {"logits": "others"}, "output scores: no step gives it"),
    ],
)
def test_one_step_is_wrong(repository, path, value, fault):
    assert fault in faults(repository, changed(ENSEMBLE, f"ensemble_scheduling.step.{path}", value), "both")


def test_types_and_batches_of_steps_fit(repository):
    assert "step tiny: images is TYPE_FP32, pictures is TYPE_UINT8" in faults(
        repository, changed(ENSEMBLE, "input.0.data_type", "TYPE_UINT8"), "both"
    )
    assert "max_batch_size 9, step tiny takes 8" in faults(repository, changed(ENSEMBLE, "max_batch_size", 9), "both")


def test_an_engine_that_is_not_the_one_of_its_sidecar(repository):
    (repository / "tiny" / "1" / "model.plan").write_bytes(b"another")
    assert "model.plan: is not the engine that its sidecar describes" in faults(repository, GOOD)
    (repository / "tiny" / "1" / "model.plan.json").unlink()
    assert any("missing or damaged" in fault for fault in faults(repository, GOOD))


def environment(folder, script):
    """Something that looks like an environment, whose Python is this script."""
    python = folder / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    return folder


def test_what_the_protobuf_refuses_is_passed_on(repository, tmp_path):
    path = repository / "tiny" / "config.pbtxt"
    said = json.dumps({str(path): {"error": '3:1 : Message type "inference.ModelConfig" has no field named "inputs".'}})
    found = check.check_repository(repository, environment(tmp_path / "env", f"echo '{said}'"))
    assert found == {"tiny": ['3:1 : Message type "inference.ModelConfig" has no field named "inputs".']}


def test_an_environment_without_the_protobuf(repository, tmp_path):
    with pytest.raises(UsageError, match=r"cannot read configs \(ModuleNotFoundError: tritonclient\)") as raised:
        check.check_repository(
            repository, environment(tmp_path / "env", "echo ModuleNotFoundError: tritonclient >&2; exit 1")
        )
    assert "extra `triton`" in raised.value.fix
    with pytest.raises(UsageError, match="holds no bin/python"):
        check.check_repository(repository, tmp_path)


def test_no_repository(tmp_path):
    with pytest.raises(UsageError, match=r"no folder in it holds a config\.pbtxt"):
        check.check_repository(tmp_path, tmp_path)
