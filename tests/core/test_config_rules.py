"""What a config means for the stages, and which of its keys may not stand together."""

import pytest

from vit_convert.core.chosen_lowering import int8_lowering, lowering, lowerings
from vit_convert.core.config import (
    check_values,
    is_dynamic,
    is_planned,
    precisions,
    quantized,
    require_dialect,
    require_resizable,
)
from vit_convert.core.defaults import default_config
from vit_convert.core.dialect import DIALECTS
from vit_convert.core.errors import UsageError


def config(**changes):
    found = default_config()
    found.name, found.checkpoint = "x", "a.npz"
    with found.ignore_type():
        found.update_from_flattened_dict(changes)
    return found


def refused(**changes) -> UsageError:
    with pytest.raises(UsageError) as error:
        check_values(config(**changes))
    return error.value


OWN = {"model": lambda: None, "checkpoint": ""}


def test_an_own_model_takes_one_size_and_no_checkpoint():
    check_values(config(**OWN, outputs="whatever", image_size="32"))
    assert "traced at one size" in str(refused(**OWN, image_size="dynamic:32..64"))
    check_values(config(image_size="dynamic:32..64"))
    for key, value in {"family": "vit", "variant": "B/16", "posemb_grid": (2, 2), "families": ("m:F",)}.items():
        error = refused(**OWN, **{key: value})
        assert f"config.model and config.{key}={value!r}" in str(error) and error.fix == f"Leave config.{key} out."
    error = refused(model=OWN["model"])
    assert "config.checkpoint='a.npz'" in str(error) and "read a.npz" in error.fix
    assert "config.outputs='whatever'" in str(refused(outputs="whatever"))
    # its outputs' names excuse nothing else
    assert "config.plan.type='fp16'" in str(refused(**OWN, outputs="whatever", **{"plan.type": "fp16"}))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"engine.calibrator": True, "input": "uint8"}, "engine.calibrator with input=uint8"),
        ({"engine.calibrator": True, "image_size": "dynamic:32..64"}, "image_size=dynamic:32..64"),
        ({"engine.calibrator": True, "calibration.method": "mse"}, "calibration.method=mse"),
        ({"engine.calibrator": True, "calibration.smooth": 0.5}, "engine.calibrator with calibration.smooth"),
        ({"engine.calibrator": True, "calibration.rotate": True}, "engine.calibrator with calibration.rotate"),
        ({"engine.int8_lowering": "fused", "engine.calibrator": True}, "engine.int8_lowering='fused'"),
        ({"engine.int8_lowering": "fused", "calibration.smooth": 0.5}, "engine.int8_lowering='fused'"),
        ({"engine.int8_lowering": "fused", "plan.file": "none.json"}, "engine.int8_lowering='fused'"),
        ({"engine.calibrator": True, "precision": "auto"}, "quantizes what it likes"),
        ({"plan.file": "none.json"}, "config.plan.file='none.json': no such file"),
        ({"target": "trt8", "precision": "fp8,bf16"}, "target trt8 has no bf16, fp8"),
        ({"plan.type": "fp16"}, "config.plan.type='fp16'"),
    ],
)
def test_what_may_not_stand_together(changes, words):
    assert words in str(refused(**changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"engine.calibrator": True},
        {"input": "uint8", "image_size": "dynamic:32..64"},
        {"calibration.method": "mse"},
        {"engine.int8_lowering": "fused", "precision": "int8"},
        {"engine.int8_lowering": "fused", "precision": "auto"},
        {"calibration.smooth": 0.5, "precision": "auto"},
        {"target": "trt10", "precision": "fp8,bf16"},
        {"precision": "fp8,bf16"},  # which TensorRT it is becomes known later
    ],
)
def test_what_may(changes):
    check_values(config(**changes))


