"""`python -m vit_convert.engine`: real TensorRT-RTX builds, simulated runs, and what the exit code says."""

import errno
import os
import subprocess
import sys

import onnx
import pytest
from signatures import image_input

from vit_convert.core.bundle import Bundle, read_json, write_json
from vit_convert.core.dialect import DIALECTS
from vit_convert.core.engine_results import EngineSummary
from vit_convert.core.errors import BuildError, CheckError, UsageError
from vit_convert.core.lock import hold
from vit_convert.core.progress import Progress
from vit_convert.engine import __main__ as command
from vit_convert.engine.backend import trt
from vit_convert.engine.build_bundle import graph_for
from vit_convert.engine.bundle_engines import built_from
from vit_convert.engine.commands import add_to_report
from vit_convert.engine.handoff import read_config
from vit_convert.engine.host import EngineHost
from vit_convert.engine.runtime.profiles import batch_profiles


def run(*words):
    return command.main(["engine", *map(str, words)])


@pytest.fixture
def simulated(gpu, monkeypatch):
    monkeypatch.setattr(command, "load_backend", lambda name, **_: gpu[0])
    return gpu


def test_help_tells_commands_flags_and_exit_codes(capsys):
    assert run("--help") == 0
    text = capsys.readouterr().out
    assert all(name in text for name in (*command.COMMANDS, "--duration", "--precision", "Exit codes"))
    # none is left out
    assert all(f"--{name}=" in text for name in {*command._FLAGS} - {"help", "helpfull", "helpshort", "helpxml"})
    assert run() == UsageError.exit_code


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["biuld", "x"],
            "command 'biuld': not one of build, verify, benchmark, tune, inspect, and no folder. Did you mean build?",
        ),
        (["out/nowhere"], "command 'out/nowhere': not one of build, verify, benchmark, tune, inspect, and no folder"),
        (["/", "verify"], "/: one bundle and nothing else is taken, given / verify"),
        (["/"], "/: holds no manifest.json"),
        (["build"], "build: takes one bundle, given 0"),
        (["build", "nowhere"], "nowhere: holds no manifest.json"),
        (["build", "x", "--precison=fp16"], "precison"),
        (["benchmark", "x", "--duration=long"], "duration"),
    ],
)
def test_mistakes_of_usage(capsys, words, message):
    assert run(*words) == UsageError.exit_code
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("--config.batch.mix=3", "--config.batch.mix: unknown key. Did you mean batch.min, batch.max"),
        ("--config.batch.min=99", "config.batch: min 99, opt 4, max 8 must rise from 1"),
        ("--config.batch.profiles=(0,)", "config.batch.profiles=(0,): must be whole numbers from 1 to 65,536"),
        ("--precision=fp17", "config.precision='fp17': 'fp17' is not one of"),
        ("--streams=two", "--streams=two: 'two' is not a whole number"),
    ],
)
def test_mistakes_of_config(capsys, bundle_path, word, message):
    assert run("build", bundle_path, word) == UsageError.exit_code
    assert f"error: {message}" in capsys.readouterr().err


def test_build_with_a_real_tensorrt(capsys, bundle_path):
    pytest.importorskip("tensorrt_rtx")
    if trt.cuda.gpu() is not None:
        pytest.skip("this machine has a GPU")
    words = ("build", bundle_path, "--backend=rtx", "--precision=fp32", "--config.batch.profiles=(1,)", "--quiet")
    assert run(*words) == 0
    version = trt.load_backend("rtx").version
    plan = bundle_path / "engines" / f"rtx-{version}-all" / "fp32.plan"
    sidecar = read_json(f"{plan}.json")
    assert [profile["images"][0][0] for profile in sidecar["profiles"]] == [1, 1] and sidecar["attentions"] > 0
    assert [profile["images"][2][0] for profile in sidecar["profiles"]] == [1, 8]
    assert "fp32.plan" in capsys.readouterr().out
    report = read_json(bundle_path / "report.json")
    assert [row["precision"] for row in report["engines"]] == ["fp32"] and report["checkpoint"]["variant"]
    built = plan.stat().st_mtime_ns
    assert run(*words) == 0 and plan.stat().st_mtime_ns == built  # the same request is not built again
    assert run(*words, "--config.engine.opt_level=1") == 0 and plan.stat().st_mtime_ns > built
    built = plan.stat().st_mtime_ns
    assert run(*words, "--config.engine.opt_level=1", "--force") == 0 and plan.stat().st_mtime_ns > built


