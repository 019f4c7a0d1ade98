"""What each TensorRT can do, told from the names that its bindings have, and which one is loaded."""

import importlib
import json
import pathlib
import types

import pytest

from vit_convert.core.errors import BuildError
from vit_convert.engine.backend import cuda, trt
from vit_convert.engine.backend.trt import Backend, load_backend

NAMES = pathlib.Path(__file__).parent / "trt_names"
H200 = cuda.Gpu("NVIDIA H200", "sm90", 1 << 37, "580.1", "13.0")


def module_of(version):
    """A module with the names of one TensorRT; members of enums are numbers from 3."""
    listed = json.loads((NAMES / f"{version}.json").read_text())["names"]
    found = types.ModuleType("tensorrt_rtx" if version == "rtx" else "tensorrt")
    for name, members in listed.items():
        values = {member: number for number, member in enumerate(members.split(), 3)}
        setattr(found, name, types.SimpleNamespace(__members__=values, **values))
    return found


def backend(version, gpu=H200):
    return Backend("rtx" if version == "rtx" else "tensorrt", "1.2.3", module_of(version), gpu, None)


# NVIDIA's release notes: 10 has both ways of typing, 11 and RTX types alone; calibrators ended with 10; 8.6's parser
# reads neither BF16 nor FP8.
CAN = {
    "8.6": ("trt8", {"weakly_typed", "has_calibrator", "has_timing_cache"}, {"fp32", "fp16", "int8"}),
    "10": (
        "trt10",
        {"weakly_typed", "strongly_typed", "has_calibrator", "has_timing_cache"},
        {"fp32", "fp16", "bf16", "int8", "fp8"},
    ),
    "11": ("trt11", {"strongly_typed", "has_timing_cache"}, {"fp32", "fp16", "bf16", "int8", "fp8"}),
    "rtx": ("rtx", {"strongly_typed"}, {"fp32", "fp16", "bf16", "int8", "fp8"}),
}


@pytest.mark.parametrize("version", CAN)
def test_what_each_can_do(version):
    found, (dialect, able, precisions) = backend(version), CAN[version]
    asked = ("weakly_typed", "strongly_typed", "has_calibrator", "has_timing_cache")
    assert {name for name in asked if getattr(found, name)} == able and found.dialect.name == dialect
    assert {name for name in ("fp32", "fp16", "bf16", "int8", "fp8", "int4", "") if found.supports(name)} == precisions
    assert found.has_progress_monitor == ("IProgressMonitor" in vars(found.module))


def test_bf16_takes_the_type_and_a_network_that_keeps_it():
    found = backend("10")
    assert found.supports("bf16")
    del found.module.DataType.BF16
    assert not found.supports("bf16")  # no such type
    found = backend("8.6")
    found.module.DataType.BF16 = 9
    assert not found.supports("bf16")  # no such network


@pytest.mark.parametrize(
    ("version", "typed", "flag"), [("8.6", False, "EXPLICIT_BATCH"), ("10", True, "STRONGLY_TYPED")]
)
def test_a_network_is_asked_for_by_a_bit(version, typed, flag):
    found = backend(version)
    number = getattr(found.module.NetworkDefinitionCreationFlag, flag)
    assert number > 1 and found.network_flags(strongly_typed=typed) == 2**number


def test_where_there_is_no_such_flag_none_is_set():
    assert backend("11").network_flags(strongly_typed=False) == 0  # batches are explicit there
    with pytest.raises(KeyError, match=r"BuilderFlag\.SOME"):
        backend("11").find("BuilderFlag.SOME")
    assert backend("8.6").find("LayerType.ATTENTION_INPUT") is None  # the enum is there, the member is not


def test_the_gpus_that_an_engine_runs_on():
    found = backend("10")
    assert (found.targets, found.arch) == (["sm90"], "sm90")
    assert backend("10", gpu=None).targets == []
    rtx = backend("rtx")
    members = {"SM120": 1, "SM75": 2, "SM100": 3, "CURRENT": 4, "SM89": 5, "NONE": 6}
    rtx.module.ComputeCapability = types.SimpleNamespace(__members__=members)
    assert rtx.targets == ["sm75", "sm89", "sm100", "sm120"] and rtx.arch == "all"  # by their numbers


