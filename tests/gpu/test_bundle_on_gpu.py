"""Real TensorRT on a real GPU: a bundle that was exported elsewhere is built, run, verified and measured here.

    VIT_CONVERT_BUNDLE=path/of/a/bundle VIT_CONVERT_RESULTS=results.json python -m pytest -m gpu tests/gpu

Needs Python 3.10 or later, numpy, absl-py, ml_collections, pytest and tensorrt; the bundle's target has to be this TensorRT's
(`--config.target=trt8` for 8.6), with precisions fp32 and fp16, and calibration images for the calibrator's test. Use a small model.
"""

import dataclasses
import os
import pathlib
import shutil
import threading
import types

import numpy as np
import pytest

from vit_convert.bundle import Bundle, hash_file, read_json, write_json
from vit_convert.calibration_cache import CacheKey, hash_source, load_cache, parse_cache
from vit_convert.compare import compare
from vit_convert.engine import __main__ as command
from vit_convert.engine import cuda
from vit_convert.engine.device_array import DeviceArray
from vit_convert.engine.facts import Facts, read_facts
from vit_convert.engine.graphs import CudaGraph
from vit_convert.engine.kernels import fused_attention_by_kernels
from vit_convert.engine.measure import Worker, measure_latency, measure_throughput
from vit_convert.engine.monitor import Monitor
from vit_convert.engine.pinned import is_pinned, pinned_array
from vit_convert.engine.pipelined import PipelinedSession
from vit_convert.engine.runtime import Engine
from vit_convert.engine.session import Session
from vit_convert.engine.sidecar import graph_hashes
from vit_convert.engine.trt import load_backend
from vit_convert.errors import BuildError, CalibrationError

pytestmark = pytest.mark.gpu
if cuda.gpu() is None:
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)
GIVEN = os.environ.get("VIT_CONVERT_BUNDLE", "")
if not GIVEN:
    pytest.skip("VIT_CONVERT_BUNDLE names no bundle", allow_module_level=True)
pytest.importorskip("tensorrt")
BACKEND = load_backend("tensorrt")
BATCHES = ("--config.batch.min=1", "--config.batch.opt=4", "--config.batch.max=8", "--config.batch.profiles=(16,)")
ONE_PROFILE = (
    "--config.batch.min=1",
    "--config.batch.opt=4",
    "--config.batch.max=16",
    "--config.batch.profiles=()",
)  # builds in half the time


def run(*words, batches=BATCHES):
    return command.main(["engine", *map(str, words), "--backend=tensorrt", *batches])


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Bundle:
    return Bundle(
        shutil.copytree(GIVEN, tmp_path_factory.mktemp("gpu") / pathlib.Path(GIVEN).name, ignore=shutil.ignore_patterns("engines"))
    )


@pytest.fixture(scope="module")
def facts(bundle) -> Facts:
    return read_facts(bundle)


@pytest.fixture(scope="module")
def built(bundle):
    assert run("build", bundle.root, "--precision=fp32,fp16") == 0
    return {precision: bundle.plan(BACKEND.name, BACKEND.version, BACKEND.arch, precision) for precision in ("fp32", "fp16")}


@pytest.fixture
def engine(built) -> Engine:
    return Engine(BACKEND, built["fp32"])


@pytest.fixture(scope="module")
def reference(bundle):
    with np.load(bundle.reference) as file:
        return {name: file[name] for name in file.files}


def tiled(reference, batch):
    return reference["images"][np.arange(batch) % len(reference["images"])]


def test_cuda_layer():
    stream, begin, end = cuda.Stream(), cuda.Event(), cuda.Event()
    before = cuda.free_memory_bytes()
    given = pinned_array((1 << 24,), np.uint8)
    given[...] = np.arange(given.size, dtype=np.uint8)
    assert is_pinned(given) and not is_pinned(np.zeros(4096, np.uint8))
    first, second = cuda.DeviceBuffer(given.nbytes), cuda.DeviceBuffer(given.nbytes)
    assert before - cuda.free_memory_bytes() >= 2 * given.nbytes
    got = np.zeros_like(given)
    first.upload(given, stream)
    graph = CudaGraph(stream, lambda: second.copy_from(first.pointer, given.nbytes, stream))
    begin.record(stream)
    graph.launch(stream)
    end.record(stream)
    second.download(got, stream)
    stream.synchronize()
    assert np.array_equal(got, given)
    assert 0 < begin.elapsed_ms(end) < 1000
    for thing in (graph, begin, end, first, second, stream):
        thing.close()


