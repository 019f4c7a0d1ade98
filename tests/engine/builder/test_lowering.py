"""Which graph fp16 engines are built from: what the export advises, what is asked for by name, and what is left if that
fails to build."""

import dataclasses
import shutil

import pytest
import simulated_gpu
from reconverted import as_left

from vit_convert.core.bundle import Bundle
from vit_convert.core.engine_results import EngineSummary
from vit_convert.core.errors import BuildError, UnbuildableError
from vit_convert.core.progress import Progress
from vit_convert.engine import build_bundle
from vit_convert.engine.backend.graph_file import graph_hashes
from vit_convert.engine.handoff import read_config, read_facts
from vit_convert.engine.host import EngineHost


@pytest.fixture
def advised(bundle_path):
    """A bundle whose export advises the lowering that it holds."""
    bundle = Bundle(bundle_path)
    return bundle, read_config(bundle), dataclasses.replace(read_facts(bundle), lowering="matmul")


def host_of(bundle, config, facts):
    return EngineHost(None, bundle, config, facts, Progress(quiet=True))


@pytest.fixture
def build(gpu, advised, monkeypatch):
    """Builds fp16 and returns the graphs that were tried now; no lowering builds on this host. Building itself takes a
    GPU."""
    tried = []

    def build_engine(backend, request, plan, *, progress):
        tried.append(request.onnx_path.name)
        if tried[-1] != "model.onnx":
            raise UnbuildableError(f"{tried[-1]}: no such plugin.")
        simulated_gpu.write_plan(
            plan, request.onnx_path, [tuple(p["images"]) for p in request.profiles], precision=request.precision
        )
        summary = EngineSummary.from_dict({"build_seconds": 1.0})
        instead = {"instead_of": request.instead_of.to_dict()} if request.instead_of else {}
        simulated_gpu.change_sidecar(plan, **request.asked.to_dict(), summary=summary.to_dict(), **instead)
        return summary

    monkeypatch.setattr(build_bundle, "build_engine", build_engine)

    def start(config, facts, *, force=False):
        tried.clear()
        bundle, progress = advised[0], Progress(advised[0].events, quiet=True)
        host = EngineHost(gpu[0], bundle, config, facts, progress)
        build_bundle.build_bundle(host, precisions=["fp16"], force=force)
        return list(tried)

    return start


@pytest.mark.parametrize(
    ("asked", "keep_fp32", "expected"),
    [
        ("auto", (), "matmul.onnx"),
        ("auto", ("block_00",), "model.onnx"),  # a plugin is fp16 in every block
        ("", (), "model.onnx"),
        ("matmul", ("block_00",), "matmul.onnx"),
    ],
)
def test_graph_of_a_request(advised, asked, keep_fp32, expected):
    bundle, config, facts = advised
    config.engine.lowering, config.keep_fp32 = asked, keep_fp32
    assert build_bundle.request_for(host_of(bundle, config, facts), "fp16").onnx_path.name == expected
    assert build_bundle.request_for(host_of(bundle, config, facts), "fp32").onnx_path.name == "model.onnx"


@pytest.mark.parametrize("option", ["version_compatible", "hardware_compatible"])
def test_engine_that_is_to_run_elsewhere_is_built_from_model_onnx(advised, option):
    bundle, config, facts = advised
    config.engine[option] = True
    assert build_bundle.request_for(host_of(bundle, config, facts), "fp16").onnx_path.name == "model.onnx"
    config.engine.lowering = "matmul"
    assert (
        build_bundle.request_for(host_of(bundle, config, facts), "fp16").onnx_path.name == "matmul.onnx"
    )  # asked for by name


def test_an_engine_says_which_model_its_graph_was_made_from(advised):
    """By the conversion's record: model.onnx itself need not be on the GPU host."""
    bundle, config, facts = advised
    expected = graph_hashes(bundle.onnx())
    bundle.onnx().unlink()
    assert build_bundle.request_for(host_of(bundle, config, facts), "fp16").model == expected


