"""The library of our own kernels: how it is built and found, and what an int8 engine of the graph that needs it is
built from."""

import dataclasses
import pathlib
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor

import pytest

from vit_convert import kernels
from vit_convert.core import chosen_lowering
from vit_convert.core import config as configs
from vit_convert.core.bundle import Bundle, write_json
from vit_convert.core.dialect import DIALECTS
from vit_convert.core.errors import BuildError, UnbuildableError, UsageError
from vit_convert.engine.build_bundle import _ranges, graph_for
from vit_convert.engine.builder import build
from vit_convert.engine.builder.network import ParsedGraph
from vit_convert.engine.builder.precision import set_ranges
from vit_convert.engine.builder.request import BuildRequest


class Tensor:
    def __init__(self, name):
        self.name, self.range = name, None

    def set_dynamic_range(self, low, high):
        self.range = low, high


class Definition:
    """What `set_ranges` asks of TensorRT's network: layers of one output each."""

    def __init__(self, *names):
        self.tensors = [Tensor(name) for name in names]
        self.num_layers = len(names)

    def get_layer(self, i):
        return types.SimpleNamespace(num_outputs=1, get_output=lambda _: self.tensors[i])


def test_ranges_go_to_their_tensors_alone():
    network = Definition("a", "b", "c")
    set_ranges(ParsedGraph(None, "fused.onnx", network), {"c": 2.0, "a": 0.5})
    assert [tensor.range for tensor in network.tensors] == [(-0.5, 0.5), None, (-2.0, 2.0)]


def test_range_of_an_unknown_tensor_is_refused():
    with pytest.raises(BuildError, match=r"fused.onnx: has no tensor d, for which there is a range"):
        set_ranges(ParsedGraph(None, "fused.onnx", Definition("a")), {"a": 1.0, "d": 1.0})


def test_ranges_are_part_of_what_an_engine_is_known_by(tmp_path):
    (tmp_path / "fused.onnx").write_bytes(b"")
    plain = BuildRequest(tmp_path / "fused.onnx", "int8")
    records = [dataclasses.replace(plain, ranges=ranges).asked for ranges in ({}, {"a": 1.0}, {"a": 2.0})]
    assert records[0] == plain.asked and records[1] != records[2] != records[0]


def test_int8_is_built_from_what_calibration_wrote(tmp_path):
    bundle = Bundle(tmp_path)
    assert graph_for(bundle, "int8", DIALECTS["trt8"], int8_lowering="fused") == bundle.lowering("fused.int8")
    assert graph_for(bundle, "int8", DIALECTS["trt8"]) == bundle.onnx("int8")
    assert graph_for(bundle, "fp16", DIALECTS["trt8"], int8_lowering="fused") == bundle.onnx()


def test_lowering_is_written_where_int8_is_asked_for():
    config = configs.default_config()
    with config.unlocked():
        config.engine.int8_lowering = "fused"
    assert chosen_lowering.lowerings(config, ()) == []
    config.precision = "fp16,int8"
    assert chosen_lowering.lowerings(config, ("plugin",)) == ["plugin", "fused"]
    assert chosen_lowering.lowerings(config, ("groupnorm", "plugin")) == ["groupnorm", "plugin", "fused"]
    config.keep_fp32 = ("block_00",)  # a plugin is fp16 everywhere
    assert chosen_lowering.lowerings(config, ("groupnorm", "plugin")) == ["fused"]


def test_a_graph_for_our_kernels_is_one_that_cannot_be_built_where_there_are_none(tmp_path, monkeypatch):
    """Another lowering may, so an advised one gives way: it ended the build."""
    path = tmp_path / "groupnorm.onnx"
    path.write_bytes(b"VitGroupNorm")
    monkeypatch.setenv(kernels.ENVIRONMENT, str(tmp_path / "none.so"))
    kernels.register_once.cache_clear()
    request = BuildRequest(onnx_path=path, precision="fp16", profiles=())
    backend = types.SimpleNamespace(name="tensorrt")
    monkeypatch.setattr(build, "require_precision", lambda backend, request: None)
    monkeypatch.setattr(kernels, "needed_by", lambda path: True)
    with pytest.raises(UnbuildableError, match=r"groupnorm\.onnx: needs the library of our kernels"):
        build._require_buildable(backend, request)
    kernels.register_once.cache_clear()


