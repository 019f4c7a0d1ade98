"""Whole conversions: what is left of one that fails, is interrupted, or changes; and one to real engines."""

import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from vit_convert.config import default_config
from vit_convert.core.pipeline import Context
from vit_convert.engine.backend import cuda
from vit_convert.engine.backend.trt import load_backend
from vit_convert.stages import build
from vit_convert.stages.build import BUILD, VERIFY


def names(folder) -> set[str]:
    return {path.name for path in folder.iterdir()}


# --- failures -------------------------------------------------------------------------------------------------------


def test_failed_check_names_the_block(convert, capsys):
    assert convert("--config.check.rtol=0.0", "--config.check.atol=0.0", "--config.check.cosine=1.0") == 5
    message = capsys.readouterr().err
    assert "error: model.onnx: " in message
    assert "First to miss: block_00." in message
    assert "needed max_abs <= 0 + 0 * scale, cosine >= 1." in message
    report = convert.report()
    assert report["status"] == "failed"
    assert convert.statuses()["check"] == "failed"
    assert report["check"]["passed"] is False
    assert {row["tensor"]: row["passed"] for row in report["check"]["blocks"]} == {
        "block_00": False,
        "encoder_norm": False,
        "logits": False,
    }
    assert convert() == 0  # with tolerances that can be met, the same bundle goes on
    assert convert.statuses()["export"] == "fresh"
    assert convert.report()["check"]["passed"]


def test_disk_full_while_the_weights_are_written(convert, monkeypatch, capsys):
    import onnx_ir

    def save(model, path, **options):
        path.with_name(options["external_data"]).write_bytes(b"half of the weights")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(onnx_ir, "save", save)
        assert convert() == 2
    assert "model.onnx: no space left on the disk" in capsys.readouterr().err
    left = names(convert.bundle)
    assert not any(name.startswith((".", "model")) for name in left)
    assert convert.statuses()["export"] == "failed"
    assert convert() == 0
    assert {"model.onnx", "model.onnx.data"} <= names(convert.bundle)


LIMITED = """
import resource, sys
from vit_convert.__main__ import main
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
sys.exit(main(["vit_convert", *sys.argv[1:]]))
"""


def test_quota_for_real(convert):
    """A limit on the size of files, which the weights (150 kB) break in the middle of a write."""
    result = subprocess.run(
        [sys.executable, "-c", LIMITED, *convert.arguments()], capture_output=True, text=True, check=False
    )
    assert result.returncode == 2, result.stderr
    assert "model.onnx: " in result.stderr
    assert "Traceback" not in result.stderr
    assert not any(name.startswith((".", "model")) for name in names(convert.bundle))


