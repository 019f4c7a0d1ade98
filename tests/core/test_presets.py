"""Presets fill in what a config leaves at its defaults, once and for all, and refuse what a GPU cannot do."""

import numpy as np
import pytest

from vit_convert.core.config import check_values, complete
from vit_convert.core.defaults import default_config
from vit_convert.core.errors import UsageError
from vit_convert.core.presets import PRESETS, apply_preset, require_arch


def made(preset, **changes):
    config = default_config()
    config.checkpoint, config.engine.preset, config.name = "x.npz", preset, "x"
    for key, value in changes.items():
        config[key].update(value) if isinstance(value, dict) else config.__setitem__(key, value)
    check_values(config)
    return config


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_config(name):
    config, preset = made(name), PRESETS[name]
    assert config.batch.to_dict() == preset.batch and config.engine.workspace_gib == preset.workspace_gib
    assert config.benchmark.batches == preset.batches and max(preset.batches) <= config.batch.max
    again = complete(config, "x")  # what a GPU host reads from config.json
    assert again.to_dict() == config.to_dict()


def test_what_is_set_stays():
    config = made("jetson_orin", batch={"min": 1, "opt": 2, "max": 4, "profiles": ()}, benchmark={"batches": (1, 4)})
    assert config.batch.max == 4 and config.benchmark.batches == (1, 4) and config.engine.workspace_gib == 1.0
    assert made("rtx").engine.backend == "rtx" and made("rtx", engine={"backend": "none"}).engine.backend == "none"


def test_without_a_preset_nothing_changes():
    config = default_config()
    apply_preset(config)
    assert config.to_dict() == default_config().to_dict()


@pytest.mark.parametrize(
    ("name", "precision"), [("t4", "bf16"), ("t4", "fp16,fp8"), ("a100", "fp8"), ("jetson_orin", "fp8")]
)
def test_precisions_without_arithmetic(name, precision):
    with pytest.raises(UsageError, match=rf"preset={name} with config.precision=.*: {name} has no (bf16|fp8)"):
        made(name, precision=precision)
    made("h100", precision=precision)


def test_mistyped():
    with pytest.raises(
        UsageError, match=r"config.engine.preset='jetson_orion': not one of .* Did you mean jetson_orin"
    ):
        made("jetson_orion")


def test_another_gpu_is_refused():
    require_arch(made("h100"), "sm90", "H200")
    require_arch(made(""), "sm90", "H200")
    with pytest.raises(UsageError, match=r"preset=jetson_orin: is for sm87, here is sm90 \(H200\)"):
        require_arch(made("jetson_orin"), "sm90", "H200")


# Compute capability and smallest memory in GiB by NVIDIA's tables; FP8 arithmetic since 8.9, BF16 since 8.0.
KNOWN = {
    "jetson_orin": ("8.7", 4), "jetson_thor": ("10.1 11.0", 64), "t4": ("7.5", 16), "l4": ("8.9", 24),
    "a10": ("8.6", 24), "a100": ("8.0", 40), "h100": ("9.0", 80), "rtx": ("7.5 8.6 8.9 12.0 12.1", 8),
}  # fmt: skip


@pytest.mark.parametrize("name", PRESETS)
def test_what_is_known_of_each_gpu(name):
    preset, (capabilities, memory) = PRESETS[name], KNOWN[name]
    assert preset.name == name and {*PRESETS} == {*KNOWN}
    assert [*preset.archs] == [f"sm{value.replace('.', '')}" for value in capabilities.split()]
    assert preset.memory_gib == memory
    least = max(map(float, capabilities.split()))  # what one of its kind has, is not refused
    assert {*preset.missing} == {word for word, since in (("fp8", 8.9), ("bf16", 8.0)) if least < since}
    # Jetsons share the host's memory, Orin has accelerators beside the GPU, and only RTX has a TensorRT of its own
    assert preset.shared is name.startswith("jetson") and preset.dla is (name == "jetson_orin")
    assert preset.backend == ("rtx" if name == "rtx" else "")
    batch = preset.batch
    assert 1 == batch["min"] <= batch["opt"] <= batch["max"] and batch["max"] in preset.batches
    assert 0 < preset.workspace_gib < preset.memory_gib and 1 in preset.batches
    # kernels come in tiles of powers of two, and a workspace is given as what a GPU can spare, not to the byte
    numbers = (batch["opt"], batch["max"], *batch["profiles"], *preset.batches, preset.workspace_gib)
    assert all(np.log2(number).is_integer() for number in numbers)
    assert list(preset.batches) == sorted({*preset.batches}) and {*batch["profiles"]} <= {*preset.batches}


@pytest.mark.parametrize(
    ("key", "value"), [("batch.max", 7), ("engine.workspace_gib", 3.5), ("benchmark.batches", (1, 2)), ("batch.min", 2)]
)
def test_each_key_that_is_set_stays_and_the_others_follow(key, value):
    config = default_config()
    config.checkpoint, config.engine.preset, config.name = "x.npz", "h100", "x"
    config.update_from_flattened_dict({key: value, **({"batch.opt": 4} if key == "batch.max" else {})})
    apply_preset(config)
    found = {
        "batch.max": config.batch.max,
        "batch.min": config.batch.min,
        "engine.workspace_gib": config.engine.workspace_gib,
        "benchmark.batches": config.benchmark.batches,
    }
    usual = {"batch.max": 256, "batch.min": 1, "engine.workspace_gib": 8.0, "benchmark.batches": (1, 32, 64, 256)}
    kept = {"batch.min": 1, "batch.max": 7} if key == "batch.max" else {key: value}
    if key == "batch.min":  # the range is taken as a whole
        kept["batch.max"] = default_config().batch.max
    assert found == {**usual, **kept}
