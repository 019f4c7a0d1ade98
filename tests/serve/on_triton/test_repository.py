"""What a bundle becomes in a repository: files, configs, and where each figure in them comes from."""

import json

import numpy as np
import pytest

from vit_convert.core.bundle import Bundle, read_json, write_json
from vit_convert.core.errors import BuildError, UsageError
from vit_convert.core.manifest import Manifest
from vit_convert.serve.triton.__main__ import main
from vit_convert.serve.triton.models_of import models_of
from vit_convert.serve.triton.offered import read_offered
from vit_convert.serve.triton.parts import Asked
from vit_convert.serve.triton.repository import ModelFolder, write_models


def network(path, **asked):
    """The first model of a bundle, and its config by line without comments and without line breaks."""
    model = models_of(read_offered(path, asked.get("precision", "")), Asked("tiny", **asked))[0]
    return model, " ".join(line for line in model.config.splitlines() if not line.startswith("#"))


def measure(path, *rows, **about):
    """Leaves a benchmark of the bundle's graphs: (batch, streams, images/s, p50 ms, MiB) of fp16."""
    keys = ("batch", "streams", "images_per_second", "p50_ms", "gpu_memory_mib")
    known = {"precision": "fp16", "transfers": "none: images and results stay in GPU memory", "noise_percent": 1.0}
    graph = Manifest.read(Bundle(path)).files.graph_hashes(path / "model.onnx")
    record = {"onnx": graph, "gpu": "H100", "date": "2026-11-27T00:00:00", "gpu_memory_total_mib": 80_000}
    record |= {
        "rows": [{**known, **dict(zip(keys, row))} for row in rows],
        "recommended": {"precision": "fp16"},
        **about,
    }
    write_json(path / "benchmark.json", record)


def test_without_an_engine_the_checked_graph_is_served(converted):
    model, config = network(converted)
    assert 'backend: "onnxruntime"' in config and "max_batch_size: 8" in config
    assert 'input [ { name: "images" data_type: TYPE_FP32 dims: [ 32, 32, 3 ] } ]' in config
    assert 'output [ { name: "logits" data_type: TYPE_FP32 dims: [ 10 ] label_filename: "labels.txt" } ]' in config
    assert sorted(model.files) == ["model.onnx/model.onnx", "model.onnx/model.onnx.data"]
    assert model.beside["labels.txt"] == "".join(f"{number}\n" for number in range(10))
    assert "has no engine of TensorRT" in model.config.replace("\n# ", " ")


def test_warm_up_is_a_real_sample(converted):
    model, config = network(converted)
    images = np.load(converted / "reference.npz")["images"]
    assert np.array_equal(np.frombuffer(model.beside["warmup/images"], np.float32).reshape(1, 32, 32, 3), images[:1])
    assert 'batch_size: 8 inputs { key: "images"' in config


def test_an_engine_serves_with_the_graph_for_hosts_without_a_gpu(bundle_path, plan):
    path = plan(batches=((4, 4, 4), (1, 4, 8)))
    model, config = network(bundle_path)
    assert 'backend: "tensorrt"' in config and 'profile: [ "0", "1" ]' in config and "kind: KIND_GPU" in config
    assert model.files["model.plan"] == path and "model.onnx/model.onnx" in model.files
    assert 'backend: "onnxruntime"' in model.configs["cpu"] and "KIND_CPU" in model.configs["cpu"]
    assert "graph_spec { batch_size: 1 } graph_spec { batch_size: 4 } graph_spec { batch_size: 8 }" in config


def test_plans_of_several_gpus_are_chosen_by_compute_capability(bundle_path, plan):
    for arch in ("sm80", "sm90", "sm120"):
        plan(arch)
    plan("sm75", version="8.5.3")  # a server has one TensorRT
    model, config = network(bundle_path)
    for capability, arch in (("8.0", "sm80"), ("9.0", "sm90"), ("12.0", "sm120")):
        assert f'cc_model_filenames {{ key: "{capability}" value: "model.{arch}.plan" }}' in config
        assert model.files[f"model.{arch}.plan"].read_bytes().startswith(arch.encode())
    assert "7.5" not in config and "default_model_filename" not in config


def test_an_engine_that_is_not_proved_is_not_served(bundle_path, plan):
    plan(proved=False)
    model, config = network(bundle_path)
    assert 'backend: "onnxruntime"' in config and "no check covers it yet" in model.config.replace("\n# ", " ")
    with pytest.raises(BuildError, match="no check covers it yet"):
        network(bundle_path, runtime="tensorrt")


def test_engines_of_rtx_are_for_the_python_runtime(bundle_path, plan):
    path = plan("all", backend="rtx", version="1.7.1", precision="fp32")
    with pytest.raises(BuildError, match=r"rtx-1\.7\.1-all: Triton has no backend for these"):
        network(bundle_path, runtime="tensorrt")
    model, config = network(bundle_path, runtime="python")
    assert model.files["bundle/engines/rtx-1.7.1-all/fp32.plan"] == path and 'backend: "python"' in config
    assert "bundle/reference.npz" not in model.files and "bundle/model.onnx.data" in model.files


def test_measured_figures_become_settings(bundle_path, plan):
    plan()
    # 4 images at once give 97 % of what 8 give, so 4 is enough; 2 streams give 1.5 x; a tenth of 0.42 ms is 42 us.
    measure(
        bundle_path,
        (1, 1, 2000.0, 0.42, 500),
        (4, 1, 6500.0, 0.6, 600),
        (4, 2, 9700.0, 0.8, 1200),
        (8, 2, 10000.0, 1.6, 1300),
    )
    model, config = network(bundle_path)
    assert "preferred_batch_size: [ 4 ] max_queue_delay_microseconds: 42" in config
    assert "count: 2 kind: KIND_GPU" in config
    told = model.config.replace("\n# ", " ")
    assert (
        "2,000 at 1, 9,700 at 4, 10,000 at 8" in told and "on H100, 2026-11-27" in told and "10% of the 0.42 ms" in told
    )


