"""Fused attention told by the names of the kernels in a recorded run."""

import ctypes
import dataclasses
import json

import pytest
import simulated_gpu
from engine_graphs import BATCH, IMAGE

from vit_convert.core.progress import Progress
from vit_convert.engine.backend.sidecar import read_sidecar
from vit_convert.engine.builder import summary
from vit_convert.engine.builder.fused_kernels import fused_attention_by_kernels
from vit_convert.engine.runtime import cuda_graph
from vit_convert.engine.runtime.engine import Engine

# As TensorRT 8.6 names them.
KERNELS = (
    "_gemm_mha_v2_0x1f",
    None,
    "sm90_xmma_gemm_f16f16_f16f32_f32_tn_n_tilesize128x128",
    "_gemm_mha_v2_0x2e",
    "__myl_bb0_1_Res",
)


@pytest.fixture
def load(gpu, bundle_path):
    def make(precision, kernels, attentions=2):
        gpu[1].kernels = kernels
        ranges = [[(size, *IMAGE) for size in (4, 4, 4)], [(size, *IMAGE) for size in BATCH.values()]]
        path = simulated_gpu.write_plan(bundle_path / "x.plan", bundle_path / "model.onnx", ranges, precision=precision)
        engine = Engine(gpu[0], path)
        engine.record = dataclasses.replace(engine.record, attentions=attentions)
        return engine

    return make


def test_each_profile_is_told(load):
    rows = fused_attention_by_kernels(load("fp16", KERNELS))
    assert [row.batch for row in rows] == [4, 4]
    assert all(
        (row.kernels, row.count, row.precisions, row.text) == (4, 2, {"fp16": 2}, "yes, fp16, 2 of 2") for row in rows
    )


def test_a_kernel_that_does_not_say_its_type_is_unknown_but_in_an_fp16_engine(load):
    assert fused_attention_by_kernels(load("int8", KERNELS))[0].text == "yes, unknown, 2 of 2"
    assert fused_attention_by_kernels(load("int8", ("fmha_v2_int8_64_sm90", "fmha_v2_fp16_64_sm90")))[0].precisions == {
        "int8": 1,
        "fp16": 1,
    }


def test_attention_in_pieces(load):
    assert fused_attention_by_kernels(load("fp16", ("softmax", "gemm")))[0].text == "no, 0 of 2"
    assert fused_attention_by_kernels(load("fp16", KERNELS, attentions=12))[0].text == "in part, fp16, 2 of 12"


def test_an_old_driver_leaves_it_unknown(load, monkeypatch):
    monkeypatch.delattr(simulated_gpu.Driver, "cuFuncGetName")  # came with CUDA 12.3
    rows = fused_attention_by_kernels(load("fp16", KERNELS))
    assert all("cuFuncGetName: this CUDA driver does not have it" in row.unknown and row.count is None for row in rows)


def test_too_little_memory_to_look_is_no_failed_build(gpu, bundle_path, monkeypatch):
    shapes = [[(size, *IMAGE) for size in BATCH.values()]]
    plan = simulated_gpu.write_plan(bundle_path / "fp32.plan", bundle_path / "model.onnx", shapes)
    monkeypatch.setattr(summary, "engine_layers", lambda engine: ({"Layers": ["hidden"]}, ""))
    monkeypatch.setattr(simulated_gpu.CudaEngine, "device_memory_size", 2 * simulated_gpu.GPU.memory_bytes)
    found = summary.summarise(gpu[0], plan, read_sidecar(plan), warnings=["w"], progress=Progress(quiet=True))
    assert found.fused_attention is None and found.build_seconds == 1.5 and found.warnings == ("w",)
    assert "cuMemAlloc_v2: CUDA error 2" in found.fused_attention_unknown
    assert json.loads((bundle_path / "fp32.plan.layers.json").read_text()) == {"Layers": ["hidden"]}


def test_an_engine_that_does_not_load_is_no_failed_build(gpu, bundle_path):
    shapes = [[(size, *IMAGE) for size in BATCH.values()]]
    plan = simulated_gpu.write_plan(bundle_path / "fp32.plan", bundle_path / "model.onnx", shapes, content=b"no plan")
    (bundle_path / "fp32.plan.layers.json").write_text("{}")  # of an earlier engine
    found = summary.summarise(gpu[0], plan, read_sidecar(plan), warnings=[], progress=Progress(quiet=True))
    assert found.fused_attention is None and "does not load" in found.fused_attention_unknown
    assert not (bundle_path / "fp32.plan.layers.json").exists()


def test_layout_of_the_kernel_node():
    # CUDA_KERNEL_NODE_PARAMS_v2 in cuda.h: three pointers after seven unsigned ints, padded to 8 bytes, and two
    # handles.
    offsets = {
        name: getattr(cuda_graph._KernelNodeParams, name).offset
        for name in ("func", "kernel_params", "extra", "kern", "ctx")
    }
    assert offsets == {"func": 0, "kernel_params": 40, "extra": 48, "kern": 56, "ctx": 64}
    assert ctypes.sizeof(cuda_graph._KernelNodeParams) == 72