@pytest.fixture
def there(monkeypatch):
    """Says what is installed, and on which GPU; returns what was loaded."""

    def there(gpu=None, rtx_for=("sm89",), **installed):
        def load(name):
            if name not in installed:
                raise BuildError(f"{name}: cannot be imported")
            found = backend(installed[name], gpu)
            if name == "rtx":
                members = {arch.upper(): 1 for arch in rtx_for}
                found.module.ComputeCapability = types.SimpleNamespace(__members__=members)
            return found

        monkeypatch.setattr(trt, "_load", load)

    return there


def test_auto_prefers_tensorrt(there):
    there(gpu=H200, tensorrt="10", rtx="rtx")
    assert [load_backend(name).name for name in ("auto", "tensorrt", "rtx")] == ["tensorrt", "tensorrt", "rtx"]
    assert load_backend().name == load_backend("auto", for_this_gpu=True).name == "tensorrt"


def test_auto_takes_what_is_there(there):
    there(rtx="rtx")
    assert load_backend().name == load_backend(for_this_gpu=True).name == "rtx"  # without a GPU it builds for others
    with pytest.raises(BuildError, match="tensorrt: cannot be imported"):
        load_backend("tensorrt")


def test_one_that_builds_for_other_gpus_only(there):
    there(gpu=H200, rtx="rtx", rtx_for=("sm75", "sm89"))
    assert load_backend().name == "rtx"
    with pytest.raises(BuildError) as caught:
        load_backend(for_this_gpu=True)
    assert str(caught.value).startswith(
        "no TensorRT can build here: tensorrt: cannot be imported; rtx 1.2.3: builds for sm75, sm89, here is sm90"
    )
    there(gpu=H200, rtx="rtx", rtx_for=("sm89", "sm90"))
    assert load_backend(for_this_gpu=True).name == "rtx"


def test_nothing_is_there(there):
    there()
    with pytest.raises(BuildError, match="tensorrt: cannot be imported; rtx: cannot be imported") as caught:
        load_backend()
    assert "pip install tensorrt-rtx" in caught.value.fix


@pytest.fixture
def loaded(monkeypatch):
    """Loads what this says is installed, and keeps nothing of it: TensorRT keeps the first logger that it gets."""

    def loaded(name, gpu, version=None, error=None):
        made = []

        def load(asked):
            made.append(asked)
            if error is not None:
                raise error
            module = module_of(version)
            module.__version__, module.ILogger = "9.8.7", type("ILogger", (), {"__init__": lambda self: None})
            module.init_libnvinfer_plugins = lambda logger, namespace: made.append(("plugins", namespace))
            return module

        monkeypatch.setattr(importlib, "import_module", load)
        monkeypatch.setattr(cuda, "gpu", lambda: gpu)
        monkeypatch.setattr(trt.kernels, "register", lambda: made.append("kernels"))
        return trt._load.__wrapped__(name), made

    return loaded


def test_plugins_are_for_tensorrt_8(loaded):
    found, made = loaded("tensorrt", H200, "8.6")
    assert made == ["tensorrt", ("plugins", ""), "kernels"]
    assert (found.name, found.version, found.gpu, found.dialect.name) == ("tensorrt", "9.8.7", H200, "trt8")


@pytest.mark.parametrize(
    ("name", "version", "gpu"), [("tensorrt", "10", H200), ("rtx", "rtx", None), ("rtx", "rtx", H200)]
)
def test_later_ones_have_none(loaded, name, version, gpu):
    found, made = loaded(name, gpu, version)
    assert made == ["tensorrt_rtx" if name == "rtx" else "tensorrt"] and found.gpu is gpu


@pytest.mark.parametrize("error", [ImportError("no module"), OSError("libnvinfer.so.8: no such file")])
def test_one_that_cannot_be_imported(loaded, error):
    with pytest.raises(BuildError, match=f"tensorrt_rtx: cannot be imported \\({error}\\)") as caught:
        loaded("rtx", None, error=error)
    assert caught.value.fix == "pip install tensorrt-rtx."


def test_tensorrt_without_a_gpu_and_a_name_that_is_none(loaded):
    with pytest.raises(BuildError, match="this host has no GPU"):
        loaded("tensorrt", None, "10")
    with pytest.raises(BuildError, match="'openvino': unknown") as caught:
        loaded("openvino", H200, "10")
    assert caught.value.fix == "Use auto, tensorrt or rtx."


def test_one_backend_a_process():
    pytest.importorskip("tensorrt_rtx")
    assert load_backend("rtx") is load_backend("rtx")