@pytest.mark.parametrize(("each_mib", "instances"), [(1200, 2), (70_000, 1)], ids=["fits", "does not fit"])
def test_memory_bounds_the_instances(bundle_path, plan, each_mib, instances):
    plan()
    measure(bundle_path, (4, 1, 5000.0, 0.6, each_mib), (4, 2, 9000.0, 0.8, 2 * each_mib))
    assert f"count: {instances} kind: KIND_GPU" in network(bundle_path)[1]


def test_a_gain_within_the_noise_is_no_reason_for_a_second_instance(bundle_path, plan):
    plan()
    measure(bundle_path, (4, 1, 5000.0, 0.6, 100), (4, 2, 5040.0, 0.8, 200))
    assert "count: 1 kind: KIND_GPU" in network(bundle_path)[1]


def test_figures_of_other_graphs_are_not_used(bundle_path, plan):
    plan()
    measure(bundle_path, (4, 1, 5000.0, 0.6, 100), (4, 2, 9000.0, 0.8, 200), onnx={"sha256": "of another"})
    assert "count: 1 kind: KIND_GPU" in network(bundle_path)[1]


def test_delay_that_is_asked_for(converted):
    assert "max_queue_delay_microseconds: 7 }\n" in network(converted, delay_us=7)[0].config


def test_no_limit_of_the_queue(converted):
    """With one, the real server left one lone request in ten waiting for half a second."""
    assert "default_queue_policy" not in network(converted)[1]


def test_answers_are_kept_only_if_that_is_asked_for(converted):
    assert "response_cache" not in network(converted)[0].config
    assert "response_cache { enable: true }\n" in network(converted, response_cache=True)[0].config


def test_the_smallest_batch_has_to_be_one(bundle_path, plan):
    plan(batches=((2, 4, 8),))
    with pytest.raises(BuildError, match="takes batches from 2, Triton sends any from 1"):
        network(bundle_path)


def test_a_quantized_graph_is_for_engines_alone(converted):
    with pytest.raises(BuildError, match="kernels saturate on some processors"):
        network(converted, runtime="onnxruntime", precision="int8")


def test_a_changed_graph_is_not_served(bundle_path):
    with open(bundle_path / "model.onnx.data", "ab") as file:
        file.write(b"x")
    with pytest.raises(BuildError, match=r"model\.onnx\.data: is not the file that stage export left"):
        network(bundle_path)


def test_labels(converted, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("".join(f"class {number}\n" for number in range(10)))
    assert network(converted, labels=str(names))[0].beside["labels.txt"] == names.read_text()
    names.write_text("one\n")
    with pytest.raises(UsageError, match="1 lines, the model has 10 classes"):
        network(converted, labels=str(names))


def test_the_record_in_the_config_is_the_bundles(converted):
    models = {model.name: model for model in models_of(read_offered(converted), Asked("tiny"))}
    assert [*models] == [
        "tiny",
        "tiny_top",
        "tiny_image_preprocess",
        "tiny_image",
        "tiny_pixels_preprocess",
        "tiny_pixels",
    ]
    line = next(line for line in models["tiny_pixels_preprocess"].config.splitlines() if '"preprocess"' in line)
    told = json.loads(json.loads(line.split("string_value: ")[1].removesuffix(" } }")))
    assert told == read_json(converted / "report.json")["checkpoint"]["preprocess"]


def test_the_command(converted, tmp_path, capsys):
    output = tmp_path / "models"
    assert main(["triton", str(converted), f"--output={output}", "--name=vit"]) == 0
    assert (output / "vit" / "1" / "model.onnx" / "model.onnx").read_bytes() == (converted / "model.onnx").read_bytes()
    assert main(["triton", str(converted), f"--output={output}", "--name=vit", "--model_version=2"]) == 0
    assert sorted(path.name for path in (output / "vit").iterdir() if path.is_dir()) == ["1", "2", "warmup"]
    assert main(["triton", str(converted), str(converted), f"--output={output}", "--name=vit"]) == 2
    assert main(["triton", str(converted), str(converted), f"--output={output}"]) == 2
    assert "two models are called" in capsys.readouterr().err
    assert main(["triton", str(tmp_path), f"--output={output}"]) == 2


def test_a_folder_of_somebody_else_stays(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.pbtxt").write_text('name: "mine"\n')
    with pytest.raises(UsageError, match="was not written by this command"):
        write_models(tmp_path, [ModelFolder("mine", "# Written by vit_convert\n")])
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["config.pbtxt"]


@pytest.mark.parametrize("name", ["a/b", "", ".", "..", "a b", "../up", "-x", "é"])
def test_names_that_are_none(tmp_path, name):
    """Of a folder elsewhere, or that no address can have; nothing is written."""
    with pytest.raises(UsageError, match="cannot be a model's name"):
        write_models(tmp_path / "models", [ModelFolder("right", "x"), ModelFolder(name, "x")])
    assert not (tmp_path / "models").exists()


def test_a_file_in_the_place_of_a_folder(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "taken").write_text("")
    for root, name, place in (("file", "m", "file"), ("models", "taken", "models/taken")):
        with pytest.raises(UsageError, match=f"{place}: is a file, and a repository has folders"):
            write_models(tmp_path / root, [ModelFolder(name, "x")])