def test_a_tensorrt_that_is_known_later_refuses_later():
    asked = config(precision="fp8")
    require_dialect(asked, None)
    require_dialect(asked, DIALECTS["rtx"])
    with pytest.raises(UsageError, match="target trt8 has no fp8"):
        require_dialect(asked, DIALECTS["trt8"])


@pytest.mark.parametrize(
    ("changes", "built", "needs", "planned"),
    [
        ({"precision": "fp32"}, ["fp32"], [], False),
        ({"precision": "auto"}, ["fp16", "int8"], ["int8"], True),
        ({"precision": "fp32, auto", "plan.type": "fp8"}, ["fp32", "fp16", "fp8"], ["fp8"], True),
        ({"precision": "fp8,int8"}, ["fp16", "int8", "fp8"], ["int8", "fp8"], False),
    ],
)
def test_what_is_built(changes, built, needs, planned):
    asked = config(**changes)
    assert (precisions(asked), quantized(asked), is_planned(asked)) == (built, needs, planned)


@pytest.mark.parametrize(
    ("changes", "chosen"),
    [
        ({}, "plugin"),  # what is advised
        ({"engine.lowering": ""}, ""),
        ({"engine.lowering": "matmul"}, "matmul"),
        ({"keep_fp32": ("head",)}, ""),
        ({"engine.version_compatible": True}, ""),
        ({"engine.hardware_compatible": True}, ""),
        ({"engine.lowering": "matmul", "keep_fp32": ("head",)}, "matmul"),
    ],
)
def test_the_lowering_that_engines_are_built_from(changes, chosen):
    asked = config(**changes)
    assert lowering(asked, "plugin") == chosen
    assert lowerings(asked, ("plugin",)) == ([chosen] if chosen else [])


def test_lowerings_are_written_once_and_in_order():
    asked = config(lowerings=("primitives", "matmul", "primitives"), precision="int8")
    assert lowerings(asked, ("matmul",)) == ["primitives", "matmul"]
    asked.engine.int8_lowering = "fused"
    assert lowerings(asked, ("plugin",)) == ["primitives", "matmul", "plugin", "fused"]
    assert int8_lowering(asked, DIALECTS["trt8"]) == "fused" and int8_lowering(asked, DIALECTS["rtx"]) == ""
    asked.precision = "fp16"
    assert lowerings(asked, ("plugin",)) == ["primitives", "matmul", "plugin"]
    assert int8_lowering(asked, DIALECTS["trt8"]) == ""


@pytest.mark.parametrize(
    ("changes", "chosen"),
    [
        ({}, "fused"),
        ({"precision": "fp16,int8"}, ""),  # asked for by name, INT8 is what it always was
        ({"plan.type": "fp8"}, ""),
        ({"engine.int8_lowering": ""}, ""),
        ({"engine.calibrator": True}, ""),
        ({"calibration.smooth": 0.5}, ""),
        ({"plan.file": "plan.json"}, ""),
        ({"keep_fp32": ("block_00",)}, ""),
        ({"engine.version_compatible": True}, ""),  # a plugin of ours belongs to one version and GPU
        ({"engine.hardware_compatible": True}, ""),
    ],
)
def test_the_lowering_that_a_plan_takes(changes, chosen):
    asked = config(**{"precision": "auto", **changes})
    assert int8_lowering(asked, DIALECTS["trt8"], "fused") == chosen
    assert int8_lowering(asked, DIALECTS["trt8"]) == int8_lowering(asked, DIALECTS["rtx"], "fused") == ""
    assert ("fused" in lowerings(asked, (), "fused")) is bool(chosen)


def test_a_range_of_sizes_needs_a_model_that_takes_one():
    ranged, fixed = config(image_size="dynamic:32..64"), config(image_size="32")
    assert is_dynamic(ranged) and not is_dynamic(fixed)
    require_resizable(ranged, "")
    require_resizable(fixed, "family mixer has one size")
    with pytest.raises(UsageError, match=r"config.image_size='dynamic:32..64': family mixer has one size"):
        require_resizable(ranged, "family mixer has one size")
