"""The typed fp16/bf16 graphs: their types, their numbers, what stays float32.

onnxruntime's CPU provider computes fp16 graphs in float32 and drops the roundings between its kernels, so it cannot
show an overflow. What fp16 does is shown with onnx's reference evaluator, which rounds after every node.
"""

import subprocess
import sys

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from rounded import HALF, naive, run_rounded
from tiny_vit import TinyViT, normalize, run

from vit_convert.core.compare import compare
from vit_convert.core.errors import UsageError
from vit_convert.quantize.calibrate import calibrate
from vit_convert.quantize.graph import activations
from vit_convert.quantize.half_precision import to_bf16, to_fp16
from vit_convert.quantize.placement import place
from vit_convert.quantize.qdq import quantize


def save(model, path):
    ir.save(model, path, external_data=f"{path.name}.data")
    onnx.checker.check_model(path, full_check=True)
    return path


@pytest.mark.parametrize(
    "options",
    [{}, {"opset": 17}, {"opset": 17, "layernorm": "two_pass"}, {"fused_qkv": False, "layernorm": "fast_variance"}],
)
def test_fp16_matches_fp32(tmp_path, images, options):
    path = TinyViT(**options).save(tmp_path / "model.onnx")
    typed = save(to_fp16(ir.load(path)).model, tmp_path / "model.fp16.onnx")
    x = normalize(images[:8])
    reference = run(path, x)[0]
    # 2**-11 a rounding, about sixty roundings in a row, which mostly cancel: 0.4 % of scale
    for logits in (run(typed, x)[0], run_rounded(typed, x)):
        result = compare(reference, logits)
        assert result.cosine > 0.99999 and result.max_rel < 4e-3


@pytest.mark.parametrize("layernorm", ["op", "two_pass", "fast_variance"])
def test_fp16_survives_massive_channels_where_a_naive_cast_does_not(tmp_path, images, layernorm):
    path = TinyViT(layernorm=layernorm, outliers=700.0).save(tmp_path / "model.onnx")
    model = ir.load(path)
    stream = [name for name in activations(model.graph) if name.endswith("/output")]
    amax = calibrate(path, images, normalize, stream, method="minmax").amax
    assert 1.3e3 < max(amax.values()) < 1.5e3
    x = normalize(images[:8])
    reference = run(path, x)[0]
    typed = save(to_fp16(model).model, tmp_path / "model.fp16.onnx")
    assert compare(reference, run_rounded(typed, x)).cosine >= 0.999
    assert compare(reference, run(typed, x)[0]).cosine >= 0.999
    if layernorm != "op":
        cast = tmp_path / "naive.onnx"
        ir.save(naive(model), cast)
        ruined = compare(reference, run_rounded(cast, x.astype(np.float16)))
        assert not ruined.finite or ruined.cosine < 0.5  # x² = 2e6 is infinite in fp16


def test_inside_a_block_nothing_is_cast(tmp_path):
    typed = to_fp16(ir.load(TinyViT().save(tmp_path / "model.onnx")))
    casts = [node for node in typed.model.graph if node.op_type == "Cast"]
    assert [(node.inputs[0].name, node.outputs[0].name) for node in casts] == [
        ("images", "images/float16"),
        ("logits/inner", "logits"),
    ]
    assert typed.num_casts == 2 and not typed.islands and not typed.overflowing
    assert {v.dtype for v in typed.model.graph.initializers.values()} == {HALF, ir.DataType.INT64}
    assert "head/kernel" in typed.model.graph.initializers  # weights keep their names


def test_layernorm_has_one_type_and_fp32_statistics(tmp_path):
    graph = to_fp16(ir.load(TinyViT().save(tmp_path / "model.onnx")), keep_fp32=["block_01"]).model.graph
    norms = [node for node in graph if node.op_type == "LayerNormalization"]
    assert [node.inputs[0].dtype for node in norms] == [HALF, HALF, ir.DataType.FLOAT, ir.DataType.FLOAT, HALF]
    for node in norms:
        assert {value.dtype for value in node.inputs} == {node.inputs[0].dtype}
        assert node.attributes["stash_type"].as_int() == 1


@pytest.mark.parametrize("layernorm", ["two_pass", "fast_variance"])
def test_primitive_layernorm_keeps_its_statistics_in_fp32(tmp_path, layernorm):
    typed = to_fp16(ir.load(TinyViT(opset=17, layernorm=layernorm).save(tmp_path / "model.onnx")))
    by_name = {node.outputs[0].name: node for node in typed.model.graph}
    scope = "Transformer/encoderblock_0/LayerNorm_0"
    for part in ("mean", "square", "variance", "shifted", "deviation", "normalized"):
        assert {v.dtype for v in by_name[f"{scope}/{part}"].inputs if v.dtype != ir.DataType.INT64} == {
            ir.DataType.FLOAT
        }, part
    assert set(typed.islands.values()) == {"statistics"}
    # into and out of each of the five norms, the images and the logits
    assert typed.num_casts == 2 * 5 + 2


