"""Ceilings on the simulated GPU: what is asked of it, what is taken from data sheets, and the graph of the product."""

import dataclasses

import numpy as np
import onnx
import onnxruntime
import pytest
import simulated_gpu

from vit_convert.core.errors import BenchmarkError, BuildError
from vit_convert.core.progress import Progress
from vit_convert.engine.backend.trt import load_backend
from vit_convert.engine.builder.build import build_engine
from vit_convert.engine.builder.request import BuildRequest
from vit_convert.engine.measure import ceilings
from vit_convert.engine.measure.ceilings import copy_gb_per_s, measure_ceilings, product_graph


@pytest.mark.parametrize(("precision", "kind"), [("fp32", "FLOAT"), ("fp16", "FLOAT16"), ("bf16", "BFLOAT16")])
def test_the_graph_is_one_product(precision, kind):
    model = onnx.load_from_string(product_graph(300, precision))
    onnx.checker.check_model(model, full_check=True)
    # the newest that TensorRT 8.6 reads, and the newest format that has it
    assert ([row.version for row in model.opset_import], model.ir_version) == ([17], 8)
    (given,), (found,) = model.graph.input, model.graph.output
    for value in (given, found):
        assert [side.dim_value for side in value.type.tensor_type.shape.dim] == [300, 300]
        assert value.type.tensor_type.elem_type == getattr(onnx.TensorProto, kind)
    assert [(node.op_type, list(node.input)) for node in model.graph.node] == [("MatMul", ["x", "x"])]


def test_it_computes_the_square():
    session = onnxruntime.InferenceSession(product_graph(8, "fp32"), providers=["CPUExecutionProvider"])
    x = np.random.default_rng(0).standard_normal((8, 8), np.float32)
    np.testing.assert_allclose(session.run(None, {"x": x})[0], x @ x, rtol=1e-5, atol=1e-5)


def test_it_is_built_as_it_stands(tmp_path):
    """By a real builder, which needs no GPU: in the type that the graph has."""
    pytest.importorskip("tensorrt_rtx")
    (tmp_path / "product.onnx").write_bytes(product_graph(8192, "fp16"))
    request = BuildRequest(tmp_path / "product.onnx", "fp16")
    found = build_engine(
        load_backend("rtx", for_this_gpu=False), request, tmp_path / "product.plan", progress=Progress(quiet=True)
    )
    assert found.products == {"fp16": 1}


@pytest.fixture
def built(gpu, monkeypatch):
    """What would be built, as engines of the simulated GPU."""
    asked = []

    def build(backend, request, plan, *, progress):
        asked.append(request.precision)
        if request.precision == "fp16":
            raise BuildError("no fp16 here")
        simulated_gpu.write_plan(plan, request.onnx_path, [((16, 16),) * 3], precision=request.precision)

    monkeypatch.setattr(ceilings, "build_engine", build)
    monkeypatch.setattr(ceilings, "_COPIED", 1 << 16)
    return gpu[0], asked


def measured(backend, precisions, name="NVIDIA H200", **options):
    named = dataclasses.replace(backend, gpu=dataclasses.replace(backend.gpu, name=name))
    return measure_ceilings(named, precisions, progress=Progress(quiet=True), side=16, seconds=0.02, **options)


def test_what_fails_or_is_quantized_is_of_the_data_sheet(built):
    backend, asked = built
    found = measured(backend, ["fp32", "fp16", "int8"])
    assert asked == ["fp32", "fp16"] and found.measured == ("fp32", "memory")
    assert found.tflops["fp16"] == 989 and found.tflops["int8"] == 1979 and found.tflops["fp32"] != 67
    assert found.source == "measured: fp32, memory; from the data sheet of NVIDIA H200: fp16, bf16, int8, fp8"


def test_a_gpu_without_a_data_sheet(built):
    assert measured(built[0], ["fp16"], name="Some GPU") is None
    found = measured(built[0], ["fp32"], name="Some GPU")
    assert found.measured == ("fp32", "memory") and [*found.tflops] == ["fp32"] and found.sheet == ""


def test_a_copy_reads_and_writes(gpu, monkeypatch):
    monkeypatch.setattr("vit_convert.engine.backend.cuda.Event.elapsed_ms", lambda self, end: 4.0)
    # 20 copies of 1 MiB in 4 ms, each read once and written once
    assert copy_gb_per_s(1 << 20) == pytest.approx(2 * 20 * 2**20 / 4e-3 / 1e9)


def test_what_a_product_of_matrices_takes(built, monkeypatch):
    """A multiplication and an addition for each of 16 · 16 · 16 terms, of 200 products a second."""
    monkeypatch.setattr(ceilings, "measure_throughput", lambda workers, seconds: 200.0 * 16)
    found = ceilings.product_tflops(built[0], "fp32", 16, 0.02, progress=Progress(quiet=True))
    assert found == pytest.approx(2 * 16**3 * 200 / 1e12)


@pytest.mark.parametrize("milliseconds", [0.0, -1.0, float("nan")])
def test_a_clock_that_stands_still(gpu, monkeypatch, milliseconds):
    monkeypatch.setattr("vit_convert.engine.backend.cuda.Event.elapsed_ms", lambda self, end: milliseconds)
    with pytest.raises(BenchmarkError, match="20 copies of 1024 bytes took"):
        copy_gb_per_s(1024)


def test_what_is_copied_is_more_than_a_cache_holds():
    assert ceilings._COPIED > 4 * 126 * 2**20  # B200's second level, the largest
