"""The session that outlives its engine: onnxruntime takes over, with a reason, when the engine does not load or
breaks."""

import concurrent.futures
import errno
import gc
import threading
import weakref

import numpy as np
import onnxruntime
import pytest
import simulated_gpu
from reconverted import as_left, convert_another_model

from vit_convert.core.bundle import Bundle, hash_file, read_json, write_json
from vit_convert.core.engine_results import EngineCheck
from vit_convert.core.errors import BenchmarkError, BuildError, UsageError
from vit_convert.engine.backend import cuda
from vit_convert.engine.bundle_engines import keep_proof
from vit_convert.engine.handoff import judged_by
from vit_convert.engine.runtime.session import Session
from vit_convert.serve.session import FallbackSession

PLAN = "engines/tensorrt-8.6.0-sm90/fp32.plan"


def images(path, batch=3):
    return np.load(path / "reference.npz")["images"][:batch]


def expected(path):
    session = onnxruntime.InferenceSession(path / "model.onnx", providers=["CPUExecutionProvider"])
    return session.run(None, {"images": images(path)})[0]


@pytest.fixture
def backend(gpu, monkeypatch):
    monkeypatch.setattr("vit_convert.serve.session.load_backend", lambda name, **_: gpu[0])
    return gpu[0]


def assert_onnxruntime(session, path, reason):
    assert session.runs_on == "onnxruntime" and reason in session.reason
    np.testing.assert_array_equal(session.run(images(path))["logits"], expected(path))
    session.close()


def test_working_engine_is_used(backend, engines):
    path = engines("fp32")
    session = FallbackSession(Bundle(path), path / PLAN)
    np.testing.assert_allclose(
        session.run(images(path))["logits"], expected(path), atol=1e-5
    )  # float32 logits of order 1, another batch size
    assert (session.runs_on, session.reason) == ("tensorrt", "")
    session.close()


def test_engine_of_an_earlier_graph_is_not_served(backend, engines):
    """Going over to onnxruntime would change the weights in the middle."""
    path = engines("fp32")
    convert_another_model(path)
    assert_onnxruntime(FallbackSession(Bundle(path), path / PLAN), path, "built from another model.onnx")


def test_engine_of_a_typed_graph_goes_with_the_model_that_it_was_made_of(backend, engines):
    path = engines("fp32")
    bundle = Bundle(path)
    simulated_gpu.change_sidecar(path / PLAN, model={"sha256": hash_file(bundle.onnx())})
    typed = path / "model.fp16.onnx"
    typed.write_bytes((path / "model.onnx").read_bytes())
    sidecar = read_json(path / f"{PLAN}.json")
    write_json(path / f"{PLAN}.json", {**sidecar, "onnx": {"path": typed.name, "sha256": hash_file(typed)}})
    as_left(path, typed.name)
    keep_proof(path / PLAN, EngineCheck.from_dict({"passed": True}), judged_by(bundle))
    FallbackSession(bundle, path / PLAN).close()
    convert_another_model(path)  # but not to the end
    assert_onnxruntime(FallbackSession(bundle, path / PLAN), path, "built from another model.onnx than is there now")


def test_read_only_bundle(backend, engines, monkeypatch):
    path = engines("fp32")
    (path / PLAN).write_bytes(b"cut")

    def refuse(*arguments, **options):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    assert_onnxruntime(FallbackSession(Bundle(path), path / PLAN), path, "engine does not load: ")


def test_damaged_engine(backend, engines):
    path = engines("fp32")
    (path / PLAN).write_bytes(b"cut")
    assert_onnxruntime(FallbackSession(Bundle(path), path / PLAN), path, "engine does not load: ")


def test_missing_engine_and_no_gpu(bundle_path):
    if cuda.gpu() is not None:
        pytest.skip("this machine has a GPU")
    # TensorRT-RTX where it is installed, or none at all
    session = FallbackSession(Bundle(bundle_path), bundle_path / PLAN)
    assert_onnxruntime(session, bundle_path, "engine does not load: ")


def test_engine_of_another_version(backend, engines):
    path = engines("fp32")
    sidecar = read_json(path / f"{PLAN}.json")
    write_json(path / f"{PLAN}.json", {**sidecar, "version": "10.0.1"})
    assert_onnxruntime(FallbackSession(Bundle(path), path / PLAN), path, "built by tensorrt 10.0.1, here is 8.6.0")


def test_sidecar_without_keys(backend, engines):
    path = engines("fp32")
    write_json(path / f"{PLAN}.json", {"plan": {}})
    assert_onnxruntime(FallbackSession(Bundle(path), path / PLAN), path, "engine does not load: ")