def test_every_batch_matches_the_reference(engine, facts, reference):
    expected = reference[facts.output]
    scale = np.abs(expected).max()
    with Session(engine) as session:
        # 16 has a profile of its own, 1..8 the range, 9 is padded to 16, 40 is split.
        for batch in (1, 2, 5, 8, 9, 16, 40):
            got = session.run(tiled(reference, batch))[facts.output]
            wanted = expected[np.arange(batch) % len(expected)]
            # fp32 with TF32 off: 1e-3 of the scale, as verification demands.
            np.testing.assert_allclose(got, wanted, atol=1e-3 * scale, rtol=0)


def test_a_replayed_graph_gives_the_same_bits(engine, facts, reference):
    with Session(engine) as replayed, Session(engine, cuda_graphs=False) as plain:
        for batch in (1, 5, 16):
            prepared = replayed.prepare((batch, *reference["images"].shape[1:]))
            assert prepared.graph is not None, prepared.why_no_graph
            images = tiled(reference, batch)
            assert np.array_equal(replayed.run(images)[facts.output], plain.run(images)[facts.output])
        # Shapes that take turns do not disturb each other's recorded graphs.
        for batch in (5, 1, 16, 7, 5, 1):
            images = tiled(reference, batch)
            assert np.array_equal(replayed.run(images)[facts.output], plain.run(images)[facts.output])


def test_threads_with_a_session_each(engine, facts, reference):
    images = tiled(reference, 5)
    with Session(engine) as session:
        expected = session.run(images)[facts.output]
    results: dict[int, list[np.ndarray]] = {}

    def work(number):
        with Session(engine) as session:
            results[number] = [session.run(images)[facts.output] for _ in range(20)]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 3 and all(np.array_equal(got, expected) for found in results.values() for got in found)


def test_gpu_arrays_in_and_out(engine, facts, reference):
    images = np.ascontiguousarray(tiled(reference, 4))
    stream = cuda.Stream()
    source = cuda.DeviceBuffer(images.nbytes)
    source.upload(images, stream)
    stream.synchronize()
    own = DeviceArray(source.pointer, images.shape, images.dtype, source)
    interface = {"shape": images.shape, "typestr": images.dtype.str, "data": (source.pointer, True), "version": 3}
    another = types.SimpleNamespace(__cuda_array_interface__=interface)  # as CuPy and Numba give theirs
    with Session(engine) as session:
        for given in (own, another):
            result = session.run(given)[facts.output]
            got = np.empty(result.shape, result.dtype)
            target = cuda.DeviceBuffer(result.num_bytes)
            target.copy_from(result.pointer, result.num_bytes, stream)
            target.download(got, stream)
            stream.synchronize()
            assert np.array_equal(got, session.run(images)[facts.output])


def test_torch_tensors_in_and_out(engine, facts, reference):
    torch = pytest.importorskip("torch")
    images = torch.from_numpy(tiled(reference, 4)).cuda()
    with Session(engine) as session:
        got = torch.from_dlpack(session.run(images)[facts.output]).cpu().numpy()
        assert np.array_equal(got, session.run(tiled(reference, 4))[facts.output])


def test_pipelined_results_come_in_order(engine, facts, reference):
    batches = [np.roll(tiled(reference, 8), shift, axis=0) for shift in range(12)]
    pinned = [pinned_array(batch.shape, batch.dtype) for batch in batches[:6]]
    for array, batch in zip(pinned, batches):
        array[...] = batch
    with Session(engine) as plain, PipelinedSession(engine) as pipelined:
        for given, got in zip(batches, pipelined.run([*pinned, *batches[6:]]), strict=True):
            assert np.array_equal(got[facts.output], plain.run(given)[facts.output])


