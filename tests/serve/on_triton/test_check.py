"""Each fault that Triton's protobuf lets through is named; the configs are as that protobuf gives them."""

import copy
import json
import shutil
import socket

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
        ("instance_group.0.kind", "KIND_CPU", "instance_group kind KIND_CPU: TensorRT runs on a GPU"),
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
    ("path", "value", "faults_of_it"),
    [
        ("name", None, []),  # then it is the folder's
        ("backend", "python", []),  # the file that is named is there
        ("default_model_filename", None, []),
        ("max_batch_size", 8, []),
        ("dynamic_batching.preferred_batch_size", [1, 8], []),
        ("dynamic_batching.preferred_batch_size", [0], ["preferred_batch_size 0, max_batch_size is 8"]),
        ("dynamic_batching", None, []),
        ("instance_group.0.count", 2, []),
        ("instance_group.0.count", None, []),
        ("instance_group", None, []),
        ("instance_group.0.profile", ["0", "1", "2"], [f"profile {n}, the engine has 1" for n in (1, 2)]),
        ("optimization.cuda.graph_spec.0.batch_size", 1, []),
        ("optimization.cuda.graph_spec.0.batch_size", None, ["graph_spec batch_size 0, max_batch_size is 8"]),
        ("optimization.cuda.graph_spec.0.batch_size", 0, ["graph_spec batch_size 0, max_batch_size is 8"]),
        ("optimization", None, []),
        ("model_warmup.0.batch_size", 8, []),
        ("model_warmup.0.batch_size", None, []),
        ("model_warmup.0.inputs.images", {"zero_data": True}, []),
        ("model_warmup", None, []),
        ("output.0.label_filename", None, []),
        ("output.0.dims", ["-1"], ["output logits: dims ['-1'], the engine's are [10]"]),
        ("output.0.dims", None, ["output logits: no dims", "output logits: dims None, the engine's are [10]"]),
        ("output.0.data_type", "TYPE_INT8", ["output logits: TYPE_INT8, the engine's is float32"]),
        ("input.0.name", None, ["input: one has no name", "input : the engine has none of this name"]),
        ("input", [], ["no input"]),
        ("output", None, ["no output"]),
        ("output", [GOOD["output"][0], GOOD["output"][0]], ["output: ['logits', 'logits'] name one tensor twice"]),
        ("cc_model_filenames", {"9.0": "model.plan"}, []),
        ("cc_model_filenames", {"9.0": "model.plan", "8.9": "ada.plan"}, ["1/ada.plan: there is no such file",
            "ada.plan.json: missing or damaged, so nothing says what the engine takes"]),
    ],
)  # fmt: skip
def test_what_one_value_brings_and_nothing_else(repository, path, value, faults_of_it):
    assert faults(repository, changed(GOOD, path, value)) == faults_of_it


def test_a_default_engine_is_looked_for_only_where_it_is_named(repository):
    by_capability = changed(GOOD, "cc_model_filenames", {"9.0": "model.plan"})
    (repository / "tiny" / "1" / "model.plan").rename(repository / "tiny" / "1" / "h100.plan")
    (repository / "tiny" / "1" / "model.plan.json").rename(repository / "tiny" / "1" / "h100.plan.json")
    own = changed(by_capability, "cc_model_filenames", {"9.0": "h100.plan"})
    assert "1/model.plan: there is no such file" in faults(repository, own)
    assert faults(repository, changed(own, "default_model_filename", None)) == []


def test_the_latest_version_is_looked_at_and_folders_of_other_names_are_none(repository):
    folder = repository / "tiny"
    for name in ("0", "01", "old"):
        (folder / name).mkdir()
    assert faults(repository, GOOD) == []
    (folder / "1").rename(folder / "9")
    (folder / "10").mkdir()  # after 9, though "10" < "9"
    assert faults(repository, GOOD)[0] == "10/model.plan: there is no such file"
    (folder / "10").rmdir()
    assert faults(repository, GOOD) == []
    (folder / "9").rename(folder / "none")
    assert faults(repository, GOOD) == ["no version folder (1, 2, …)"]


@pytest.mark.parametrize(
    ("backend", "name"),
    [("tensorrt", "model.plan"), ("onnxruntime", "model.onnx"), ("python", "model.py"), ("unheard", None)],
)
def test_what_a_backend_looks_for_unless_told(repository, backend, name):
    shutil.rmtree(repository / "tiny" / "1")
    (repository / "tiny" / "1").mkdir()
    config = changed(changed(GOOD, "default_model_filename", None), "backend", backend)
    assert faults(repository, config)[:1] == ([f"1/{name}: there is no such file"] if name else [])


def test_models_that_are_asked_while_one_answers(repository):
    asks = changed(GOOD, "parameters", {"calls": {"string_value": "tiny other"}})
    assert faults(repository, asks) == ["asks other: the repository has no such model"]
    assert faults(repository, changed(GOOD, "parameters", {"calls": {"string_value": "tiny"}})) == []


