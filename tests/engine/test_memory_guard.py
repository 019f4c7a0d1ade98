"""A build by a preset is refused where it would not fit, and says why an accelerator beside the GPU stays idle."""

import dataclasses

import pytest

from vit_convert.core.bundle import Bundle
from vit_convert.core.errors import BuildError, UsageError
from vit_convert.core.progress import Progress
from vit_convert.engine import memory_guard
from vit_convert.engine.build_bundle import request_for
from vit_convert.engine.handoff import read_config, read_facts
from vit_convert.engine.host import EngineHost
from vit_convert.engine.inspection.dla import dla_refusals
from vit_convert.engine.inspection.onnx_wire import read_graph


@pytest.fixture
def guarded(gpu, bundle_path, monkeypatch):
    """Runs the guard for a preset on a GPU of some arch with so much free memory; returns what was said."""

    def run(preset, arch, free):
        bundle, said = Bundle(bundle_path), []
        config, facts = read_config(bundle), read_facts(bundle)
        config.engine.preset = preset
        backend = dataclasses.replace(gpu[0], gpu=dataclasses.replace(gpu[0].gpu, arch=arch))
        monkeypatch.setattr(memory_guard.cuda, "free_memory_bytes", lambda: free)
        progress = Progress(quiet=True)
        monkeypatch.setattr(progress, "say", said.append)
        host = EngineHost(backend, bundle, config, facts, progress)
        memory_guard.guard(host, request_for(host, "fp32"))
        return said

    return run


def test_enough_memory(guarded):
    assert guarded("h100", "sm90", 1 << 30) == []
    assert guarded("", "sm90", 0) == []  # without a preset nothing is looked at


def test_too_little_memory(guarded):
    with pytest.raises(
        BuildError, match=r"fp32 at batch 8 needs up to .* \(weights .*, values .*\), free are 1\.0 KiB"
    ):
        guarded("h100", "sm90", 1024)
    with pytest.raises(BuildError, match="building"):  # the host's memory is the same there
        guarded("jetson_orin", "sm87", 1024)


def test_another_gpu(guarded):
    with pytest.raises(UsageError, match="is for sm87, here is sm90"):
        guarded("jetson_orin", "sm90", 1 << 30)


def test_a_transformer_is_not_for_a_dla(guarded, bundle_path):
    (said,) = guarded("jetson_orin", "sm87", 1 << 30)
    assert said.startswith("DLA: not used: it has no layer for ") and "MatMul" in said and "LayerNormalization" in said
    graph = read_graph(bundle_path / "model.onnx")
    products = sum(node.op == "MatMul" for node in graph.nodes)
    assert f"{products} MatMul" in dla_refusals(graph)
    assert dla_refusals(dataclasses.replace(graph, nodes=[n for n in graph.nodes if n.op in ("Conv", "Add")])) == ""