def test_engine_that_breaks_in_a_run(backend, gpu, engines):
    path = engines("fp32", broken=True)
    session = FallbackSession(Bundle(path), path / PLAN)
    assert session.runs_on == "tensorrt" and gpu[1].device
    np.testing.assert_array_equal(session.run(images(path))["logits"], expected(path))
    assert not gpu[1].device and not gpu[1].queues  # the engine's session is closed
    assert_onnxruntime(session, path, "engine failed in a run: ")


def test_session_that_cannot_be_closed_is_left_behind(backend, engines, monkeypatch):
    path = engines("fp32", broken=True)
    session = FallbackSession(Bundle(path), path / PLAN)

    def fail(self):
        raise BuildError("cuStreamSynchronize: CUDA error 700")

    monkeypatch.setattr(Session, "close", fail)
    session.run(images(path))
    assert_onnxruntime(session, path, "engine failed in a run: ")


def test_threads_that_share_a_breaking_engine_all_get_results(backend, gpu, engines, monkeypatch):
    """All runs begin on the engine; the first to fail closes it under the others, which then wait for it."""
    path = engines("fp32")
    session = FallbackSession(Bundle(path), path / PLAN)
    wanted, made, everyone = expected(path), [], threading.Barrier(4)
    run, stand_in = Session.run, session._stand_in

    def fail(engine_session, given):
        everyone.wait(10)
        engine_session.engine._cuda_engine.broken = True
        return run(engine_session, given)

    def counted(*arguments):
        made.append(arguments)
        return stand_in(*arguments)

    monkeypatch.setattr(Session, "run", fail)
    monkeypatch.setattr(session, "_stand_in", counted)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for got in pool.map(session.run, [images(path)] * 4):
            np.testing.assert_array_equal(got["logits"], wanted)
    gc.collect()
    assert len(made) == 1 and not gpu[1].device and not gpu[1].queues
    assert_onnxruntime(session, path, "engine failed in a run: fp32.plan: a run: simulated: a kernel failed")


@pytest.mark.parametrize("broken", [False, True])
def test_closed_session_keeps_nothing_and_runs_no_more(backend, engines, broken):
    path = engines("fp32", broken=broken)
    session = FallbackSession(Bundle(path), path / PLAN)
    loaded = weakref.ref(session._runner.engine)
    session.run(images(path))
    session.close()
    session.close()
    gc.collect()
    assert loaded() is None
    with pytest.raises(BenchmarkError, match="the session is closed"):
        session.run(images(path))
    assert session.runs_on == ("onnxruntime" if broken else "tensorrt")  # closing was no failure


def test_wrong_images_do_not_cost_the_engine(backend, engines):
    path = engines("fp32")
    session = FallbackSession(Bundle(path), path / PLAN)
    for wrong, message in (
        (images(path).astype(np.float64), "float64"),
        (images(path)[:, :-1], "the engine takes"),
        (images(path)[:, :, :-1], "the engine takes"),
    ):
        with pytest.raises(BenchmarkError, match=message):
            session.run(wrong)
        assert session.runs_on == "tensorrt"
    session.close()


def test_unchecked_graph_stands_in_for_nothing(bundle_path):
    manifest = read_json(bundle_path / "manifest.json")
    next(row for row in manifest["stages"] if row["name"] == "check")["result"]["passed"] = False
    write_json(bundle_path / "manifest.json", manifest)
    with pytest.raises(BenchmarkError, match="did not pass its check"):
        FallbackSession(Bundle(bundle_path), bundle_path / PLAN)


def test_damaged_graph_stands_in_for_nothing(backend, engines):
    path = engines("fp32")
    (path / PLAN).write_bytes(b"cut")
    (path / "model.onnx").write_bytes((path / "model.onnx").read_bytes()[:1000])
    for message in (r"model\.onnx: is not the file that stage export left", r"model\.onnx: onnxruntime: "):
        with pytest.raises(BenchmarkError, match=rf"{message}.*; engine does not load: ") as caught:
            FallbackSession(Bundle(path), path / PLAN)
        assert "Copy the whole bundle" in caught.value.fix
        as_left(path, "model.onnx")  # damaged before it was hashed


