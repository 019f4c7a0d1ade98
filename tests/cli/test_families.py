"""Hybrids, Mixers and Swins from the command line: random file, conversion, every block proved, FP16 and INT8, and an
engine."""

import importlib.util

import pytest

from vit_convert.families.random import main as random_main

# By family: variant, side in pixels, what the summary calls it, and names of blocks in the check.
CASES = {
    "mixer": (
        "Mixer-mu/16",
        32,
        "Mixer-mu/16, ",
        ["block_00/token_mixing", "block_00", "block_01", "pre_head_layer_norm"],
    ),
    "hybrid": ("R8+ViT-mu/8", 64, "hybrid R8+ViT-mu/8, ", ["root", "stage_1/block_00", "stage_2/block_01", "block_00"]),
    "swin": ("Swin-mu/7", 56, "Swin-mu/7, ", ["stage_0/block_00", "stage_0/block_01", "stage_1/block_00", "norm"]),
}


@pytest.fixture(params=list(CASES))
def family(request, convert):
    """The conversion of a family's file, and the family's name."""
    variant, side, *_ = CASES[request.param]
    path = convert.config.parent / f"{request.param}.{'safetensors' if request.param == 'swin' else 'npz'}"
    assert (
        random_main(["random", f"--variant={variant}", f"--image_size={side}", "--num_classes=10", f"--output={path}"])
        == 0
    )

    def run(*flags):
        return convert(f"--config.checkpoint={path}", f"--config.image_size=({side}, {side})", *flags)

    run.convert, run.name = convert, request.param
    return run


def test_converts(family, capsys):
    assert family("--config.precision=fp32,fp16,int8", "--config.calibration.num_images=8") == 0
    _, side, called, blocks = CASES[family.name]
    report = family.convert.report()
    assert report["checkpoint"]["family"] == family.name and report["checkpoint"]["image_size"] == [side, side]
    assert f" s   {called}" in capsys.readouterr().err
    proved = {row["tensor"]: row for row in report["checks"]["fp32"]["blocks"]}
    assert {*blocks, "logits"} <= set(proved)
    assert all(row["max_rel"] < 1e-4 for row in proved.values())
    assert report["checks"]["fp16"]["passed"] and report["checks"]["int8"]["passed"]
    assert family("--config.precision=fp32,fp16,int8", "--config.calibration.num_images=8") == 0
    assert set(family.convert.statuses().values()) == {"fresh"}


@pytest.mark.slow
def test_for_tensorrt_8(family):
    assert family("--config.target=trt8", "--config.precision=fp16,int8", "--config.lowerings=('matmul',)") == 0
    assert all(check["passed"] for check in family.convert.report()["checks"].values())


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="TensorRT-RTX is not installed")
def test_builds_an_engine(family):
    assert family("--config.precision=fp16", "--config.engine.backend=rtx") == 0
    assert len(list(family.convert.bundle.glob("engines/rtx-*/fp16.plan"))) == 1


def test_a_range_of_sizes_is_refused(family, capsys):
    assert family("--config.image_size='dynamic:32..64'") == 2
    assert f"family {family.name}" in capsys.readouterr().err
