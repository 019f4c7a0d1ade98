"""Presets fill in what a config leaves at its defaults, once and for all, and refuse what a GPU cannot do."""

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