def test_old_graph_survives_a_failed_write(convert, monkeypatch):
    import onnx_ir

    assert convert() == 0
    before = (convert.bundle / "model.onnx").read_bytes(), (convert.bundle / "model.onnx.data").read_bytes()

    def save(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(onnx_ir, "save", save)
    assert convert("--config.layout=NCHW") == 2
    assert ((convert.bundle / "model.onnx").read_bytes(), (convert.bundle / "model.onnx.data").read_bytes()) == before


# --- what the config asks of the graph --------------------------------------------------------------------------------


SPELLED = ("--config.target=trt8", "--config.lowerings=('matmul','primitives')")


@pytest.mark.parametrize(
    ("flags", "sizes", "different"),
    [
        (("--config.layout=NCHW", "--config.input=uint8", "--config.taps=True"), ["32x32"], 3),
        (("--config.image_size=dynamic:32..64",), ["32x32", "64x32"], 2),  # a dynamic graph has matrix products anyway
    ],
)
def test_lowerings_are_the_same_model(convert, flags, sizes, different):
    import onnx_ir

    assert convert(*SPELLED, *flags) == 0
    folder = convert.bundle / "lowerings"
    assert names(folder) == {f"{name}.onnx{suffix}" for name in ("matmul", "primitives") for suffix in ("", ".data")}
    graphs = {path.stem: onnx_ir.load(path).graph for path in (convert.bundle / "model.onnx", *folder.glob("*.onnx"))}
    (expected,) = graphs["model"].inputs
    for graph in graphs.values():
        (images,) = graph.inputs
        assert (images.name, images.dtype, str(images.shape)) == (expected.name, expected.dtype, str(expected.shape))
        assert [value.name for value in graph.outputs] == [value.name for value in graphs["model"].outputs]
    operators = {name: [node.op_type for node in graph] for name, graph in graphs.items()}
    assert len({tuple(found) for found in operators.values()}) == different
    norms = {name: (found.count("LayerNormalization"), found.count("ReduceMean")) for name, found in operators.items()}
    # two norms in the only block, one behind it; as primitives two means each
    assert norms == {"model": (3, 0), "matmul": (3, 0), "primitives": (0, 6)}
    checked = convert.report()["check"]["lowerings"]
    assert list(checked) == ["matmul", "primitives"]
    assert all(
        found["passed"] and found["max_rel"] < 1e-5 and list(found["sizes"]) == sizes for found in checked.values()
    )


def test_lowerings_come_and_go(convert):
    def redone(*flags: str) -> set[str]:
        assert convert("--config.target=trt8", *flags) == 0
        return {name for name, status in convert.statuses().items() if status == "done"}

    folder = convert.bundle / "lowerings"
    redone(*SPELLED)
    assert redone(*SPELLED) == set()
    (folder / "matmul.onnx.data").unlink()
    assert redone(*SPELLED) == {"export"}
    assert redone("--config.lowerings=matmul") == {"export", "check"}
    assert names(folder) == {"matmul.onnx", "matmul.onnx.data"}
    assert list(convert.report()["check"]["lowerings"]) == ["matmul"]
    assert redone() == {"export", "check"}
    assert names(folder) == set()


@pytest.mark.parametrize(("target", "words"), [("trt8", ("matmul,", "primitives")), ("trt10", ("trt10",))])
def test_lowering_that_the_target_does_not_have(convert, capsys, target, words):
    assert convert(f"--config.target={target}", "--config.lowerings=matmull") == 2
    message = capsys.readouterr().err
    assert all(word in message for word in ("'matmull'", *words))
    assert not any(name.startswith(("model", "lowerings")) for name in names(convert.bundle))


def test_lowering_that_computes_something_else(convert, capsys, monkeypatch):
    import onnx

    from vit_convert.export import exporter

    save = exporter.save_onnx

    def save_wrong(model, path):
        save(model, path)
        if path.stem == "primitives":
            model = onnx.load(path, load_external_data=False)
            (bias,) = (tensor for tensor in model.graph.initializer if tensor.name == "head/bias")
            bias.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias) + 1, bias.name))
            onnx.save(model, path)

    monkeypatch.setattr(exporter, "save_onnx", save_wrong)
    assert convert(*SPELLED, "--config.check.rtol=2e-4") == 5
    assert "error: lowering primitives: primitives.onnx: logits differs from JAX by 1 " in capsys.readouterr().err
    checked = convert.report()["check"]
    assert convert.statuses()["check"] == "failed" and checked["passed"] is False
    assert {name: found["passed"] for name, found in checked["lowerings"].items()} == {
        "matmul": True,
        "primitives": False,
    }
    assert checked["lowerings"]["primitives"]["max_abs"] == pytest.approx(1, abs=1e-3) and checked["max_abs"] < 1e-4


# --- interruption ---------------------------------------------------------------------------------------------------


# A shell that starts the tests in the background has its children ignore the signal.
HEEDING = """
import signal, sys
from vit_convert.__main__ import main
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGTERM, signal.SIG_DFL)
sys.exit(main(["vit_convert", *sys.argv[1:]]))
"""