def test_advised_lowering_that_does_not_build_gives_way_and_says_so(advised, build):
    bundle, config, facts = advised
    assert build(config, facts) == ["matmul.onnx", "model.onnx"]
    assert "matmul.onnx: no such plugin; fp16 is built from model.onnx instead" in bundle.events.read_text()


def test_what_needs_our_kernels_gives_way_to_the_attention_plugin_before_model_onnx(advised, build):
    """A hybrid's GroupNorms by our kernels, where the host has none: TensorRT's own plugin is still the faster one."""
    bundle, config, facts = advised
    without = facts.files.records
    plugin = shutil.copy(bundle.lowering("matmul"), bundle.lowering("plugin"))
    record = without["lowerings/matmul.onnx"]
    facts = dataclasses.replace(
        facts, files=dataclasses.replace(facts.files, records={**without, "lowerings/plugin.onnx": record})
    )
    assert build(config, facts) == ["matmul.onnx", "plugin.onnx", "model.onnx"]
    said = bundle.events.read_text()
    assert "matmul.onnx: no such plugin; fp16 is built from plugin.onnx instead" in said
    assert "plugin.onnx: no such plugin; fp16 is built from model.onnx instead" in said
    assert build(config, facts) == []
    reason = "matmul.onnx: no such plugin; plugin.onnx: no such plugin; fp16 was built from model.onnx instead"
    assert reason in bundle.events.read_text()
    plugin.unlink()
    facts = dataclasses.replace(facts, files=dataclasses.replace(facts.files, records=without))
    assert build(config, facts, force=True) == ["matmul.onnx", "model.onnx"]  # as a bundle without it


def test_lowering_that_did_not_build_is_not_tried_again_unless_forced(advised, build):
    bundle, config, facts = advised
    assert build(config, facts) == ["matmul.onnx", "model.onnx"]
    bundle.events.unlink()
    assert build(config, facts) == []
    assert (
        "matmul.onnx: no such plugin; fp16 was built from model.onnx instead, --force tries again"
        in bundle.events.read_text()
    )
    assert build(config, facts, force=True) == ["matmul.onnx", "model.onnx"]
    assert build(config, facts) == []


def test_lowering_is_tried_again_once_the_request_differs(advised, build):
    bundle, config, facts = advised
    build(config, facts)
    config.engine.opt_level = 1
    assert build(config, facts) == ["matmul.onnx", "model.onnx"]
    graph = bundle.lowering("matmul")
    graph.write_bytes(graph.read_bytes() + b"\0")
    as_left(bundle.root, "lowerings/matmul.onnx")
    facts = dataclasses.replace(facts, files=read_facts(bundle).files)
    assert build(config, facts) == ["matmul.onnx"]  # model.onnx is as it was, and so is its engine
    assert build(config, facts) == []


def test_engine_of_another_gpu_is_built_again(gpu, advised, build):
    bundle, config, facts = advised
    facts = dataclasses.replace(facts, lowering="")
    assert build(config, facts) == ["model.onnx"] and build(config, facts) == []
    plan = bundle.plan(gpu[0].name, gpu[0].version, gpu[0].arch, "fp16")
    simulated_gpu.change_sidecar(plan, gpu={"name": "another of the same architecture"})
    assert build(config, facts) == ["model.onnx"]


def test_lowering_asked_for_by_name_does_not_give_way(advised, build):
    _, config, facts = advised
    config.engine.lowering = "matmul"
    with pytest.raises(BuildError, match="no such plugin"):
        build(config, facts)


def test_what_is_wrong_with_the_host_is_no_reason_to_give_way(advised, build, monkeypatch):
    _, config, facts = advised
    monkeypatch.setattr(
        build_bundle, "build_engine", lambda *args, **kwargs: (_ for _ in ()).throw(BuildError("no builder"))
    )
    with pytest.raises(BuildError, match="no builder"):
        build(config, facts)


def test_failure_of_model_onnx_is_a_failure(advised, build, monkeypatch):
    _, config, facts = advised
    monkeypatch.setattr(
        build_bundle, "build_engine", lambda *args, **kwargs: (_ for _ in ()).throw(BuildError("no memory"))
    )
    with pytest.raises(BuildError, match="no memory"):
        build(config, dataclasses.replace(facts, lowering=""))