def test_keep_fp32_makes_an_island(tmp_path, images):
    path = TinyViT().save(tmp_path / "model.onnx")
    model = ir.load(path)
    typed = to_fp16(model, keep_fp32=["block_01", "embedding"])
    by_name = {node.outputs[0].name: node for node in typed.model.graph}
    assert (
        by_name["Transformer/encoderblock_1/MultiHeadDotProductAttention_0/softmax"].outputs[0].dtype
        == ir.DataType.FLOAT
    )
    assert by_name["Transformer/encoderblock_0/output"].outputs[0].dtype == HALF
    # the images reach the convolution unrounded
    assert typed.islands["nchw"] == "feeds only float32"
    assert by_name["embedding/Conv"].inputs[0].producer().inputs[0].name == "images"
    x = normalize(images[:4])
    assert compare(run(path, x)[0], run_rounded(save(typed.model, tmp_path / "typed.onnx"), x)).cosine > 0.99999
    everything = to_fp16(model, keep_fp32=["*"])
    assert everything.num_casts == 0
    with pytest.raises(UsageError, match="keep_fp32: 'block_9'"):
        to_fp16(model, keep_fp32=["block_9"])


def test_a_stream_beyond_fp16_stays_fp32(tmp_path, images):
    path = TinyViT(outliers=60_000.0).save(tmp_path / "model.onnx")
    model = ir.load(path)
    amax = calibrate(path, images, normalize, activations(model.graph), method="minmax").amax
    typed = to_fp16(model, amax=amax)
    assert typed.islands["Transformer/encoderblock_1/output"].startswith("Transformer/encoderblock_")
    assert "Transformer/encoderblock_1/MlpBlock_0/Dense_0/MatMul" not in typed.islands
    x = normalize(images[:4])
    reference = run(path, x)[0]
    assert compare(reference, run_rounded(save(typed.model, tmp_path / "islands.onnx"), x)).cosine > 0.999
    without = compare(reference, run_rounded(save(to_fp16(model).model, tmp_path / "without.onnx"), x))
    assert not without.finite or without.cosine < 0.9  # 1.2e5 is infinite in fp16


@pytest.mark.parametrize(("largest", "fits"), [(32752.0, True), (32753.0, False), (65000.0, False)])
def test_twice_what_was_seen_has_to_fit(tmp_path, largest, fits):
    """Half of fp16's largest number, 65504: other images exceed what a few of them reach."""
    model = ir.load(TinyViT().save(tmp_path / "model.onnx"))
    islands = to_fp16(model, amax={"Transformer/encoderblock_0/output": largest}).islands
    assert bool(islands) != fits
    if not fits:
        assert (
            islands["Transformer/encoderblock_0/output"] == f"Transformer/encoderblock_0/output reaches {largest:.3g}"
        )


def test_a_graph_without_types_is_typed_the_same(tmp_path):
    """As some exporters write them: no type of what lies between inputs and outputs."""
    path = TinyViT().save(tmp_path / "model.onnx")
    bare = onnx.load(path)
    del bare.graph.value_info[:]
    expected, found = to_fp16(ir.load(path)), to_fp16(ir.from_proto(bare))
    types = [
        {value.name: value.dtype for node in typed.model.graph for value in node.outputs if value.dtype is not None}
        for typed in (expected, found)
    ]
    assert types[0] == types[1] and found.num_casts == expected.num_casts == 2


def test_a_weight_beyond_fp16_stays_fp32_and_subnormal_ones_are_counted(tmp_path):
    vit = TinyViT()
    build = vit.linear

    def linear(x, scope, *args):
        result = build(x, scope, *args)
        if scope.endswith("encoderblock_0/MlpBlock_0/Dense_0"):
            vit.weights[f"{scope}/kernel"][0, :3] = 7e4
            vit.weights[f"{scope}/bias"][:5] = 1e-6
            vit.weights[f"{scope}/bias"][5:9] = 0
        return result

    vit.linear = linear
    model = ir.load(vit.save(tmp_path / "model.onnx"))
    weights = [v.const_value.numpy() for v in model.graph.initializers.values() if v.dtype == ir.DataType.FLOAT]
    typed = to_fp16(model)
    assert typed.overflowing == {"Transformer/encoderblock_0/MlpBlock_0/Dense_0/kernel": 7e4}
    assert "7e+04" in typed.islands["Transformer/encoderblock_0/MlpBlock_0/Dense_0/MatMul"]
    assert typed.num_subnormal == sum(int(((np.abs(w) < 2.0**-14) & (w != 0)).sum()) for w in weights) >= 5
    assert (
        typed.model.graph.initializers["Transformer/encoderblock_0/MlpBlock_0/Dense_0/kernel"].dtype
        == ir.DataType.FLOAT
    )