def test_steps_in_turn(repository):
    """The second takes what the first gave, and not the other way around."""
    scores = {"name": "s", "data_type": "TYPE_FP32", "dims": ["10"]}
    models = {"tiny": GOOD, "top": {**GOOD, "input": [{**scores, "name": "in"}], "output": [{**scores, "name": "out"}]}}
    first = ENSEMBLE["ensemble_scheduling"]["step"][0]
    second = {"model_name": "top", "input_map": {"in": "scores"}, "output_map": {"out": "best"}}
    path = repository / "both" / "config.pbtxt"

    def of(*steps, output="best"):
        config = {**ENSEMBLE, "output": [{**scores, "name": output}], "ensemble_scheduling": {"step": list(steps)}}
        return check._faults(path, {"config": config}, models)

    assert of(first, second) == [] and of(first, output="scores") == []
    assert of(second, first) == ["step top: scores is given by no step before it"]
    assert of(first) == ["output best: no step gives it"]
    assert of({}, first) == ["step : the repository has no such model"]


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


@pytest.mark.parametrize(
    "content",
    [
        "", "[]", "7", "{}", "[" * 100_000, '{"profiles": []}', '{"profiles": [7]}', '{"profiles": [{}]}',
        '{"profiles": [{"x": []}]}', '{"profiles": [{"x": [[1], [2], []]}]}', '{"profiles": {"x": 1}}',
        '{"profiles": [{"x": [[1], [1], [8]]}], "plan": "x"}', '{"profiles": [{"x": [[1], [1], [8]]}], "targets": [9]}',
        '{"profiles": [{"x": [[1], [1], [8]]}], "inputs": [{"name": 1}]}',
    ],
)  # fmt: skip
def test_a_sidecar_that_is_none(repository, content):
    (repository / "tiny" / "1" / "model.plan.json").write_text(content)
    assert faults(repository, GOOD) == [
        "model.plan.json: missing or damaged, so nothing says what the engine takes"
    ]  # fmt: skip


def test_a_sample_without_a_batch_is_for_a_model_without_one(repository):
    config = changed(changed(GOOD, "max_batch_size", 0), "model_warmup.0.batch_size", None)
    assert not [fault for fault in faults(repository, config) if "model_warmup" in fault]


def test_a_profile_that_is_no_number(repository):
    config = changed(GOOD, "instance_group.0.profile", ["0", "first", "-1"])
    assert faults(repository, config) == [f"profile {name}, the engine has 1" for name in ("first", "-1")]


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


def test_a_port_that_is_taken(tmp_path):
    """Another server's readiness had been taken for ours, and its answers."""
    from vit_convert.serve.triton.server import Installed, running

    installed = Installed(tmp_path / "none", tmp_path, None, tmp_path, "")
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        taken = pytest.raises(UsageError, match=f"port {port}: Address already in use")
        with taken, running(installed, tmp_path, port=port):
            raise AssertionError("it runs")


def test_plans_of_two_versions(repository, bundle_path, plan):
    """Which no server has both of."""
    for version, arch in (("8.6.1", "sm80"), ("10.7.0", "sm90")):
        put, name = plan(version=version, arch=arch), f"model.{arch}.plan"
        for suffix in ("", ".json"):
            shutil.copyfile(f"{put}{suffix}", repository / "tiny" / "1" / f"{name}{suffix}")
    config = changed(GOOD, "default_model_filename", None)
    config["cc_model_filenames"] = {"8.0": "model.sm80.plan", "9.0": "model.sm90.plan"}
    said = "plans of several versions of TensorRT: model.sm80.plan by 8.6.1, model.sm90.plan by 10.7.0"
    assert faults(repository, config) == [said]


def test_a_sample_that_is_too_short(repository):
    """Which a server refuses while it loads the model."""
    sample = {"data_type": "TYPE_FP32", "dims": ["32", "32", "3"], "input_data_file": "images"}
    config = changed(GOOD, "model_warmup.0.inputs.images", sample)
    path = repository / "tiny" / "warmup" / "images"
    path.write_bytes(bytes(12288))
    assert faults(repository, config) == []
    path.write_bytes(bytes(12287))
    assert faults(repository, config) == ["model_warmup one: warmup/images has 12287 bytes, a sample has 12288"]
    assert faults(repository, changed(config, "model_warmup.0.inputs.images.dims", ["-1", "32", "3"])) == []
    assert faults(repository, changed(config, "model_warmup.0.inputs.images.data_type", "TYPE_STRING")) == []


def test_a_graph_without_its_weights(repository, bundle_path):
    """As a file or as a folder that holds it with its weights."""
    models = models_of(read_offered(bundle_path), Asked("graph", runtime="onnxruntime"))[:1]
    write_models(repository, models)
    config = {**GOOD, "name": "graph", "backend": "onnxruntime", "default_model_filename": "model.onnx"}
    config = {**config, "instance_group": [], "model_warmup": []}
    assert faults(repository, config, "graph") == []
    folder = repository / "graph" / "1" / "model.onnx"
    (folder / "model.onnx.data").unlink()
    (said,) = faults(repository, config, "graph")
    assert said == "model.onnx: its weights lie in model.onnx.data, which is not beside it"
    (folder / "model.onnx").write_bytes(b"no graph")
    (said,) = faults(repository, config, "graph")
    assert said.startswith("model.onnx: not an ONNX file")


@pytest.mark.parametrize(("key", "value"), [("data_type", "TYPE_FP16"), ("dims", ["5"])])
def test_an_ensemble_that_promises_what_no_step_gives(repository, key, value):
    (said,) = faults(repository, changed(ENSEMBLE, f"output.0.{key}", value), "both")
    assert said.startswith("output scores: ") and said.endswith(", the step that makes it gives TYPE_FP32 10")
