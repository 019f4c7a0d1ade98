"""A range of image sizes and uint8 input through the command line, on the model and images that come with the
project."""

import importlib.util
import json
import pathlib
import subprocess
import sys

import numpy as np
import onnx_ir as ir
import pytest

from vit_convert.__main__ import main
from vit_convert.core.errors import CheckError, UsageError
from vit_convert.families.random import write_random_checkpoint
from vit_convert.images.preprocess import Preprocess
from vit_convert.stages import reference

pytestmark = pytest.mark.slow  # whole conversions

ROOT = pathlib.Path(__file__).parents[2]
BACKEND = "rtx" if importlib.util.find_spec("tensorrt_rtx") else "none"
QUICK = ("--config.evaluation.num_images=32", "--config.calibration.num_images=32", "--config.check.num_images=4")
DIGITS = (
    "--config.image_size=dynamic:16..64",
    "--config.input=uint8",
    "--config.name=digits",
    f"--config.engine.backend={BACKEND}",
    *QUICK,
)


def results(bundle: pathlib.Path) -> dict:
    return {row["name"]: row["result"] for row in json.loads((bundle / "manifest.json").read_text())["stages"]}


def convert(workdir, *flags, config="vit_digits.py"):
    return main(["vit_convert", f"--config={config}", f"--workdir={workdir}", "--quiet", *flags])


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> pathlib.Path:
    """The digits converted for 16 to 64 pixels and uint8 input, in FP32, FP16 and INT8."""
    workdir = tmp_path_factory.mktemp("dynamic")
    command = [sys.executable, "-m", "vit_convert", "--config=configs/vit_digits.py", f"--workdir={workdir}", *DIGITS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return workdir / "digits"


def test_every_precision_is_checked_at_three_sizes(digits):
    found = results(digits)
    assert found["checkpoint"]["image_range"] == {"smallest": [16, 16], "optimal": [32, 32], "largest": [64, 64]}
    fp32 = found["check"]["sizes"]
    assert list(fp32) == ["32x32", "16x16", "64x32"]
    # The target that the graph of each size is held to; the default check of 1e-4 has passed already.
    assert all(row["max_rel"] < 1e-5 for row in fp32.values())
    checks = found["quantize"]["checks"]
    assert list(checks["fp16"]["sizes"]) == list(fp32) and all(
        row["cosine"] > 0.999 for row in checks["fp16"]["sizes"].values()
    )
    assert checks["int8"]["sizes"]["32x32"]["cosine"] > 0.999 and checks["int8"]["passed"]
    assert {checks[name]["top1"] for name in checks} == {found["check"]["top1"]} == {100.0}


def test_reference_holds_pixels_of_each_size(digits):
    shapes = {path.name: np.load(path)["images"] for path in digits.glob("reference*.npz")}
    assert {name: images.shape for name, images in shapes.items()} == {
        "reference.npz": (4, 32, 32, 3),
        "reference.16x16.npz": (4, 16, 16, 3),
        "reference.64x32.npz": (4, 64, 32, 3),
    }
    assert all(images.dtype == np.uint8 for images in shapes.values())


@pytest.mark.skipif(BACKEND == "none", reason="needs tensorrt_rtx")
def test_engines_take_the_whole_range(digits):
    for precision in ("fp32", "fp16", "int8"):
        (path,) = digits.glob(f"engines/rtx-*/{precision}.plan.json")
        record = json.loads(path.read_text())
        assert record["inputs"] == [{"name": "images", "dtype": "uint8", "shape": [-1, -1, -1, 3]}]
        assert record["profiles"] == [{"images": [[1, 16, 16, 3], [16, 32, 32, 3], [64, 64, 64, 3]]}]
        assert Preprocess.from_dict(record["preprocessing"]).mean == (0.5, 0.5, 0.5)  # resizing is still the caller's


def test_second_run_is_fresh(digits):
    assert convert(digits.parent, *DIGITS) == 0
    assert {row["status"] for row in json.loads((digits / "report.json").read_text())["stages"]} == {"fresh"}


def test_miss_names_the_size(digits, capsys, monkeypatch):
    write, path = reference._write, digits / "reference.64x32.npz"

    def broken(*args):
        names = write(*args)
        if path.exists():
            with np.load(path) as file:
                arrays = {name: file[name] for name in file.files}
            np.savez(path, **{**arrays, "logits": arrays["logits"] + 1})
        return names

    path.unlink()  # so that the stage writes it again
    with monkeypatch.context() as patched:
        patched.setattr(reference, "_write", broken)
        assert convert(digits.parent, *DIGITS, "--until=check") == CheckError.exit_code
    assert "logits differs from JAX by 1" in (message := capsys.readouterr().err) and "of 64x32" in message
    path.unlink()
    assert convert(digits.parent, *DIGITS) == 0


def test_uint8_channels_first_for_trt8(tmp_path):
    flags = ["--config.input=uint8", "--config.layout=NCHW", "--config.target=trt8", "--config.precision=fp32,int8"]
    assert convert(tmp_path, *flags, *QUICK, "--config.engine.backend=none", "--config.name=nchw") == 0
    found = results(tmp_path / "nchw")
    assert (
        found["check"]["passed"] and found["check"]["max_rel"] < 1e-5 and found["quantize"]["checks"]["int8"]["passed"]
    )
    images = ir.load(tmp_path / "nchw" / "model.onnx").graph.inputs[0]
    assert images.dtype == ir.DataType.UINT8 and list(images.shape)[1:] == [3, 32, 32]


def test_size_after_at_is_what_images_are_decoded_to(tmp_path):
    flags = [
        "--config.image_size=dynamic:32x16..64@48",
        "--config.precision=fp32",
        "--config.engine.backend=none",
        "--until=check",
    ]
    assert convert(tmp_path, *flags, *QUICK, "--config.name=at") == 0
    assert np.load(tmp_path / "at" / "evaluation_images.npy").shape[1:] == (48, 48, 3)
    assert list(results(tmp_path / "at")["check"]["sizes"]) == ["48x48", "32x16", "64x48"]


USER_MODEL = """
from vit_convert.core.config import default_config
def get_config():
    config = default_config()
    config.model = lambda: (lambda params, images: images.mean((1, 2)), None)
    config.image_size = "dynamic:16..64"
    return config
"""


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config.image_size=dynamic:20..64"], "image_size 20x20: not a multiple of the patch size 8"),
        (["--config.image_size=dynamic:16..60"], "image_size 60x60: not a multiple of the patch size 8"),
        (["--config.image_size=dynamic:16..64@36"], "image_size 36x36: not a multiple of the patch size 8"),
        (["--config.image_size=dynamic:40..64"], "the checkpoint's own size, 32x32, lies outside"),
        (["--config.image_size=dynamic:8..64"], "a side of one patch (8 pixels)"),
        (["--config.image_size=dynamic:16-64"], "expected 'dynamic:160..448'"),
        (["--config.image_size=dynamic:16..64", "--config.engine.calibrator=True"], "float32 images of one size"),
        (["--config.input=uint8", "--config.engine.calibrator=True"], "float32 images of one size"),
        (["--config.input=float16"], "not one of float32, uint8"),
    ],
)
def test_what_cannot_be_is_a_usage_error(tmp_path, capsys, flags, message):
    assert convert(tmp_path, *flags, "--config.engine.backend=none") == UsageError.exit_code
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("*/*.onnx"))