@pytest.mark.parametrize(
    "key, value", [("engine.calibrator", True), ("calibration.smooth", 0.5), ("plan.file", "plan.json")]
)
def test_what_the_lowering_cannot_do_is_refused(key, value):
    config = configs.default_config()
    config.checkpoint, config.name = "x.npz", "x"
    config.update_from_flattened_dict({"engine.int8_lowering": "fused", key: value})
    with pytest.raises(UsageError, match=r"engine\.int8_lowering='fused'"):
        configs.check_values(config)


def test_without_a_library_there_are_no_kernels(tmp_path, monkeypatch):
    monkeypatch.setenv(kernels.ENVIRONMENT, str(tmp_path / "none.so"))
    kernels.register_once.cache_clear()
    assert not kernels.register()


@pytest.mark.parametrize(
    "name, needed",
    [
        ("VitAttention", True),
        ("VitWindowAttention", True),
        ("VitNorm", True),
        ("VitAddNorm", True),
        ("VitGroupNorm", True),
        ("VitAddGroupNorm", True),
        ("VitTwoGroupNorms", True),
        ("GroupNormalization", False),
        ("LayerNormalization", False),
    ],
)
def test_graph_says_whether_it_needs_the_library(tmp_path, name, needed):
    # a node's operator, as protobuf
    (tmp_path / "graph.onnx").write_bytes(b"\x08\x08\x3a\x20\x0a\x10\x22" + name.encode() + b"\x12\x05")
    assert kernels.needed_by(tmp_path / "graph.onnx") == needed


def test_library_that_cannot_be_loaded_is_named(tmp_path, monkeypatch):
    path = tmp_path / "broken.so"
    path.write_bytes(b"no library")
    monkeypatch.setenv(kernels.ENVIRONMENT, str(path))
    kernels.register_once.cache_clear()
    try:
        with pytest.raises(BuildError, match=r"broken.so: cannot be loaded"):
            kernels.register()
    finally:
        kernels.register_once.cache_clear()


def test_threads_register_the_plugins_once(tmp_path, monkeypatch):
    """TensorRT's registry refuses a name that it has, so that the second of two sessions found no engine."""
    (tmp_path / "lib.so").write_bytes(b"")
    monkeypatch.setenv(kernels.ENVIRONMENT, str(tmp_path / "lib.so"))
    calls, both = [], threading.Barrier(4, timeout=30)

    def vit_register():
        calls.append(1)
        time.sleep(0.05)  # until the others have come
        return len(calls) - 1

    monkeypatch.setattr(kernels.ctypes, "CDLL", lambda path: types.SimpleNamespace(vit_register=vit_register))
    kernels.register_once.cache_clear()
    try:
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda _: (both.wait(), kernels.register())[1], range(4)))
    finally:
        kernels.register_once.cache_clear()
    assert found == [True] * 4 and len(calls) == 1


def test_compiler_gets_all_sources_and_architectures(tmp_path):
    words = kernels.command(tmp_path / "lib.so", include="/trt", archs=["80", "90"], nvcc="nvcc")
    assert words[0] == "nvcc" and "-I/trt" in words and words[-2:] == ["-o", str(tmp_path / "lib.so")]
    assert [word for word in words if word.startswith("-gencode")] == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90,code=sm_90",
    ]
    assert all(
        (kernels.SOURCES / name).is_file()
        for name in ("attend.cuh", "pack.cuh", "encoder.h", *(pathlib.Path(word).name for word in words[-9:-2]))
    )


def test_ranges_that_calibration_left(tmp_path):
    bundle = Bundle(tmp_path)
    path = bundle.ranges("fused")
    path.parent.mkdir(parents=True, exist_ok=True)
    for content in (None, {}, {"thresholds": {}}):
        if content is not None:
            write_json(path, content)
        with pytest.raises(BuildError, match=f"{path.name}: no ranges for int8") as caught:
            _ranges(bundle, "fused")
        assert "--config.engine.int8_lowering=fused" in caught.value.fix
    write_json(path, {"thresholds": {"a": 2.5, "dead": 0.0}})
    assert _ranges(bundle, "fused") == {"a": 2.5, "dead": 1.0}  # a scale of 0 would divide by it
