"""What each TensorRT is given: its opset, its substitutions, and the names by which its further lowerings are asked
for."""

import pytest

from vit_convert.core.errors import UsageError
from vit_convert.export.targets import LOWERINGS, TARGETS, lowering_named, target_named


def names(target) -> list[str]:
    return [rule.__name__ for rule in target.rules]


def test_opsets_and_budgets():
    """TensorRT 8.6 reads opset 17; 20 is the first with Gelu. The budgets are what the README promises of a block."""
    assert {name: (target.name, target.opset, target.max_nodes_per_block) for name, target in TARGETS.items()} == {
        "trt8": ("trt8", 17, 36),
        "trt10": ("trt10", 20, 30),
        "trt11": ("trt11", 20, 30),
        "rtx": ("rtx", 20, 30),
    }
    budgets = {name: target.max_nodes_per_block for name, target in LOWERINGS["trt8"].items()}
    own = {"plugin": 36, "kernels": 36, "fused": 36, "windows": 36, "groupnorm": 36}
    assert budgets == {**own, "matmul": 34, "primitives": 50, "gather": 34}
    assert {target.opset for target in LOWERINGS["trt8"].values()} == {17} and set(LOWERINGS) == {"trt8"}


def test_what_each_writes():
    for name in ("trt10", "trt11", "rtx"):
        assert names(TARGETS[name])[-2:] == ["TanhGelu", "ErfGelu"] and "ReduceAxesToAttribute" not in names(
            TARGETS[name]
        )
        assert TARGETS[name].finish == TARGETS[name].last == ()
    finish = {name: [change.__name__ for change in target.finish] for name, target in LOWERINGS["trt8"].items()}
    own = ["fold_scale", "patch_to_matmul", "mlps_to_convolutions"]
    assert [change.__name__ for change in TARGETS["trt8"].finish] == own
    assert finish == {
        "plugin": [*own, "attention_to_plugin"],
        "kernels": [*own, "attention_for_kernels"],
        "fused": [*own, "attention_to_plugin"],
        "matmul": own[:2],
        "primitives": own[:2],
        "windows": [*own, "windows_to_kernels", "moves_to_gather"],
        "groupnorm": [*own, "attention_to_plugin_if_it_fits"],
        "gather": [*own[:2], "moves_to_gather"],
    }
    assert [change.__name__ for change in LOWERINGS["trt8"]["fused"].last] == ["encoder_to_kernels"]
    assert [change.__name__ for change in LOWERINGS["trt8"]["windows"].last] == ["norms_to_half_kernels"]
    assert [change.__name__ for change in LOWERINGS["trt8"]["groupnorm"].last] == ["group_norms_to_kernels"]
    gelus = {name: names(target)[-1] for name, target in LOWERINGS["trt8"].items()}
    assert gelus == {
        "plugin": "TanhGeluToPower",
        "kernels": "TanhGeluToPower",
        "fused": "TanhGeluToPower",
        "windows": "TanhGeluToPower",
        "groupnorm": "TanhGeluToPower",
        "matmul": "TanhGeluToExp",
        "primitives": "LayerNormToPrimitives",
        "gather": "TanhGeluToExp",
    }
    assert names(TARGETS["trt8"])[0] == "ReduceAxesToAttribute"


@pytest.mark.parametrize("name", TARGETS)
def test_by_name(name):
    assert target_named(name) is target_named(name=name) is TARGETS[name]
    dynamic = target_named(name, dynamic=True)
    # no convolution over a fixed number of tokens
    assert dynamic is (LOWERINGS["trt8"]["matmul"] if name == "trt8" else TARGETS[name])


def test_names_that_nothing_has():
    with pytest.raises(UsageError, match="Did you mean trt10"):
        target_named("trt-10")
    with pytest.raises(
        UsageError,
        match=r"lowering 'plugins': target trt8 has plugin, kernels, fused, matmul, primitives, windows, "
        r"groupnorm, gather\.  ?Did you mean plugin",
    ):
        lowering_named("trt8", "plugins")
    with pytest.raises(UsageError, match="lowering 'plugin': target rtx has only its own") as caught:
        lowering_named("rtx", "plugin")
    assert "lowerings" in caught.value.fix
    assert lowering_named("trt8", "matmul") is LOWERINGS["trt8"]["matmul"]
