"""Real TensorRT on a real GPU: a bundle that was exported elsewhere is built, verified and measured here, in every
precision.

    VIT_CONVERT_BUNDLE=path/of/a/bundle VIT_CONVERT_RESULTS=results.json python -m pytest -m gpu tests/gpu

Needs Python 3.10 or later, numpy, absl-py, ml_collections, pytest and tensorrt; the bundle's target has to be this
TensorRT's (`--config.target=trt8` for 8.6), with precisions fp32 and fp16, and calibration images for the calibrator's
test. Use a small model.
"""

import dataclasses
import shutil

import numpy as np
import pytest
from gpu_bundle import BACKEND, ONE_PROFILE, run, tiled

from vit_convert.core.bundle import Bundle, read_json
from vit_convert.core.calibration_cache import CacheKey, hash_source, load_cache, parse_cache
from vit_convert.core.compare import compare
from vit_convert.core.errors import CalibrationError
from vit_convert.engine.backend.graph_file import graph_hashes
from vit_convert.engine.handoff import read_config
from vit_convert.engine.runtime.engine import Engine
from vit_convert.engine.runtime.session import Session

pytestmark = pytest.mark.gpu


def test_a_build_leaves_its_layers_and_its_timings(bundle, built):
    for plan in built.values():
        assert read_json(f"{plan}.layers.json")["Layers"]
    assert BACKEND.gpu is not None
    (timings,) = (bundle.root / "timing").iterdir()
    assert (
        timings.stat().st_size > 1000
        and BACKEND.version in timings.name
        and BACKEND.gpu.name.replace(" ", "-") in timings.name
    )


def proof(bundle, precision):
    """What verification found of an engine."""
    found = read_json(bundle.report)["verify"]["engines"][precision]
    return {key: found[key] for key in ("cosine", "max_rel", "top1", "agreement", "num_images") if key in found}


def test_verify_and_benchmark_commands(bundle, built, record_property):
    assert run("verify", bundle.root, "--precision=fp32,fp16") == 0
    record_property("fp32", proof(bundle, "fp32"))
    record_property("fp16", proof(bundle, "fp16"))
    assert (
        run(
            "benchmark",
            bundle.root,
            "--precision=fp32,fp16",
            "--batches=1,8,16",
            "--streams=1,2",
            "--duration=0.4",
            "--warmup=0.2",
        )
        == 0
    )
    report = read_json(bundle.report)
    rows = report["benchmark"]
    assert len(rows) == 2 * 3 * 3 and all(row["cuda_graph"] and row["images_per_second"] > 0 for row in rows)
    assert report["recommended"]["precision"] in ("fp16", "fp32")
    # The GPU's own clock cannot see more than the CPU's, but for the resolution of the events, half a microsecond.
    assert all(row["gpu_p50_ms"] <= row["p50_ms"] + 1e-3 for row in rows)


def test_lowerings_agree(bundle, engine, facts, reference, tmp_path, record_property):
    """Needs a bundle whose conversion was asked for lowerings, `--config.lowerings="('plugin','matmul')"`."""
    written = sorted(bundle.lowerings.glob("*.onnx"))
    if not written:
        pytest.skip("the bundle has no lowerings")
    copy = Bundle(shutil.copytree(bundle.root, tmp_path / "bundle"))
    plan = copy.plan(BACKEND.name, BACKEND.version, BACKEND.arch, "fp16")
    with Session(engine) as session:
        expected = {batch: session.run(tiled(reference, batch))[facts.output] for batch in (1, 5, 16)}
    for lowering in ("", *(path.stem for path in written)):
        assert (
            run("build", copy.root, "--precision=fp16", f"--config.engine.lowering={lowering}", batches=ONE_PROFILE)
            == 0
        )
        assert read_json(f"{plan}.json")["onnx"]["path"] == (f"{lowering}.onnx" if lowering else "model.onnx")
        with Session(Engine(BACKEND, plan)) as session:
            cosine = min(
                compare(wanted, session.run(tiled(reference, batch))[facts.output]).cosine
                for batch, wanted in expected.items()
            )
        record_property(lowering or "model.onnx", {"cosine": cosine})
        # What verification demands of fp16: which kernels TensorRT takes, and in what they sum, differs from build to
        # build. With outlier channels the same graph came to 0.99983 and to 0.99996.
        assert cosine > read_config(bundle).check.fp16_cosine, lowering


def test_tf32_by_choice(bundle, tmp_path, record_property):
    copy = Bundle(shutil.copytree(bundle.root, tmp_path / "bundle", ignore=shutil.ignore_patterns("engines")))
    words = ("--precision=fp32", "--config.engine.tf32=True")
    assert (
        run("build", copy.root, *words, batches=ONE_PROFILE) == 0
        and run("verify", copy.root, *words, batches=ONE_PROFILE) == 0
    )
    assert read_json(f"{copy.plan(BACKEND.name, BACKEND.version, BACKEND.arch, 'fp32')}.json")["options"]["tf32"]
    found = proof(copy, "fp32")
    record_property("tf32", found)
    # TF32 rounds operands to 11 significant bits, 2^-11 of each; fp32 engines of the same graphs are below 1e-5 of
    # scale.
    assert found["cosine"] > 0.999 and found["max_rel"] > 1e-5


