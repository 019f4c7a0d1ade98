"""Fused attention is read from the wording of each TensorRT generation's inspector."""

import types

import pytest
import simulated_gpu
from engine_graphs import BATCH, IMAGE

from vit_convert.engine.builder.layer_info import (
    FusedAttention,
    count_fused,
    count_int8,
    engine_layers,
    fused_attention,
)
from vit_convert.engine.runtime.engine import Engine


def layer(name, tactic, datatype, key="Format/Datatype"):
    operand = {"Name": "x", "Location": "Device", "Dimensions": [1, 12, 197, 64], key: datatype}
    return {
        "Name": name,
        "LayerType": "kgen",
        "Inputs": [operand],
        "Outputs": [operand],
        "TacticName": tactic,
        "StreamId": 0,
    }


def test_counts_fused_kernels_of_tensorrt_10():
    entries = [layer(f"_gemm_mha_v2_myl0_{i}", "_gemm_mha_v2_0xa2b3", "Half") for i in range(12)]
    entries.append(
        layer("/encoder/layers_0/mha/attn/query/MatMul_myl0_9", "sm80_xmma_gemm_f16f16_f16f16_f16_nn_n", "Half")
    )
    found = fused_attention({"Layers": entries, "Bindings": ["images", "logits"]})
    assert found == FusedAttention(12, {"fp16": 12})
    assert found.describe(12) == "yes, fp16, 12 of 12"


def test_node_names_that_hold_mha_are_no_kernels():
    entries = [layer("block_00/mha/qk+block_00/mha/softmax_myl0_3", "__myl_SofMul_0x12", "Half")]
    found = fused_attention({"Layers": entries})
    assert found == FusedAttention(0, {})
    assert found.describe(12) == "no, 0 of 12"


def test_datatype_field_of_tensorrt_11():
    entries = [
        layer("_gemm_mha_v2_myl0_4", "_gemm_mha_v2_0xa2b3", "BFloat16", key="Datatype"),
        layer("_gemv_mha_v1_myl0_5", "", "Int8", key="Datatype"),
    ]
    found = fused_attention({"Layers": entries, "I/O Tensors": []})
    assert found == FusedAttention(2, {"bf16": 1, "int8": 1})
    assert found.describe(12) == "in part, bf16, int8, 2 of 12"


def test_hidden_layers_tell_nothing():
    hidden = layer("{ForeignNode[block_00/norm...head/out]}", "", "Row major linear FP16 format")
    assert fused_attention({"Layers": [hidden]}) is None
    assert fused_attention({"Layers": ["block_00/linear"]}) is None  # an engine without detailed verbosity


UNTOLD = "N/A due to dynamic shapes"  # what 8.6 says of every operand of an engine with a dynamic batch


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"Weights": {"Type": "Int8", "Count": 27648}, "TacticName": "sm90_xmma_fprop_implicit_gemm_f16f16"}, 1),
        (
            {
                "Weights": {"Type": "Half", "Count": 27648},
                "TacticName": "sm80_xmma_fprop_implicit_gemm_i8i8_i8i32_f32_nhwckrsc_nhwc",
            },
            1,
        ),
        ({"TacticName": "ampere_int8_i8816cudnn_int8_128x128_ldg16_relu"}, 1),
        (
            {
                "Weights": {"Type": "Half"},
                "TacticName": "sm90_xmma_fprop_implicit_gemm_f16f16_f16f32_f32_nhwckrsc_nhwc_gelu",
            },
            0,
        ),
        ({"Weights": {"Type": "Half"}}, 0),
    ],
)
def test_int8_products_are_counted_without_types_of_their_operands(fields, expected):
    entry = {**layer("block_00/fc1", "", UNTOLD), "LayerType": "CaskConvolution", **fields}
    again = {**entry, "Name": "block_00/fc1 [profile 1]"}
    assert count_int8({"Layers": [entry, again]}) == expected