def test_a_build_leaves_its_layers_and_its_timings(bundle, built):
    for plan in built.values():
        assert read_json(f"{plan}.layers.json")["Layers"]
    assert BACKEND.gpu is not None
    (timings,) = (bundle.root / "timing").iterdir()
    assert timings.stat().st_size > 1000 and BACKEND.version in timings.name and BACKEND.gpu.name.replace(" ", "-") in timings.name


@pytest.mark.parametrize("option", ["hardware_compatible", "version_compatible"])
def test_portable_engines(bundle, facts, reference, tmp_path, option):
    copy = Bundle(shutil.copytree(bundle.root, tmp_path / "bundle", ignore=shutil.ignore_patterns("engines")))
    code = run("build", copy.root, "--precision=fp16", f"--config.engine.{option}=True", batches=ONE_PROFILE)
    if code and option == "version_compatible":
        pytest.skip("needs TensorRT's lean runtime beside its builder")
    plan = copy.plan(BACKEND.name, BACKEND.version, BACKEND.arch, "fp16")
    assert code == 0 and read_json(f"{plan}.json")["options"][option]
    with Session(Engine(BACKEND, plan)) as session:
        got = session.run(tiled(reference, 5))[facts.output]
    assert compare(reference[facts.output][np.arange(5) % len(reference["images"])], got).cosine > 0.999


def test_kernels_are_named(engine):
    for row in fused_attention_by_kernels(engine):
        assert row["kernels"] > 10 and "of" in row["text"], row


def proof(bundle, precision):
    """What verification found of an engine."""
    found = read_json(bundle.report)["verify"]["engines"][precision]
    return {key: found[key] for key in ("cosine", "max_rel", "top1", "agreement", "num_images") if key in found}


def test_verify_and_benchmark_commands(bundle, built, record_property):
    assert run("verify", bundle.root, "--precision=fp32,fp16") == 0
    record_property("fp32", proof(bundle, "fp32"))
    record_property("fp16", proof(bundle, "fp16"))
    assert (
        run("benchmark", bundle.root, "--precision=fp32,fp16", "--batches=1,8,16", "--streams=1,2", "--duration=0.4", "--warmup=0.2") == 0
    )
    report = read_json(bundle.report)
    rows = report["benchmark"]
    assert len(rows) == 2 * 3 * 3 and all(row["cuda_graph"] and row["images_per_second"] > 0 for row in rows)
    assert report["recommended"]["precision"] in ("fp16", "fp32")
    # The GPU's own clock cannot see more than the CPU's, but for the resolution of the events, half a microsecond.
    assert all(row["gpu_p50_ms"] <= row["p50_ms"] + 1e-3 for row in rows)


def test_spellings_agree(bundle, engine, facts, reference, tmp_path, record_property):
    """Needs a bundle whose conversion was asked for spellings, `--config.spellings="('plugin','matmul')"`."""
    written = sorted(bundle.spellings.glob("*.onnx"))
    if not written:
        pytest.skip("the bundle has no spellings")
    copy = Bundle(shutil.copytree(bundle.root, tmp_path / "bundle"))
    plan = copy.plan(BACKEND.name, BACKEND.version, BACKEND.arch, "fp16")
    with Session(engine) as session:
        expected = {batch: session.run(tiled(reference, batch))[facts.output] for batch in (1, 5, 16)}
    for spelling in ("", *(path.stem for path in written)):
        assert run("build", copy.root, "--precision=fp16", f"--config.engine.spelling={spelling}", batches=ONE_PROFILE) == 0
        assert read_json(f"{plan}.json")["onnx"]["path"] == (f"{spelling}.onnx" if spelling else "model.onnx")
        with Session(Engine(BACKEND, plan)) as session:
            cosine = min(compare(wanted, session.run(tiled(reference, batch))[facts.output]).cosine for batch, wanted in expected.items())
        record_property(spelling or "model.onnx", {"cosine": cosine})
        # Each is the fp32 engine to within fp16's rounding, 5e-4; a wrong head, scale or sequence end gives a cosine far below.
        assert cosine > 0.9999, spelling


