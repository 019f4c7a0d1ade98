"""Real TensorRT-RTX builds on the CPU, from graphs of one layer."""

import dataclasses
import errno
import json
import os
import pathlib
import types

import numpy as np
import onnx
import pytest
from engine_graphs import PROFILE, TOKENS, WIDTH, block, quantized, save, weight
from onnx import TensorProto, helper, numpy_helper

from vit_convert.core.bundle import hash_file
from vit_convert.core.errors import BuildError, UsageError
from vit_convert.core.progress import Progress
from vit_convert.engine.backend import cuda
from vit_convert.engine.backend.graph_file import hash_graph
from vit_convert.engine.backend.sidecar import check_sidecar, sidecar_path
from vit_convert.engine.backend.trt import load_backend
from vit_convert.engine.builder import build
from vit_convert.engine.builder.build import build_engine
from vit_convert.engine.builder.network import ParsedGraph
from vit_convert.engine.builder.request import BuildRequest

pytest.importorskip("tensorrt_rtx")
RTX = load_backend("rtx")


def run(tmp_path, graph, precision, progress=None, **options):
    plan_path = tmp_path / "engines" / f"{precision}.plan"
    request = BuildRequest(graph, precision, **{"profiles": [PROFILE], **options})
    return plan_path, build_engine(RTX, request, plan_path, progress=progress or Progress(quiet=True))


def assert_nothing_written(tmp_path):
    assert [path for path in tmp_path.rglob("*") if "plan" in path.name] == []


GRAPHS = {
    "fp32": lambda path: block(path),
    "fp16": lambda path: block(path, TensorProto.FLOAT16),
    "bf16": lambda path: block(path, TensorProto.BFLOAT16, opset=22),
    "int8": quantized,
    "fp8": lambda path: quantized(path, TensorProto.FLOAT8E4M3FN),
}


@pytest.mark.parametrize("precision", GRAPHS)
def test_builds_the_precision_of_the_graph(tmp_path, precision):
    plan_path, result = run(tmp_path, GRAPHS[precision](tmp_path / "model.onnx"), precision)
    assert plan_path.stat().st_size == result.bytes
    assert result.products == {precision if precision in ("fp16", "bf16") else "fp32": 1}
    assert result.build_seconds > 0


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("precision", GRAPHS)
def test_refuses_every_other_precision(tmp_path, graph, precision):
    if graph == precision:
        return
    path = GRAPHS[graph](tmp_path / "model.onnx")
    with pytest.raises(BuildError, match=r"model\.onnx: matrix products 1 in .*; Q/DQ nodes"):
        run(tmp_path, path, precision)
    assert_nothing_written(tmp_path)


def test_sidecar_holds_what_the_engine_is(tmp_path):
    graph = block(tmp_path / "model.fp16.onnx", TensorProto.FLOAT16)
    record = {"mean": [127.5] * 3, "std": [127.5] * 3}
    plan_path, result = run(
        tmp_path, graph, "fp16", preprocessing=record, workspace_gib=0.5, opt_level=2, model={"sha256": "of model.onnx"}
    )
    sidecar = json.loads(sidecar_path(plan_path).read_text())
    assert (
        check_sidecar(plan_path, RTX, onnx_path=graph).to_dict() == sidecar and sidecar["summary"] == result.to_dict()
    )
    assert sidecar["plan"] == {"bytes": result.bytes, "sha256": hash_file(plan_path)}
    assert sidecar["onnx"] == {"path": "model.fp16.onnx", "sha256": hash_file(graph)}
    assert (sidecar["backend"], sidecar["version"], sidecar["precision"]) == ("rtx", RTX.module.__version__, "fp16")
    assert sidecar["targets"] == ["sm75", "sm80", "sm86", "sm89", "sm120", "sm121"]
    assert sidecar["inputs"] == [{"name": "images", "dtype": "float32", "shape": [-1, TOKENS, WIDTH]}]
    assert sidecar["outputs"] == [{"name": "logits", "dtype": "float32", "shape": [-1, TOKENS, WIDTH]}]
    assert sidecar["profiles"] == [{"images": [[1, TOKENS, WIDTH], [4, TOKENS, WIDTH], [8, TOKENS, WIDTH]]}]
    assert sidecar["preprocessing"] == record
    assert (sidecar["options"]["workspace_gib"], sidecar["options"]["opt_level"], sidecar["options"]["tf32"]) == (
        0.5,
        2,
        False,
    )
    assert sidecar["build_seconds"] == result.build_seconds
    assert sidecar["model"] == {"sha256": "of model.onnx"} and "instead_of" not in sidecar


