"""What a build by a preset is held to need, from figures of a graph that a test says: weights, values, and the host's
memory where it is the GPU's too."""

import types

import pytest

from vit_convert.core.errors import BuildError
from vit_convert.core.image_size import ImageRange
from vit_convert.engine import memory_guard
from vit_convert.engine.inspection.estimate import Memory

MEMORY = Memory(weights=1000, activations=200, largest=100, largest_name="a", building=4000)


@pytest.fixture
def archs():
    """What the preset was held against."""
    return []


@pytest.fixture
def guard(monkeypatch, archs):
    """Runs the guard with so much memory free; returns what the estimate was asked for."""

    def guard(free, precision="fp16", *, preset="h100", by_flag=True, size=(48, 32), gpu="one"):
        asked = []
        archs.clear()

        def estimate(graph, sizes, *, half):
            asked.append((graph, sizes, half))
            return MEMORY

        monkeypatch.setattr(memory_guard, "estimate", estimate)
        monkeypatch.setattr(memory_guard, "read_graph", lambda path: path)
        monkeypatch.setattr(memory_guard, "require_arch", lambda *arguments: archs.append(arguments[1:]))
        monkeypatch.setattr(memory_guard, "dla_refusals", lambda graph: "")
        monkeypatch.setattr(memory_guard.cuda, "free_memory_bytes", lambda: free)
        said = []
        config = types.SimpleNamespace(engine=types.SimpleNamespace(preset=preset), batch=types.SimpleNamespace(max=64))
        facts = types.SimpleNamespace(image_size=size, dialect=types.SimpleNamespace(precision_by_flag=by_flag))
        backend = types.SimpleNamespace(gpu=gpu and types.SimpleNamespace(arch="sm90", name="GPU"))
        host = types.SimpleNamespace(
            backend=backend, config=config, facts=facts, progress=types.SimpleNamespace(say=said.append)
        )
        memory_guard.guard(host, types.SimpleNamespace(onnx_path="m.onnx", precision=precision))
        return asked, said

    return guard


@pytest.mark.parametrize(("preset", "needed"), [("h100", 1200), ("jetson_orin", 5200)])
def test_what_has_to_be_free(guard, preset, needed):
    """On a Jetson the host that builds shares the GPU's memory."""
    guard(needed, preset=preset)  # just enough
    with pytest.raises(BuildError) as caught:
        guard(needed - 1, preset=preset)
    assert ("building" in str(caught.value)) is (preset == "jetson_orin")
    assert str(caught.value).startswith("fp16 at batch 64 needs up to ")


@pytest.mark.parametrize(
    ("precision", "by_flag", "half"),
    [("fp16", True, True), ("fp16", False, False), ("fp32", True, False), ("int8", True, False), ("bf16", True, False)],
)
def test_a_flag_halves_a_graph_that_is_written_in_fp32(guard, precision, by_flag, half):
    (asked,), _ = guard(1200, precision, by_flag=by_flag)
    assert asked == ("m.onnx", {"batch": 64, "height": 48, "width": 32}, half)


def test_the_largest_images_of_a_range(guard):
    ((_, sizes, _),), _ = guard(1200, size=ImageRange((16, 16), (32, 32), (64, 96)))
    assert sizes == {"batch": 64, "height": 64, "width": 96}


def test_the_preset_is_of_this_gpu(guard, archs):
    guard(1200)
    assert archs == [("sm90", "GPU")]
    guard(0, preset="")
    assert archs == []


def test_nothing_is_looked_at_without_a_preset_or_a_gpu(guard):
    assert guard(0, preset="") == guard(0, gpu=None) == ([], [])


def test_an_accelerator_that_stays_idle_is_said(guard):
    assert guard(5200, preset="jetson_orin")[1] == ["DLA: not used: a build of ours is for the GPU"]
    assert guard(1200)[1] == []