def test_latency_and_throughput_agree(engine, facts):
    with Session(engine) as session, Monitor() as monitor:
        workers = [Worker(session, engine.ranges[-1].optimal, transfers=False)]
        rate, latency = measure_throughput(workers, 0.5), measure_latency(workers, 0.5)
        # Queued runs cannot be slower than single ones; a tenth is left for a clock that moves.
        assert rate >= 0.9 * workers[0].batch / (np.median(latency.wall_ms) / 1e3)
    assert monitor.missing or monitor.summary()["sm_clock_mhz"] > 0


def test_an_engine_of_another_version_is_refused(built):
    with pytest.raises(BuildError, match="built by tensorrt"):
        Engine(dataclasses.replace(BACKEND, version="0.0.1"), built["fp32"])


def test_a_damaged_plan_with_a_matching_sidecar_is_refused(built, tmp_path):
    path = tmp_path / "fp32.plan"
    path.write_bytes(built["fp32"].read_bytes()[:1000])
    sidecar = read_json(f"{built['fp32']}.json")
    write_json(f"{path}.json", {**sidecar, "plan": {"bytes": 1000, "sha256": hash_file(path)}})
    with pytest.raises(BuildError, match="does not load"):
        Engine(BACKEND, path)


def require_int8_within_a_point(bundle):
    """Verifies INT8 and FP16, top-1 too where the bundle has labels, and has the faster one recommended."""
    assert run("verify", bundle.root, "--precision=fp16,int8") == 0
    assert run("benchmark", bundle.root, "--precision=fp16,int8", "--batches=16", "--duration=0.4", "--warmup=0.2") == 0
    report = read_json(bundle.report)
    rates = {
        precision: max(row["images_per_second"] for row in report["benchmark"] if row["precision"] == precision)
        for precision in ("fp16", "int8")
    }
    assert report["recommended"]["precision"] == "fp16" or rates["int8"] > rates["fp16"]
    built = next(row for row in report["engines"] if row["precision"] == "int8")
    assert built["int8_layers"], "an engine without int8 kernels proves nothing of int8"
    found = {"int8_layers": built["int8_layers"], "images_per_second": rates, "recommended": report["recommended"]}
    return {**proof(bundle, "int8"), **found}


def test_int8_by_qdq(bundle, built, record_property):
    if not bundle.onnx("int8").is_file():
        pytest.skip("the bundle has no INT8 graph")
    assert run("build", bundle.root, "--precision=int8") == 0
    record_property("int8", require_int8_within_a_point(bundle))


def test_calibrator(bundle, facts, built, record_property):
    if not BACKEND.has_calibrator:
        pytest.skip("this TensorRT has no calibrators")
    if not bundle.images("calibration").exists():
        pytest.skip("the bundle has no calibration images")
    words = ("build", bundle.root, "--precision=int8", "--config.engine.calibrator=True", "--config.calibration.batch_size=4")
    assert run(*words) == 0
    record_property("int8", require_int8_within_a_point(bundle))
    images_path = bundle.images("calibration")
    num_images = len(np.load(images_path, mmap_mode="r")) // 4 * 4
    source_hash = hash_source(graph_hashes(bundle.onnx()), images_path, num_images=num_images, preprocessing=facts.preprocess)
    key = CacheKey("entropy", BACKEND.version, source_hash)
    (path,) = bundle.root.glob(f"calibration.tensorrt-{BACKEND.version}-entropy-*.cache")
    cache = load_cache(path, key)
    assert cache is not None and all(scale >= 0 for scale in parse_cache(cache)[1].values())
    written = path.stat().st_mtime_ns
    assert run(*words, "--force", batches=ONE_PROFILE) == 0 and path.stat().st_mtime_ns == written  # read, not made again
    with pytest.raises(CalibrationError, match="made as"):
        load_cache(path, dataclasses.replace(key, algorithm="minmax"))
    assert run(*words, "--config.calibration.method=minmax", batches=ONE_PROFILE) == 0
    assert len(list(bundle.root.glob(f"calibration.tensorrt-{BACKEND.version}-minmax-*.cache"))) == 1
    assert path.stat().st_mtime_ns == written