def test_a_gpu_that_stops_onnxruntime_too_leaves_the_cpu(backend, engines, monkeypatch):
    path = engines("fp32")
    (path / PLAN).write_bytes(b"cut")
    load, tried = onnxruntime.InferenceSession, []

    def make(graph, options, providers):
        tried.append(providers)
        # what a processor makes of fused pairs differs
        assert options.get_session_config_entry("session.disable_quant_qdq") == "1"
        if len(providers) > 1:
            raise RuntimeError("CUDA failure 999")
        return load(graph, options, providers=providers)

    monkeypatch.setattr(
        onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    monkeypatch.setattr(onnxruntime, "InferenceSession", make)
    session = FallbackSession(Bundle(path), path / PLAN)
    cpu = ("CPUExecutionProvider", {})
    # TF32 would be another model.onnx than was checked
    assert tried == [[("CUDAExecutionProvider", {"use_tf32": "0"}), cpu], [cpu]]
    monkeypatch.setattr(onnxruntime, "InferenceSession", load)
    assert_onnxruntime(session, path, "engine does not load: ")


def test_onnxruntime_refuses_wrong_images(bundle_path):
    session = FallbackSession(Bundle(bundle_path), bundle_path / PLAN)
    if session.runs_on != "onnxruntime":
        pytest.skip("this machine has a GPU")
    with pytest.raises(
        BenchmarkError, match=r"images: float32 \[1, 7, 7, 3\], the model takes float32 \[batch, 64, 64, 3\]"
    ):
        session.run(np.zeros((1, 7, 7, 3), np.float32))


def typed_engine(path, **check):
    """An fp16 engine of a typed graph, in a bundle whose conversion found `check` of that graph."""
    plan = path / "engines" / "tensorrt-8.6.0-sm90" / "fp16.plan"
    typed = path / "model.fp16.onnx"
    typed.write_bytes((path / "model.onnx").read_bytes())
    as_left(path, typed.name)
    write_json(f"{plan}.json", {**read_json(f"{plan}.json"), "onnx": {"path": typed.name, "sha256": hash_file(typed)}})
    manifest = read_json(path / "manifest.json")
    next(row for row in manifest["stages"] if row["name"] == "quantize")["result"]["checks"] = (
        {"fp16": check} if check else {}
    )
    write_json(path / "manifest.json", manifest)
    return plan


@pytest.mark.parametrize(
    ("check", "proof", "doubt"),
    [
        ({"passed": True}, None, ""),
        ({"passed": False}, None, "model.fp16.onnx did not pass its check against JAX"),
        ({}, None, "model.fp16.onnx was not checked against JAX"),
        ({"passed": False}, {"passed": True}, ""),
        ({"passed": True}, {"passed": False}, "fp16 missed its tolerance when the engine was verified"),
    ],
)
def test_only_what_is_proved_is_served(backend, engines, check, proof, doubt):
    path = engines("fp16")
    plan = typed_engine(path, **check)
    if proof:
        keep_proof(plan, EngineCheck.from_dict(proof), judged_by(Bundle(path)))
    session = FallbackSession(Bundle(path), plan)
    assert session.runs_on == ("onnxruntime" if doubt else "tensorrt") and doubt in session.reason
    session.close()


def test_an_engine_that_a_flag_made_is_served_when_it_is_verified(backend, engines):
    path = engines("fp16")
    plan = path / "engines" / "tensorrt-8.6.0-sm90" / "fp16.plan"
    assert_onnxruntime(FallbackSession(Bundle(path), plan), path, "engine is not proved: ")
    keep_proof(plan, EngineCheck.from_dict({"passed": True}), judged_by(Bundle(path)))
    session = FallbackSession(Bundle(path), plan)
    assert session.runs_on == "tensorrt"
    session.close()


def test_a_folder_is_enough(backend, engines):
    """The engine that was verified is found by itself; one that is not proved is not."""
    path = engines("fp32", "fp16")
    assert precision_served(path) == "fp32"


def test_what_the_benchmark_recommends_comes_first(backend, engines):
    path = engines("fp32", "fp16")
    keep_proof(path / PLAN.replace("fp32", "fp16"), EngineCheck.from_dict({"passed": True}), judged_by(Bundle(path)))
    assert precision_served(path) == "fp16"
    write_json(path / "benchmark.json", {"recommended": {"precision": "fp32"}})
    assert precision_served(path) == "fp32"
    write_json(path / "benchmark.json", {"recommended": {"precision": "int8"}})  # which is not there
    assert precision_served(path) == "fp16"


def precision_served(path):
    session = FallbackSession(path)
    assert session.runs_on == "tensorrt", session.reason
    precision = session._runner.engine.record.precision
    session.close()
    return precision


def test_without_an_engine_the_graph_stands_in(backend, engines):
    path = engines()
    assert_onnxruntime(FallbackSession(path), path, "no engine for tensorrt 8.6.0 on this host")


def test_no_bundle(tmp_path):
    with pytest.raises(UsageError, match=r"holds no manifest\.json"):
        FallbackSession(tmp_path)