def test_build_refuses_what_the_graph_does_not_hold(capsys, bundle_path):
    pytest.importorskip("tensorrt_rtx")
    # RTX knows typed graphs alone
    assert run("build", bundle_path, "--backend=rtx", "--precision=fp16", "--quiet") == BuildError.exit_code
    text = capsys.readouterr().err
    # A graph with Q/DQ alone would build, and run in fp32 between them.
    assert run("build", bundle_path, "--backend=rtx", "--precision=int8", "--quiet") == BuildError.exit_code
    assert "int8: tiny has graphs for trt8" in capsys.readouterr().err
    assert (
        "fp16: tiny has graphs for trt8, whose precision is a flag; tensorrt_rtx " in text
        and "--config.target=rtx" in text
    )


def test_verify_then_benchmark(capsys, simulated, engines):
    path = engines("fp16")
    assert run("verify", path, "--precision=fp16", "--quiet") == 0
    assert "passed" in capsys.readouterr().out
    assert (
        run(
            "benchmark",
            path,
            "--precision=fp16",
            "--batches=1,8",
            "--streams=1",
            "--duration=0.02",
            "--warmup=0",
            "--quiet",
        )
        == 0
    )
    text = capsys.readouterr().out
    assert "Recommended: fp16" in text and "of device-resident throughput with transfers" in text
    report = read_json(path / "report.json")
    assert {row["batch"] for row in report["benchmark"]} == {1, 8} and report["verify"]["passed"]
    assert report["recommended"]["precision"] == "fp16"


ALONE = ("--batches=1", "--streams=1", "--duration=0.02", "--warmup=0", "--quiet")


def test_a_bundle_alone_is_built_verified_and_measured(capsys, simulated, engines, monkeypatch):
    path, built = engines("fp16"), []
    # nothing here can build
    monkeypatch.setitem(command.COMMANDS, "build", lambda *_: built.append(read_json(path / "report.json")))
    assert run(path, "--precision=fp16", *ALONE) == 0
    text = capsys.readouterr().out
    assert text.index("passed") < text.index("Recommended: fp16")
    report = read_json(path / "report.json")
    assert report["verify"]["passed"] and report["benchmark"] and ["verify" in found for found in built] == [False]


def test_a_miss_of_one_engine_leaves_the_others_measured(capsys, simulated, engines, monkeypatch):
    path = engines("fp32", "fp16")
    monkeypatch.setitem(command.COMMANDS, "build", lambda *_: None)
    assert run(path, "--precision=fp32,fp16", "--config.check.fp16_cosine=1.0", *ALONE) == CheckError.exit_code
    said = capsys.readouterr()
    assert "engines miss their tolerance: fp16" in said.err and "Recommended: fp32" in said.out
    report = read_json(path / "report.json")
    assert {row["precision"] for row in report["benchmark"]} == {"fp32", "fp16"} and not report["verify"]["passed"]


def test_engine_of_an_earlier_graph_is_refused(capsys, simulated, engines):
    path = engines("fp16")
    data = path / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:-4] + b"\x01\x02\x03\x04")
    for name in ("verify", "benchmark"):
        assert run(name, path, "--precision=fp16", "--quiet") == BuildError.exit_code
        assert "built from another model.onnx" in capsys.readouterr().err
    (path / "model.onnx").unlink()  # a host that serves engines need not have their graphs
    assert built_from(Bundle(path), path / "engines" / "tensorrt-8.6.0-sm90" / "fp16.plan") is None


def test_a_miss_is_reported_and_sets_the_exit_code(capsys, simulated, engines):
    path = engines("fp16", error=10.0)
    assert run("verify", path, "--precision=fp16", "--quiet") == 5
    streams = capsys.readouterr()
    assert "FAILED" in streams.out and "logits at batch 1" in streams.err
    assert read_json(path / "report.json")["verify"]["passed"] is False


def test_no_engine_and_broken_engine(capsys, simulated, engines):
    path = engines("fp16", broken=True)
    assert run("verify", path, "--precision=fp32", "--quiet") == 7
    assert run("verify", path, "--precision=fp16", "--quiet") == 8
    assert "a kernel failed" in capsys.readouterr().err


def test_a_bundle_that_cannot_be_written_is_refused_before_anything_runs(engines, capsys, monkeypatch):
    path = engines("fp32")

    def refuse(*arguments, **options):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    assert run("verify", path, "--precision=fp32", "--quiet") == 2
    assert "cannot be written (Read-only file system)" in capsys.readouterr().err