def test_external_weights_are_read_and_hashed(tmp_path):
    graph = quantized(tmp_path / "model.onnx")
    model = onnx.load(graph)
    onnx.save(model, graph, save_as_external_data=True, location="model.onnx.data", size_threshold=0)
    plan_path, _ = run(tmp_path, graph, "int8")
    assert json.loads(sidecar_path(plan_path).read_text())["onnx"]["data_sha256"] == hash_file(
        tmp_path / "model.onnx.data"
    )


def test_several_profiles_and_a_static_graph(tmp_path):
    fixed = {"images": ((8, TOKENS, WIDTH),) * 3}
    graph = block(tmp_path / "model.onnx")
    plan_path, _ = run(tmp_path, graph, "fp32", profiles=[PROFILE, fixed])
    assert len(json.loads(sidecar_path(plan_path).read_text())["profiles"]) == 2
    run(tmp_path, block(tmp_path / "static.onnx", batch=2), "fp32", profiles=[])


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({}, r"none given.*dynamic"),
        ({"pixels": PROFILE["images"]}, r"\['pixels'\]: the graph's inputs are \['images'\]"),
        (
            {"images": ((4, TOKENS, WIDTH), (1, TOKENS, WIDTH), (8, TOKENS, WIDTH))},
            r"images: \(4, 4, 8\) <= \(1, 4, 8\)",
        ),
        ({"images": ((1, 5, WIDTH), (4, 5, WIDTH), (8, 5, WIDTH))}, r"does not fit the graph's \(-1, 4, 8\)"),
        ({"images": ((1, WIDTH), (4, WIDTH), (8, WIDTH))}, r"does not fit the graph's \(-1, 4, 8\)"),
    ],
)
def test_profiles_that_do_not_fit_are_refused(tmp_path, shapes, message):
    with pytest.raises(BuildError, match=message):
        run(tmp_path, block(tmp_path / "model.onnx"), "fp32", profiles=[shapes] if shapes else [])
    assert_nothing_written(tmp_path)


def test_unknown_operator_names_its_node(tmp_path):
    nodes = [helper.make_node("Bogus", ["images"], ["logits"], name="block_03/bogus")]
    with pytest.raises(BuildError, match=r"model\.onnx: node block_03/bogus: .*Plugin not found"):
        run(tmp_path, save(tmp_path / "model.onnx", nodes, []), "fp32")
    assert RTX.logger.node_name() == "block_03/bogus"  # what TensorRT 8.6 has to rely on
    assert_nothing_written(tmp_path)


def test_layernorm_of_two_types_names_its_node(tmp_path):
    graph = block(tmp_path / "model.onnx", TensorProto.FLOAT16)
    model = onnx.load(graph)
    for initializer in model.graph.initializer:
        if initializer.name in ("scale", "bias"):
            initializer.CopyFrom(numpy_helper.from_array(np.ones(WIDTH, np.float32), initializer.name))
    onnx.save(model, graph)
    with pytest.raises(BuildError, match=r"node block_00/norm: ") as caught:
        run(tmp_path, graph, "fp16")
    assert "catchCudaError" not in str(caught.value)


def test_wrong_weight_shape_names_its_node(tmp_path):
    nodes = [helper.make_node("MatMul", ["images", "w"], ["logits"], name="block_00/linear")]
    graph = save(tmp_path / "model.onnx", nodes, [numpy_helper.from_array(weight()[:5], "w")])
    with pytest.raises(BuildError, match=r"node block_00/linear: .*must match"):
        run(tmp_path, graph, "fp32")


def test_damaged_and_missing_graphs(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"no protobuf")
    with pytest.raises(BuildError, match=r"model\.onnx: .*parse"):
        run(tmp_path, tmp_path / "model.onnx", "fp32")
    with pytest.raises(BuildError, match=r"nothing\.onnx: there is no such graph"):
        run(tmp_path, tmp_path / "nothing.onnx", "fp32")
    assert_nothing_written(tmp_path)


