"""What onnxruntime sessions run on."""

import types

import pytest

from vit_convert.core.errors import UsageError
from vit_convert.core.ort_options import device_of, providers_for, session_options

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"


def onnxruntime_with(*providers):
    loaded = []
    return types.SimpleNamespace(
        __version__="1.99",
        get_available_providers=lambda: list(providers),
        preload_dlls=lambda: loaded.append(True),
        loaded=loaded,
    )


@pytest.mark.parametrize(
    ("device", "available", "names"),
    [
        ("cpu", (CUDA, CPU), [CPU]),
        ("cuda", (CUDA, CPU), [CUDA, CPU]),
        ("auto", (CUDA, CPU), [CUDA, CPU]),
        ("auto", (CPU,), [CPU]),
        ("auto", ("TensorrtExecutionProvider", CPU), [CPU]),  # it would build engines
        ("cpu", (CPU,), [CPU]),
    ],
)
def test_providers_of_a_device(device, available, names):
    onnxruntime = onnxruntime_with(*available)
    found = providers_for(onnxruntime, device)
    assert [name for name, _ in found] == names
    assert bool(onnxruntime.loaded) == (CUDA in names)
    assert all(options == ({"use_tf32": "0"} if name == CUDA else {}) for name, options in found)


def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(UsageError, match=rf"device cuda: onnxruntime 1\.99 has no {CUDA}") as caught:
        providers_for(onnxruntime_with(CPU), "cuda")
    assert "onnxruntime-gpu" in caught.value.fix


def test_where_a_session_runs():
    """A provider that did not load is not in the session's list."""
    assert device_of(types.SimpleNamespace(get_providers=lambda: [CUDA, CPU])) == "cuda"
    assert device_of(types.SimpleNamespace(get_providers=lambda: [CPU])) == "cpu"


def test_what_makes_a_graph_compute_the_same_everywhere():
    """By the keys of onnxruntime_session_options_config_keys.h; what they do is in tests/quantize."""
    import onnxruntime

    found = session_options(onnxruntime)
    entries = ("session.disable_quant_qdq", "optimization.disable_specified_optimizers")
    assert [found.get_session_config_entry(key) for key in entries] == ["1", "ReluQuantRewrite;ClipQuantRewrite"]
    assert found.log_severity_level == 3  # errors: what it warns of is of no use to a user
    assert session_options(onnxruntime) is not found  # callers change theirs