def test_a_weight_that_both_types_read_exists_in_both(tmp_path):
    model = ir.load(TinyViT(opset=17, layernorm="fast_variance").save(tmp_path / "model.onnx"))
    graph = to_fp16(model, keep_fp32=["Transformer/encoderblock_0/MlpBlock_0/gelu_half"]).model.graph
    both = {name for name in graph.initializers if f"{name}/float16" in graph.initializers}
    assert both and all(graph.initializers[f"{name}/float16"].dtype == HALF for name in both)


def test_fp16_inputs_and_outputs(tmp_path, images):
    path = TinyViT().save(tmp_path / "model.onnx")
    typed = to_fp16(ir.load(path), io_fp32=False)
    assert typed.num_casts == 0
    saved = save(typed.model, tmp_path / "model.fp16.onnx")
    x = normalize(images[:4])
    (logits,) = run(saved, x.astype(np.float16))
    assert logits.dtype == np.float16
    assert compare(run(path, x)[0], logits).cosine > 0.99999


@pytest.mark.parametrize("attention", [False, True])
def test_int8_graph_in_fp16(tmp_path, images, attention):
    path = TinyViT().save(tmp_path / "model.onnx")
    model = ir.load(path)
    placement = place(model, attention=attention)
    int8 = quantize(model, calibrate(path, images, normalize, placement.tensors()), placement.sites, target="trt10")
    typed = to_fp16(int8)
    assert typed.num_casts == 2
    for node in typed.model.graph:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            assert node.inputs[1].dtype == HALF
    x = normalize(images)
    result = compare(run(path, x)[0], run(save(typed.model, tmp_path / "int8.fp16.onnx"), x)[0])
    # INT8's own budget (test_qdq.py): an fp16 rounding adds only flips between neighbouring steps for values near an
    # edge.
    assert result.cosine > 0.998


def test_trt8_pairs_stay_fp32(tmp_path, images):
    path = TinyViT(opset=17).save(tmp_path / "model.onnx")
    model = ir.load(path)
    typed = to_fp16(quantize(model, calibrate(path, images, normalize), place(model).sites, target="trt8"))
    assert "QuantizeLinear has no FLOAT16 in opset 17" in typed.islands.values()
    save(typed.model, tmp_path / "typed.onnx")  # and is valid


def test_bf16(tmp_path):
    model = ir.load(TinyViT(outliers=60_000.0).save(tmp_path / "model.onnx"))
    typed = to_bf16(model)
    assert typed.islands == {"embedding/Conv": "Conv has no BFLOAT16 in opset 20", "nchw": "feeds only float32"}
    save(typed.model, tmp_path / "model.bf16.onnx")
    newer = ir.load(tmp_path / "model.onnx")
    newer.opset_imports[""] = 22
    assert not to_bf16(newer).islands


def test_the_given_model_is_left_alone(tmp_path):
    model = ir.load(TinyViT().save(tmp_path / "model.onnx"))
    before = ir.to_proto(model).SerializeToString()
    save(to_fp16(model).model, tmp_path / "model.fp16.onnx")
    assert ir.to_proto(model).SerializeToString() == before


STREAM = """
import resource, sys
import onnx_ir as ir
from vit_convert.quantize.half_precision import to_fp16
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
typed = to_fp16(ir.load(sys.argv[1]))
ir.save(typed.model, sys.argv[2], external_data="model.fp16.onnx.data")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_weights_stream(tmp_path):
    # 24 blocks of 2 M weights each; the largest weight (qkv) has 3 MiB
    path = TinyViT(width=512, blocks=24).save(tmp_path / "model.onnx")
    size_mib = (tmp_path / "model.onnx.data").stat().st_size / 2**20
    assert size_mib > 150
    command = [sys.executable, "-c", STREAM, str(path), str(tmp_path / "model.fp16.onnx")]
    # ru_maxrss is in KiB
    grown_mib = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) / 1024
    # a few copies of one weight, the graph itself and the allocator's slack; holding one copy of all weights would be
    # 150 MiB
    assert grown_mib < 40