def test_a_block_kept_in_fp32(bundle, tmp_path, record_property):
    copy = Bundle(shutil.copytree(bundle.root, tmp_path / "bundle", ignore=shutil.ignore_patterns("engines")))
    words = ("--precision=fp16", "--config.keep_fp32=('block_00',)")
    assert (
        run("build", copy.root, *words, batches=ONE_PROFILE) == 0
        and run("verify", copy.root, *words, batches=ONE_PROFILE) == 0
    )
    sidecar = read_json(f"{copy.plan(BACKEND.name, BACKEND.version, BACKEND.arch, 'fp16')}.json")
    # the plugin keeps nothing
    assert sidecar["options"]["keep_fp32"] == ["block_00"] and sidecar["onnx"]["path"] == "model.onnx"
    record_property("kept", proof(copy, "fp16"))


@pytest.mark.parametrize("option", ["hardware_compatible", "version_compatible"])
def test_portable_engines(bundle, facts, reference, tmp_path, capfd, option):
    copy = Bundle(shutil.copytree(bundle.root, tmp_path / "bundle", ignore=shutil.ignore_patterns("engines")))
    code = run("build", copy.root, "--precision=fp16", f"--config.engine.{option}=True", batches=ONE_PROFILE)
    said = capfd.readouterr().err
    if code and "libnvinfer_lean" in said:
        pytest.skip(f"this TensorRT came without its lean runtime: {said[said.index('error:') :].splitlines()[0]}")
    plan = copy.plan(BACKEND.name, BACKEND.version, BACKEND.arch, "fp16")
    assert code == 0 and read_json(f"{plan}.json")["options"][option], said
    with Session(Engine(BACKEND, plan)) as session:
        got = session.run(tiled(reference, 5))[facts.output]
    assert compare(reference[facts.output][np.arange(5) % len(reference["images"])], got).cosine > 0.999


def prove_int8(bundle, record_property):
    """Verifies INT8 and FP16, top-1 to within a point where the bundle has labels, and has the faster one
    recommended."""
    assert run("verify", bundle.root, "--precision=fp16,int8") == 0
    assert run("benchmark", bundle.root, "--precision=fp16,int8", "--batches=16", "--duration=0.4", "--warmup=0.2") == 0
    report = read_json(bundle.report)
    rates = {
        precision: max(row["images_per_second"] for row in report["benchmark"] if row["precision"] == precision)
        for precision in ("fp16", "int8")
    }
    names = {"precision": "int8", "backend": BACKEND.name, "version": BACKEND.version}
    (built,) = [row for row in report["engines"] if names.items() <= row.items()]
    found = {
        "int8_layers": built["int8_layers"],
        "products": built["products"],
        "images_per_second": rates,
        "recommended": report["recommended"],
    }
    record_property("int8", {**proof(bundle, "int8"), **found})
    assert report["recommended"]["precision"] == ("int8" if rates["int8"] > 1.05 * rates["fp16"] else "fp16")
    assert built["int8_layers"] > 0  # an engine without int8 kernels proves nothing of int8


def test_int8_by_qdq(bundle, built, record_property):
    if not bundle.onnx("int8").is_file():
        pytest.skip("the bundle has no INT8 graph")
    assert run("build", bundle.root, "--precision=int8") == 0
    prove_int8(bundle, record_property)


def test_calibrator(bundle, facts, built, record_property):
    if not BACKEND.has_calibrator:
        pytest.skip("this TensorRT has no calibrators")
    if not bundle.images("calibration").exists():
        pytest.skip("the bundle has no calibration images")
    words = (
        "build",
        bundle.root,
        "--precision=int8",
        "--config.engine.calibrator=True",
        "--config.calibration.batch_size=4",
    )
    assert run(*words) == 0  # by the conversion's thresholds
    prove_int8(bundle, record_property)
    words = (*words, "--config.calibration.method=entropy_plain")
    assert run(*words) == 0
    prove_int8(bundle, record_property)
    images_path = bundle.images("calibration")
    num_images = len(np.load(images_path, mmap_mode="r")) // 4 * 4
    about = {"num_images": num_images, "preprocessing": facts.preprocess, "batch_size": 4}
    source_hash = hash_source(graph_hashes(bundle.onnx()), images_path, **about)
    key = CacheKey("entropy", BACKEND.version, source_hash)
    (path,) = bundle.root.glob(f"calibration.tensorrt-{BACKEND.version}-entropy-*.cache")
    cache = load_cache(path, key)
    assert cache is not None
    scales = np.array(list(parse_cache(cache)[1].values()))
    assert len(scales) > 10 and np.isfinite(scales).all() and (scales >= 0).all() and (scales > 0).any()
    written = path.stat().st_mtime_ns
    # read, not made again
    assert run(*words, "--force", batches=ONE_PROFILE) == 0 and path.stat().st_mtime_ns == written
    with pytest.raises(CalibrationError, match="made as"):
        load_cache(path, dataclasses.replace(key, algorithm="minmax"))
    assert run(*words, "--config.calibration.method=minmax", batches=ONE_PROFILE) == 0
    (other,) = bundle.root.glob(f"calibration.tensorrt-{BACKEND.version}-minmax-*.cache")
    assert load_cache(other, dataclasses.replace(key, algorithm="minmax"))
    assert path.stat().st_mtime_ns == written