def test_builder_errors_carry_the_reason(tmp_path):
    # TensorRT-RTX has the flag, but not the lean runtime that such an engine embeds: the build itself fails.
    with pytest.raises(BuildError, match=r"model\.onnx as fp32: .*libnvinfer_lean") as caught:
        run(tmp_path, block(tmp_path / "model.onnx"), "fp32", version_compatible=True)
    assert "install libnvinfer_lean of this version, or leave engine.version_compatible off" in caught.value.fix
    assert_nothing_written(tmp_path)
    request = BuildRequest(tmp_path / "model.onnx", "fp32", [PROFILE], version_compatible=True)
    with pytest.raises(BuildError, match="libnvinfer_lean") as caught:  # as TensorRT itself would be told
        build_engine(
            dataclasses.replace(RTX, name="tensorrt"), request, tmp_path / "fp32.plan", progress=Progress(quiet=True)
        )
    assert (
        f"of this version (from tensorrt_lean=={RTX.version}, on LD_LIBRARY_PATH under the name above), or"
        in caught.value.fix
    )


def test_graph_that_changes_while_it_is_built(tmp_path, monkeypatch):
    graph, real = block(tmp_path / "model.onnx"), build.configure

    def configure_then_change(*arguments):
        found = real(*arguments)
        graph.write_bytes(graph.read_bytes() + b"\x00")
        return found

    monkeypatch.setattr(build, "configure", configure_then_change)
    with pytest.raises(BuildError, match=r"model\.onnx: was .* when its build began, and is another now"):
        run(tmp_path, graph, "fp32")


def test_attention_node_is_refused_rather_than_crashing(tmp_path):
    if cuda.gpu() is not None:
        pytest.skip("this machine has a GPU")
    nodes = [
        helper.make_node("Unsqueeze", ["images", "axis"], ["x"], name="heads"),
        helper.make_node("Attention", ["x", "x", "x"], ["a"], name="block_00/attention"),
        helper.make_node("Squeeze", ["a", "axis"], ["logits"], name="merge"),
    ]
    graph = save(tmp_path / "model.onnx", nodes, [numpy_helper.from_array(np.array([1]), "axis")], opset=23)
    with pytest.raises(BuildError, match=r"block_00/attention.*crashes on Attention"):
        run(tmp_path, graph, "fp32")


def test_opt_level_out_of_range_is_refused(tmp_path):
    with pytest.raises(BuildError, match="opt_level 9: the builder knows 0 to 5"):
        run(tmp_path, block(tmp_path / "model.onnx"), "fp32", opt_level=9)


def test_what_rtx_lacks_is_refused(tmp_path):
    graph = block(tmp_path / "model.onnx")
    with pytest.raises(BuildError, match=r"calibrator: tensorrt_rtx .* has none"):
        run(tmp_path, graph, "int8", calibrator=object())
    with pytest.raises(BuildError, match=r"'fp61'.*Did you mean fp16"):
        run(tmp_path, graph, "fp61")
    assert not RTX.weakly_typed and RTX.strongly_typed and not RTX.has_calibrator and not RTX.has_timing_cache
    assert RTX.has_progress_monitor and RTX.arch == "all"


def test_unwritable_plan_is_refused_before_the_build(tmp_path):
    (tmp_path / "engines").write_text("a file where the folder should be")
    with pytest.raises(BuildError, match=r"fp32\.plan: cannot be written"):
        run(tmp_path, block(tmp_path / "model.onnx"), "fp32")


def test_a_plan_in_folders_that_are_not_there_yet(tmp_path):
    plan = tmp_path / "far" / "away" / "fp32.plan"
    request = BuildRequest(block(tmp_path / "model.onnx"), "fp32", [PROFILE])
    build_engine(RTX, request, plan, progress=Progress(quiet=True))
    assert plan.is_file() and sidecar_path(plan).is_file()


def test_no_builder_says_why(tmp_path):
    """TensorRT's own bindings answer a driver that is too old with a TypeError about a null pointer."""

    def no_builder(logger):
        logger.errors.append("CUDA driver version is insufficient")
        raise TypeError("pybind11::init(): factory function returned nullptr")

    module = types.SimpleNamespace(__name__="tensorrt_rtx", Builder=no_builder)
    logger = types.SimpleNamespace(errors=[], warnings=[])
    backend = types.SimpleNamespace(module=module, version="1.7.1", logger=logger)
    with pytest.raises(BuildError, match=r"tensorrt_rtx 1\.7\.1: no builder \(CUDA driver version is insuff") as caught:
        build._make_builder(backend)
    assert caught.value.fix == "Check the driver with nvidia-smi."