def test_profiles_and_graphs_of_a_request(tmp_path):
    batch = {"min": 1, "opt": 8, "max": 64, "profiles": (1, 64, 1)}
    found = [profile["images"] for profile in batch_profiles(image_input((32, 48), "NHWC"), (32, 48), batch)]
    assert [tuple(shape[0] for shape in triple) for triple in found] == [(1, 1, 1), (64, 64, 64), (1, 8, 64)]
    assert found[0][0] == (1, 32, 48, 3)
    assert batch_profiles(image_input((32, 48), "NCHW"), (32, 48), batch)[0]["images"][0] == (1, 3, 32, 48)
    assert (
        len(batch_profiles(image_input((32, 48), "NHWC"), (32, 48), {"min": 8, "opt": 8, "max": 8, "profiles": (8,)}))
        == 1
    )
    bundle = Bundle(tmp_path)
    asked = (("fp16", "trt8"), ("fp16", "trt10"), ("int8", "trt8"), ("fp32", "rtx"))
    graphs = [graph_for(bundle, precision, DIALECTS[target]).name for precision, target in asked]
    assert graphs == ["model.onnx", "model.fp16.onnx", "model.int8.onnx", "model.onnx"]
    assert graph_for(bundle, "int8", DIALECTS["trt10"], calibrator=True).name == "model.onnx"


def test_a_host_with_numpy_absl_and_ml_collections_alone_gets_as_far_as_the_missing_tensorrt(engines):
    path = engines("fp32")
    assert onnx.load(path / "model.onnx").graph.input[0].name == "images"
    blocked = (
        "jax",
        "flax",
        "onnx",
        "onnx_ir",
        "onnxscript",
        "onnxruntime",
        "rich",
        "PIL",
        "ml_dtypes",
        "tensorrt",
        "tensorrt_rtx",
    )
    program = (
        f"import sys; sys.modules.update(dict.fromkeys({blocked!r})); from vit_convert.engine.__main__ import "
        f"run; run()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "verify", path],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
        timeout=300,
    )
    assert done.returncode == BuildError.exit_code and "no TensorRT can build here" in done.stderr, done.stderr


def test_a_conversion_that_was_killed_is_not_built_from(capsys, bundle_path):
    """Its rows say what was done for another config, and nobody has looked since."""
    manifest = read_json(bundle_path / "manifest.json")
    for row in manifest["stages"]:
        row["status"] = "running" if row["name"] == "export" else "stale" if row["name"] > "export" else row["status"]
    write_json(bundle_path / "manifest.json", manifest)
    assert run("verify", bundle_path, "--quiet") == UsageError.exit_code
    assert "stage export is not done" in capsys.readouterr().err


def test_a_bundle_that_is_worked_on_is_refused(capsys, simulated, engines):
    path = engines("fp32")
    with hold(Bundle(path), "a conversion"):
        for name in ("build", "verify", "benchmark", "tune"):
            assert run(name, path, "--precision=fp32", "--quiet") == UsageError.exit_code
            assert f"process {os.getpid()} on" in capsys.readouterr().err
    assert run("verify", path, "--precision=fp32", "--quiet") == 0


def test_a_leftover_graph_is_not_built_from(capsys, simulated, engines):
    path = engines("fp32")
    for name in ("model.int8.onnx", "model.int8.onnx.data"):
        (path / name).write_bytes(b"an earlier conversion's")
    assert run("build", path, "--precision=int8", "--quiet") == BuildError.exit_code
    assert "model.int8.onnx: no finished stage of this conversion made it" in capsys.readouterr().err


def test_verify_takes_back_what_was_recommended(capsys, simulated, engines):
    """An engine that missed is recommended no more, by the conversion's check of its graph or by an earlier
    benchmark."""
    path = engines("fp32")
    row = {
        "precision": "fp32",
        "graph": "model.onnx",
        "path": "engines/tensorrt-8.6.0-sm90/fp32.plan",
        "backend": "tensorrt",
    }
    host = EngineHost.open(simulated[0], Bundle(path), read_config(Bundle(path)), Progress(quiet=True))
    add_to_report(host, build=[EngineSummary.from_dict({**row, "version": "8.6.0"})])
    assert read_json(path / "report.json")["engine"]["precision"] == "fp32"
    assert run("verify", path, "--precision=fp32", "--quiet") == 0
    assert run("benchmark", path, "--precision=fp32", *ALONE) == 0
    report = read_json(path / "report.json")
    assert report["engine"]["precision"] == report["recommended"]["precision"] == "fp32"
    engines("fp32", error=10.0)  # another one in its place
    assert run("verify", path, "--precision=fp32", "--quiet") == 5
    report = read_json(path / "report.json")
    assert report["engine"] == {} and "recommended" not in report
