"""Which tensors get a pair, in the graph forms that export makes."""

import onnx_ir as ir
import pytest
from tiny_vit import TinyViT

from vit_convert.core.errors import UsageError
from vit_convert.core.layer_names import block_of, kind_of
from vit_convert.quantize.graph import node_blocks
from vit_convert.quantize.placement import place


def vit(tmp_path, **options):
    return ir.load(TinyViT(**options).save(tmp_path / "model.onnx"))


def kinds(placement):
    return [site.name for site in placement.sites]


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("Transformer/encoderblock_3/MlpBlock_0/Dense_0/kernel", "block_03"),
        ("Transformer/encoderblock_11/LayerNorm_0/scale", "block_11"),
        ("MixerBlock_7/token_mixing/Dense_0/kernel", "block_07"),
        ("blocks/0/attn/qkv/kernel", "block_00"),
        ("Transformer/encoder_norm/scale", None),
        ("MAPHead_0/MlpBlock_0/Dense_0/kernel", None),
        ("head/kernel", None),
    ],
)
def test_block_names(name, block):
    assert block_of(name) == block


def test_kinds():
    scope = "Transformer/encoderblock_0/MultiHeadDotProductAttention_0"
    assert [kind_of(f"{scope}/{n}/kernel") for n in ("query", "qkv", "out")] == ["query", "qkv", "out"]
    assert [kind_of(f"b/MlpBlock_0/Dense_{i}/kernel") for i in (0, 1)] == ["fc1", "fc2"]
    assert kind_of("head/kernel") == "head"


def test_nodes_know_their_block(tmp_path):
    blocks = {node.outputs[0].name: block for node, block in node_blocks(vit(tmp_path).graph).items()}
    attention = "Transformer/encoderblock_1/MultiHeadDotProductAttention_0"
    assert blocks[f"{attention}/softmax"] == blocks["Transformer/encoderblock_1/output"] == "block_01"
    assert blocks["embedded"] is blocks["Transformer/encoder_norm/out"] is blocks["pooled"] is blocks["logits"] is None


def test_blocks_without_names_come_from_what_feeds_them(tmp_path):
    model = vit(tmp_path)
    expected = {node.outputs[0].name: block for node, block in node_blocks(model.graph).items()}
    for node in model.graph:
        node.name = None
    assert {node.outputs[0].name: block for node, block in node_blocks(model.graph).items()} == expected


def test_linears_only_by_default(tmp_path):
    placement = place(vit(tmp_path))
    assert kinds(placement) == [f"block_{i:02d}/{kind}" for i in (0, 1) for kind in ("qkv", "out", "fc1", "fc2")]
    scope = "Transformer/encoderblock_0"
    assert placement.tensors()[:4] == [
        f"{scope}/LayerNorm_0/out",
        f"{scope}/MultiHeadDotProductAttention_0/merged",
        f"{scope}/LayerNorm_1/out",
        f"{scope}/MlpBlock_0/gelu",
    ]
    assert not any("embedding" in w or "head" in w for w in placement.weights())


def test_separate_query_key_value_share_their_tensor(tmp_path):
    placement = place(vit(tmp_path, fused_qkv=False))
    first = [site for site in placement.sites if site.kind in ("query", "key", "value") and site.block == "block_00"]
    assert len(first) == 3 and len({site.tensor for site in first}) == 1
    assert len(placement.tensors()) == 8


def test_attention_is_all_or_nothing(tmp_path):
    model = vit(tmp_path)
    attention = ["scaled_q", "k", "softmax", "v", "attended"]
    placement = place(model, attention=True)
    assert not placement.declined
    assert [s.kind for s in placement.sites if s.block == "block_01"] == ["qkv", *attention, "out", "fc1", "fc2"]
    by_kind = {s.kind: s for s in placement.sites if s.block == "block_01"}
    assert by_kind["softmax"].amax == 1.0 and by_kind["softmax"].tensor not in placement.tensors()
    # one pair, before the heads are merged, serves the product and the projection
    assert by_kind["out"].tensor == by_kind["attended"].tensor
    kept = place(model, attention=True, keep_fp16=["block_01/v"])
    assert [s.kind for s in kept.sites if s.block == "block_01"] == ["qkv", "out", "fc1", "fc2"]


def test_attention_says_why_it_declines(tmp_path):
    scaled_late = place(vit(tmp_path, scale_scores=True), attention=True)
    assert set(scaled_late.declined) == {"block_00", "block_01"}
    assert "scale has to multiply the query" in scaled_late.declined["block_00"]
    assert len(scaled_late.sites) == 8


def test_wide_heads_decline(tmp_path, monkeypatch):
    monkeypatch.setattr("vit_convert.quantize.placement._HEAD_DIMS", (16, 64))
    declined = place(vit(tmp_path), attention=True).declined
    assert declined["block_00"] == "head dimension 32: TensorRT fuses INT8 attention for 16 or 64"


def test_patterns(tmp_path):
    model = vit(tmp_path)
    assert kinds(place(model, keep_fp32=["block_00"], keep_fp16=["*/fc2"])) == [
        "block_01/qkv",
        "block_01/out",
        "block_01/fc1",
    ]
    assert kinds(place(model, quantize_only=["*/MlpBlock_0/*"])) == [
        "block_00/fc1",
        "block_00/fc2",
        "block_01/fc1",
        "block_01/fc2",
    ]
    assert kinds(place(model, quantize_only=["Transformer/encoderblock_1"], keep_fp16=["block_01/fc*"])) == [
        "block_01/qkv",
        "block_01/out",
    ]
    assert kinds(place(model, quantize_only=["head"])) == ["head/head"]


def test_a_pattern_that_matches_nothing_is_an_error(tmp_path):
    with pytest.raises(
        UsageError, match=r"keep_fp32: 'block_2' matches no block, layer or node\. Did you mean block_0"
    ):
        place(vit(tmp_path), keep_fp32=["block_2"])


@pytest.mark.parametrize("fused_qkv", [True, False])
def test_all_that_read_what_loses_too_much_stay_out(tmp_path, fused_qkv):
    model = vit(tmp_path, fused_qkv=fused_qkv)
    read = {site.name: site.tensor for site in place(model).sites}
    lost = {read["block_00/fc2"], read["block_01/qkv" if fused_qkv else "block_01/key"]}
    left = ["block_00/qkv"] if fused_qkv else ["block_00/query", "block_00/key", "block_00/value"]
    wanted = [*left, "block_00/out", "block_00/fc1", "block_01/out", "block_01/fc1", "block_01/fc2"]
    assert kinds(place(model, leave_out=lost)) == wanted
    assert kinds(place(model, leave_out=lost, quantize_only=["block_00"])) == wanted[: wanted.index("block_01/out")]
    # the pair of attended values serves the projection, too: attention asked for is attention that is quantized
    attended = place(model, attention=True, leave_out={read["block_00/out"]})
    assert "block_00/attended" in kinds(attended) and "block_00/out" not in kinds(attended)