@pytest.mark.parametrize(("variant", "size"), [("S/32", 64), ("R+Ti/16", 64)], ids=["mixer", "hybrid"])
def test_a_family_of_one_size_says_so(tmp_path, capsys, variant, size):
    family = "mixer" if variant == "S/32" else "hybrid"
    path = tmp_path / "model.npz"
    write_random_checkpoint(path, variant, family=family, image_size=(size, size), num_classes=10, depth=1)
    flags = [
        f"--config.checkpoint={path}",
        f"--config.image_size=dynamic:{size}..{2 * size}",
        "--config.evaluation.data=",
    ]
    assert convert(tmp_path, *flags, "--config.engine.backend=none") == UsageError.exit_code
    assert f"family {family} has one size; only ViTs take a range" in capsys.readouterr().err


def test_user_model_has_one_size(tmp_path, capsys):
    (tmp_path / "mine.py").write_text(USER_MODEL)
    assert convert(tmp_path, config=tmp_path / "mine.py") == UsageError.exit_code
    assert (
        "config.model is traced at one size" in (message := capsys.readouterr().err) and "their weights fix" in message
    )


def test_computed_positions_cannot_be_resampled(tmp_path, capsys):
    path = tmp_path / "sincos.npz"
    write_random_checkpoint(path, "mu/16", image_size=(64, 64), num_classes=10, layout="big_vision", posemb="sincos2d")
    flags = [f"--config.checkpoint={path}", "--config.image_size=dynamic:32..128", "--config.engine.backend=none"]
    assert convert(tmp_path, *flags) == UsageError.exit_code
    message = capsys.readouterr().err
    assert "stores no position table (sincos2d)" in message and "Set image_size, such as 224x224" in message