@pytest.mark.parametrize(("number", "said"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "ended by SIGTERM")])
def test_interrupted_and_continued(convert, number, said):
    """Ctrl-C, and what `docker stop` and Slurm send."""
    process = subprocess.Popen([sys.executable, "-c", HEEDING, *convert.arguments()], stderr=subprocess.PIPE, text=True)
    events = convert.bundle / "events.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if events.exists() and '"event": "start", "stage": "reference"' in events.read_text():
            break
        time.sleep(0.01)
    process.send_signal(number)
    _, message = process.communicate(timeout=120)
    assert process.returncode == 130, message
    assert f"{said}: finished stages are kept, the same command continues" in message
    assert "Traceback" not in message
    assert convert.statuses() == {"checkpoint": "done", "images": "done", "export": "done", "reference": "failed"}
    assert not any(name.startswith(".") for name in names(convert.bundle))
    assert convert() == 0
    assert convert.statuses() == {
        "checkpoint": "fresh",
        "images": "fresh",
        "export": "fresh",
        "reference": "done",
        "check": "done",
    }


# --- images ---------------------------------------------------------------------------------------------------------

INT8 = ("--config.precision=int8", "--config.check.int8_cosine=0.5", "--config.calibration.num_images=4")


def test_calibration_images_that_cannot_be_used(convert, images, tmp_path, capsys):
    """An empty folder, one that is not there, and one with half an image: each named, nothing left, and the earlier
    stages kept."""

    def says(message: str, data) -> None:
        assert convert(*INT8, f"--config.calibration.data={data}") == 6
        assert message in capsys.readouterr().err
        assert not any(name.startswith((".", "calibration")) for name in names(convert.bundle))

    folder = images()
    says("no image in it", folder)
    says("nowhere: no such file or folder", tmp_path / "nowhere")
    folder.rmdir()
    whole = (images((32, 32), (32, 32)) / "1.png").read_bytes()
    (folder / "1.png").write_bytes(whole[: len(whole) // 2])
    says(f"{folder}/1.png", folder)
    assert convert.statuses() == {
        **dict.fromkeys(["checkpoint", "images", "export", "reference", "check"], "fresh"),
        "calibrate": "failed",
    }


def test_images_of_mixed_sizes(convert, images):
    folder = images((32, 32), (20, 50), (300, 40), (33, 31))
    assert convert(*INT8, f"--config.calibration.data={folder}", f"--config.evaluation.data={folder}") == 0
    assert np.load(convert.bundle / "calibration_images.npy").shape == (4, 32, 32, 3)
    report = convert.report()
    assert report["calibration"]["num_images"] == 4
    assert report["calibration"]["source"] == str(folder)
    assert report["reference"]["source"] == "evaluation images"


def test_labelled_images_are_scored(convert, images):
    """Three of five labels are what the graph itself says, found here with onnxruntime and NumPy: 60 %, whoever
    counts."""
    import onnxruntime

    folder = images(*[(32, 32)] * 5)
    (folder / "labels.csv").write_text("".join(f"{i}.png,{i}\n" for i in range(5)))
    flags = ["--config.check.max_top1_drop=100.0", f"--config.evaluation.data={folder}"]
    assert convert(*flags) == 0
    pixels = np.load(convert.bundle / "evaluation_images.npy").astype(np.float32)
    session = onnxruntime.InferenceSession(str(convert.bundle / "model.onnx"), providers=["CPUExecutionProvider"])
    classes = session.run(["logits"], {session.get_inputs()[0].name: (pixels - 127.5) / 127.5})[0].argmax(axis=1)
    wrong = (classes + 1) % 10
    labels = [classes[0], wrong[1], classes[2], classes[3], wrong[4]]
    (folder / "labels.csv").write_text("".join(f"{i}.png,{label}\n" for i, label in enumerate(labels)))
    assert convert(*flags) == 0
    accuracy = convert.report()["accuracy"]
    assert accuracy["jax"] == accuracy["onnx"] == 60.0


# --- the whole road -------------------------------------------------------------------------------------------------


def test_engines_and_freshness(convert, capsys):
    """FP16 and INT8 engines of TensorRT-RTX, built for real; then what a rerun, a change and a lost file redo."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    flags = [
        "--config.engine.backend=rtx",
        "--config.precision=int8",
        "--config.check.int8_cosine=0.9",
        "--config.calibration.num_images=8",
    ]
    assert convert(*flags) == 0
    first = convert.statuses()
    assert set(first.values()) == {"done"}
    assert list(first) == ["checkpoint", "images", "export", "reference", "check", "calibrate", "quantize", "build"]
    output = capsys.readouterr()
    assert "recommended" in output.out
    assert "calibration.data is empty" in output.err

    report = convert.report()
    assert report["status"] == "done"
    assert [(engine["precision"], engine["bytes"] > 10_000) for engine in report["engines"]] == [
        ("fp16", True),
        ("int8", True),
    ]
    for engine in report["engines"]:
        plan = convert.bundle / engine["path"]
        assert plan.stat().st_size == engine["bytes"]
        assert plan.with_name(plan.name + ".json").exists()
    assert report["engine"]["precision"] == "fp16"  # int8 is not recommended on faith
    assert {precision: check["passed"] for precision, check in report["checks"].items()} == {
        "fp32": True,
        "fp16": True,
        "int8": True,
    }
    assert report["checkpoint"]["num_params"] > 10_000
    assert report["onnx"]["nodes_per_block"] <= 30
    assert not any(name.startswith(".") for name in names(convert.bundle))

    assert convert(*flags) == 0
    assert set(convert.statuses().values()) == {"fresh"}
    assert "Nothing changed: every stage was fresh." in capsys.readouterr().out

    def redone(*more: str) -> set[str]:
        assert convert(*flags, *more) == 0
        return {name for name, status in convert.statuses().items() if status == "done"}

    assert redone("--config.calibration.method=minmax") == {"calibrate", "quantize", "build"}
    assert redone("--config.calibration.method=minmax") == set()
    (convert.bundle / "model.int8.onnx").unlink()
    assert redone("--config.calibration.method=minmax") == {"quantize"}
    (convert.bundle / report["engines"][0]["path"]).unlink()
    assert redone("--config.calibration.method=minmax") == {"build"}
    assert redone("--config.calibration.method=minmax", "--force", "--until=check") == {
        "checkpoint",
        "images",
        "export",
        "reference",
        "check",
    }

    events = [json.loads(line) for line in (convert.bundle / "events.jsonl").read_text().splitlines()]
    assert {"command", "start", "end", "fresh", "message", "warning"} <= {event["event"] for event in events}


def test_graphs_for_tensorrt_8_wait_for_its_builder(convert, capsys):
    """Whatever TensorRT is here is none that builds them, and no reason to fail; nor does its version enter their
    calibration cache."""
    flags = [
        "--config.target=trt8",
        "--config.engine.backend=auto",
        "--config.precision=fp16,int8",
        "--config.check.int8_cosine=0.9",
    ]
    assert convert(*flags) == 0
    assert list(convert.statuses())[-1] == "quantize"
    note = "No engine was built. On its host, with this folder there: python -m vit_convert.engine tiny"
    assert note in capsys.readouterr().out
    assert (convert.bundle / "calibration.cache").read_bytes().startswith(b"TRT-8601-")
    manifest = json.loads((convert.bundle / "manifest.json").read_text())
    assert "--config.target=trt8" in manifest["command"]
    assert convert(*flags, "--until=check") == 0
    assert "No engine was built" not in capsys.readouterr().out  # nor was one to be


def test_what_a_build_depends_on():
    """Settings that reach TensorRT without changing a graph: an engine of others is no fresh one."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    config = default_config()
    config.checkpoint, config.engine.backend = "x.npz", "rtx"
    context = Context(config, None, None)
    before = BUILD.inputs(context)
    config.keep_fp32 = ("block_00",)
    assert BUILD.inputs(context) != before
    # TensorRT's own calibrator reads images that no graph depends on
    assert {"calibrate", "quantize", "export"} <= set(BUILD.after)


def test_engines_for_other_gpus_are_not_run_here(monkeypatch):
    """TensorRT-RTX builds for the GPUs that it knows on any host."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    config = default_config()
    config.checkpoint, config.engine.backend = "x.npz", "rtx"
    rtx = load_backend("rtx")
    for arch, runs in (("sm90", False), ("sm89", True)):
        here = dataclasses.replace(rtx, gpu=cuda.Gpu("some GPU", arch, 1, "580.1", "13.0"))
        monkeypatch.setattr(build, "backend_named", lambda name, here=here: here)
        assert VERIFY.needed(Context(config, None, None)) == runs