def test_full_disk_leaves_nothing(tmp_path, monkeypatch):
    graph = block(tmp_path / "model.onnx")

    def full(self, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pathlib.Path, "write_bytes", full)
    with pytest.raises(UsageError, match=r"fp32\.plan: no space left"):
        run(tmp_path, graph, "fp32")
    assert_nothing_written(tmp_path)


class Recorder(Progress):
    """A Progress that keeps what it is told."""

    def __init__(self, interrupt_at=2.0):
        super().__init__(quiet=True)
        self.reached, self.num_advances, self.interrupt_at = 0.0, 0, interrupt_at

    def bar(self, label, total=None):
        recorder = self

        class Bar:
            def __enter__(self):
                return self.advance

            def __exit__(self, *_):
                return False

            def advance(self, amount):
                recorder.reached += amount
                recorder.num_advances += 1
                if recorder.reached > recorder.interrupt_at:
                    recorder.interrupt_at = 2.0  # once
                    raise KeyboardInterrupt

        assert total == 1.0
        return Bar()


def test_progress_runs_to_the_end(tmp_path):
    progress = Recorder()
    run(tmp_path, block(tmp_path / "model.onnx"), "fp32", progress)
    assert progress.reached == pytest.approx(1.0)


def test_interrupt_stops_the_build(tmp_path):
    graph = block(tmp_path / "model.onnx")
    interrupted, whole = Recorder(interrupt_at=0.3), Recorder()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, graph, "fp32", interrupted)
    assert_nothing_written(tmp_path)
    run(tmp_path, graph, "fp32", whole)  # the backend is as good as new
    assert interrupted.num_advances < whole.num_advances / 2  # the build stopped; it was not only reported as stopped


def test_layers_are_none_with_a_reason_without_a_gpu(tmp_path):
    if cuda.gpu() is not None:
        pytest.skip("this machine has a GPU")
    plan_path, result = run(tmp_path, block(tmp_path / "model.onnx"), "fp32")
    assert result.fused_attention is None and "this host has none" in result.fused_attention_unknown
    assert not plan_path.with_name("fp32.plan.layers.json").exists()


def test_a_graph_is_hashed_once_and_again_when_its_weights_change(tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(
        "vit_convert.engine.backend.graph_file.hash_file",
        lambda path: read.append(pathlib.Path(path).name) or hash_file(path),
    )
    graph, data, other = tmp_path / "model.onnx", tmp_path / "model.onnx.data", tmp_path / "other"
    graph.write_bytes(b"graph")
    data.write_bytes(b"weights 1")
    first = hash_graph(graph)
    assert hash_graph(graph) == first == {"sha256": hash_file(graph), "data_sha256": hash_file(data)}
    assert read == ["model.onnx", "model.onnx.data"]
    other.write_bytes(b"weights 2")
    os.replace(other, data)
    assert hash_graph(graph) == {**first, "data_sha256": hash_file(data)} != first


def test_what_is_built_is_said_where_tensorrt_reports_no_progress(gpu, tmp_path, capsys):
    fixed, span = ((8, 64, 64, 3),) * 3, ((1, 64, 64, 3), (4, 64, 64, 3), (8, 64, 64, 3))
    request = BuildRequest(tmp_path / "plugin.onnx", "fp16", profiles=[{"images": fixed}, {"images": span}])
    builder = types.SimpleNamespace(build_serialized_network=lambda network, builder_config: b"plan")
    build._serialize(ParsedGraph(gpu[0], "plugin.onnx", None), builder, None, request, Progress())
    expected = "building fp16 from plugin.onnx for images 8x64x64x3; images 1x64x64x3 - 4x64x64x3 - 8x64x64x3\n"
    assert capsys.readouterr().err == expected


def test_a_file_as_the_timings_folder_is_refused_before_the_build(gpu, tmp_path):
    (tmp_path / "timing").write_text("a file where the folder should be")
    request = BuildRequest(block(tmp_path / "model.onnx"), "fp32", profiles=[PROFILE], timing_cache=tmp_path / "timing")
    with pytest.raises(BuildError, match=r"timing-8\.6\.0-Simulated\.cache: cannot be written") as caught:
        build_engine(gpu[0], request, tmp_path / "fp32.plan", progress=Progress(quiet=True))
    assert "engine.timing_cache is a folder" in caught.value.fix