def test_int8_products_are_counted_by_their_operands():
    def of_type(kind, datatype):
        return {**layer("block_00/fc1", "", datatype), "LayerType": kind}

    wide = "Thirty-two wide channel vectorized row major Int8 format"
    entries = [of_type("CaskConvolution", wide), of_type("CaskGemmMatrixMultiply", "Int8"), of_type("Reformat", wide)]
    hidden = layer("{ForeignNode[block_00/norm...head/out]}", "", "Row major linear FP16 format")
    assert count_int8({"Layers": [hidden, *entries, of_type("CaskConvolution", "Row major linear FP16 format")]}) == 2
    assert count_int8({"Layers": [hidden, "block_00/linear"]}) == 0


def written(bundle_path):
    shapes = [[(size, *IMAGE) for size in BATCH.values()]]
    return simulated_gpu.write_plan(bundle_path / "fp32.plan", bundle_path / "model.onnx", shapes)


@pytest.mark.parametrize("answer", [None, "", "not JSON"])
def test_an_inspector_that_does_not_tell(gpu, bundle_path, monkeypatch, answer):
    inspector = types.SimpleNamespace(get_engine_information=lambda form: answer)
    loaded = types.SimpleNamespace(create_engine_inspector=lambda: inspector if answer is not None else None)
    monkeypatch.setattr(gpu[0].module, "LayerInformationFormat", types.SimpleNamespace(JSON=1), raising=False)
    engine = Engine(gpu[0], written(bundle_path))
    engine._cuda_engine = loaded
    found, reason = engine_layers(engine)
    assert found is None and reason.startswith("TensorRT's inspector does not tell")


def test_the_first_operand_tells_the_type():
    """The second is a scale, or weights."""
    entry = layer("_gemm_mha_v2_myl0_0", "_gemm_mha_v2_0xa2b3", "Half")
    entry["Inputs"] = [*entry["Inputs"], {"Name": "s", "Format/Datatype": "Float"}]
    assert fused_attention({"Layers": [entry]}) == FusedAttention(1, {"fp16": 1})


def test_kernel_names_of_a_profiled_run():
    kernels = [
        ("__mye8037_gemm_mha_v2", "FP16"),
        ("fmha_v2_flash_attention_fp32_S_197_sm90", "Float"),
        ("sm90_xmma_gemm", "Half"),
    ]
    assert count_fused(kernels) == FusedAttention(2, {"fp16": 1, "fp32": 1})
    # ours, as nvcc mangles them, with what an engine in FP16 says of all its kernels
    ours = [
        "_ZN3vit43_GLOBAL__N__3fca7f41_10_windows_cu_7c5cb4d614windows_kernelEPKaPKfP6__halfiiif",
        "_ZN3vit41_GLOBAL__N__f4908c7c_9_stream_cu_f678ec4a13stream_kernelILi72EEEvPKaP6__halfiiff",
        "void vit::(anonymous namespace)::attention_kernel<__half, __half, 64, 5, 2, 2, true>(signed char const*)",
        "_ZN3vit38_GLOBAL__N__07b6d21d_7_norm_cu_5e5c3c1f11norm_kernelI6__halfLi3EEEvNS_4NormE",
    ]
    assert count_fused((name, f"{name} fp16") for name in ours) == FusedAttention(3, {"fp16": 3})


@pytest.mark.parametrize("version_compatible", [False, True])
def test_layers_of_a_version_compatible_engine(gpu, bundle_path, monkeypatch, version_compatible):
    backend, driver = gpu

    class Runtime:
        """Loads a version-compatible plan only where the plan's own code may run, as TensorRT does."""

        engine_host_code_allowed = False

        def __init__(self, logger):
            pass

        def deserialize_cuda_engine(self, plan):
            if self.engine_host_code_allowed != version_compatible:
                return None
            inspector = types.SimpleNamespace(get_engine_information=lambda layout: '{"Layers": ["a\tb"]}')
            loaded = simulated_gpu.CudaEngine(driver, None, plan)
            loaded.create_engine_inspector = lambda: inspector
            return loaded

    monkeypatch.setattr(backend.module, "Runtime", Runtime)
    monkeypatch.setattr(backend.module, "LayerInformationFormat", types.SimpleNamespace(JSON=0), raising=False)
    plan = written(bundle_path)
    options = {"version_compatible": version_compatible, "hardware_compatible": False}
    simulated_gpu.change_sidecar(plan, options=options)
    assert engine_layers(Engine(backend, plan)) == ({"Layers": ["a\tb"]}, "")
