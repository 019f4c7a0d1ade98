"""Graphs of hybrids, Mixers and Swins: they agree with JAX at every block, are small, and are named after their
checkpoints."""

import collections
import dataclasses
import re

import numpy as np
import onnx_ir as ir
import pytest
from family_models import SMALL, images, model, reference

from vit_convert.core.errors import ExportError
from vit_convert.core.onnx_file import open_session, run_session
from vit_convert.export.exporter import export_model
from vit_convert.export.targets import lowering_named, target_named
from vit_convert.families.load import load_checkpoint
from vit_convert.families.random import write_random_checkpoint
from vit_convert.images.preprocess import preprocess_for

# Nodes of a stack's largest block: a Mixer's two MLPs; a bottleneck with its projection, and a ViT's block; a Swin's
# with shifted windows.
BUDGET = {
    ("mixer", "rtx"): {"MixerBlock_1": 16},
    ("mixer", "trt8"): {"MixerBlock_1": 30},
    ("hybrid", "rtx"): {"stage_2/block_0": 28, "stage_2/block_1": 22, "Transformer/encoderblock_1": 29},
    ("hybrid", "trt8"): {"stage_2/block_0": 28, "stage_2/block_1": 22, "Transformer/encoderblock_1": 36},
    ("swin", "rtx"): {"stage_0/block_2": 29, "stage_0/block_3": 57, "stage_1/block_0": 29},
    ("swin", "trt8"): {"stage_0/block_2": 34, "stage_0/block_3": 64, "stage_1/block_0": 34},
}


def assert_agrees(family, path, taps):
    """At 1e-4 of the scale, at a batch of one and of more; float32 in another order differs by about 1e-6."""
    session = open_session(path, taps)
    name = model(family).output
    for batch in (1, 3):
        for tensor, got in run_session(session, images(family)[:batch], [name, *taps]).items():
            expected = reference(family)[tensor][:batch]
            if got.size != expected.size:  # the last block of a hybrid computes the class token alone
                assert (family, tensor) in {("hybrid", "block_02"), ("hybrid", "encoder_norm")}
                expected = expected[:, :1]
            error = np.abs(got.reshape(expected.shape) - expected).max()
            assert error <= 1e-4 * np.abs(expected).max(), (tensor, batch)


@pytest.mark.parametrize("family", SMALL)
@pytest.mark.parametrize("target", ["rtx", "trt8"])
def test_agrees_block_by_block_within_its_budget(tmp_path, family, target):
    report = export_model(model(family), tmp_path / "model.onnx", target=target_named(target))
    assert list(report.taps) == list(model(family).taps)
    assert_agrees(family, tmp_path / "model.onnx", report.taps)
    assert report.num_shapes == (family == "hybrid")  # the class token is repeated for each image
    names = [node.name for node in ir.load(tmp_path / "model.onnx").graph]
    counts = collections.Counter(match[1] for name in names if (match := re.match(r"(.*[bB]lock_\d+)/", name)))
    for block, allowed in BUDGET[family, target].items():
        assert 0 < counts[block] <= allowed, block


@pytest.mark.parametrize(
    ("family", "lowering"),
    [
        ("mixer", "matmul"),
        ("swin", "primitives"),
        ("swin", "windows"),
        ("hybrid", "primitives"),
        ("hybrid", "groupnorm"),
    ],
)
def test_lowerings_for_tensorrt_8(tmp_path, family, lowering):
    report = export_model(model(family), tmp_path / "model.onnx", target=lowering_named("trt8", lowering))
    assert_agrees(family, tmp_path / "model.onnx", report.taps)


def test_what_windows_become(tmp_path):
    """All attention and all LayerNorms between convolutions are our kernels'; a LayerNorm takes the residual addition
    before it along, but for those behind a Gather."""
    export_model(model("swin"), tmp_path / "model.onnx", target=lowering_named("trt8", "windows"))
    graph = ir.load(tmp_path / "model.onnx")
    nodes, depths = list(graph.graph), [stack.depth for stack in model("swin").stacks]
    counts = collections.Counter(node.op_type for node in nodes)
    assert "Softmax" not in counts and counts["VitWindowAttention"] == sum(depths)
    assert counts["VitAddNorm"] + counts["VitNorm"] == 2 * sum(depths) and counts["VitAddNorm"] >= sum(depths)
    kept = ("heads", "tokens", "head", "windows")
    found = [
        [node.attributes[name].as_int() for name in kept] for node in nodes if node.op_type == "VitWindowAttention"
    ]
    # 112 pixels are 28 by 28 patches, 16 windows; half as many a side in the second stage
    assert found[:2] == [[1, 49, 32, 1], [1, 49, 32, 16]] and found[-1] == [2, 49, 32, 4]
    bias = next(node.inputs[1] for node in nodes if node.op_type == "VitWindowAttention")
    assert tuple(bias.shape) == (1, 49, 50)  # the kernel reads two columns at a time


@pytest.mark.parametrize(
    ("family", "why"), [("mixer", "no attention with a bias"), ("hybrid", "no attention with a bias")]
)
def test_windows_without_windows(tmp_path, family, why):
    with pytest.raises(ExportError, match=why):
        export_model(model(family), tmp_path / "model.onnx", target=lowering_named("trt8", "windows"))


def test_what_group_norms_become(tmp_path):
    """All are our kernels', each with the ReLU behind it; of a bottleneck's last the shortcut goes along, with its own
    GroupNorm where it has one."""
    export_model(model("hybrid"), tmp_path / "model.onnx", target=lowering_named("trt8", "groupnorm"))
    nodes = list(ir.load(tmp_path / "model.onnx").graph)
    counts = collections.Counter(node.op_type for node in nodes)
    units = list(model("hybrid").kind.units())
    projected = sum(unit.projects for unit in units)
    assert counts["VitGroupNorm"] == 1 + 2 * len(units) and "Relu" not in counts
    assert (counts["VitTwoGroupNorms"], counts["VitAddGroupNorm"]) == (projected, len(units) - projected)
    assert counts["LayerNormalization"] == 2 * SMALL["hybrid"][2] + 1  # those of the ViT
    norms = [node for node in nodes if "GroupNorm" in node.op_type]
    # nothing stands between a convolution and a kernel, but for the shortcut that a bottleneck adds
    assert {node.inputs[0].producer().op_type for node in norms} == {"Conv"}
    assert all(node.name.rpartition("/")[2].startswith("Relu") for node in norms)


def test_group_norms_without_any(tmp_path):
    with pytest.raises(ExportError, match="no GroupNorm over 32 groups"):
        export_model(model("mixer"), tmp_path / "model.onnx", target=lowering_named("trt8", "groupnorm"))


@pytest.mark.parametrize("family", SMALL)
def test_repeated_blocks_are_those_that_are_traced(tmp_path, family):
    """The graph with its stacks repeated computes what the graph of all blocks does, to the bit."""
    repeated = model(family)
    assert repeated.repeats
    whole = dataclasses.replace(repeated, **_traced_whole(family))
    assert not whole.repeats
    results = []
    for each in (repeated, whole):
        export_model(each, tmp_path / "model.onnx", target=target_named("rtx"))
        results.append(run_session(open_session(tmp_path / "model.onnx"), images(family))[each.output])
        nodes = collections.Counter(node.op_type for node in ir.load(tmp_path / "model.onnx").graph)
        results.append(nodes)
    np.testing.assert_array_equal(results[0], results[2])
    assert results[1] == results[3]


def _traced_whole(family):
    from family_models import checkpoint
    from flax import traverse_util

    from vit_convert.families.hybrid.module import module_of
    from vit_convert.families.mixer.module import MlpMixer
    from vit_convert.families.swin.module import SwinTransformer

    make = {"mixer": MlpMixer, "hybrid": module_of, "swin": SwinTransformer}[family]
    module = make(checkpoint(family).architecture)

    def apply(leaves, batch):
        result, taps = module.apply({"params": traverse_util.unflatten_dict(dict(leaves), sep="/")}, batch)
        return {"logits": result, **taps}

    shapes = {name: leaf.shape for name, leaf in checkpoint(family).params.leaves.items()}
    return {"apply": apply, "traced_shapes": shapes, "traced_taps": list(model(family).taps)}


@pytest.mark.parametrize("family", SMALL)
def test_weights_carry_the_canonical_names(tmp_path, family):
    from family_models import checkpoint

    export_model(model(family), tmp_path / "model.onnx", target=target_named("rtx"))
    graph = ir.load(tmp_path / "model.onnx").graph
    assert {name for name in graph.initializers if not name.startswith(("constant_", "pooled_"))} == set(
        checkpoint(family).params
    )


@pytest.mark.parametrize("family", SMALL)
@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
def test_pixels(tmp_path, family, layout):
    """Of a hybrid the normalisation stays outside its padded stem, whose zeros are no pixels; of the others it is in
    the patches."""
    preprocess = preprocess_for("vit_jax", (64, 64))
    side = SMALL[family][1]
    pixels = np.random.default_rng(1).integers(0, 256, (2, side, side, 3), np.uint8)
    given = (preprocess.scale, preprocess.offset)
    export_model(model(family), tmp_path / "model.onnx", target=target_named("rtx"), layout=layout, pixels=given)
    kinds = [node.op_type for node in ir.load(tmp_path / "model.onnx").graph][:4]
    assert ("Sub" in kinds) == (family != "hybrid")
    fed = pixels if layout == "NHWC" else pixels.transpose(0, 3, 1, 2)
    got = run_session(open_session(tmp_path / "model.onnx"), fed)["logits"]
    expected = model(family).run(preprocess.normalize(pixels))["logits"]
    assert np.abs(got - expected).max() <= 1e-4 * np.abs(expected).max()


def test_attention_plugin_in_a_hybrid(tmp_path):
    """Whose encoder is a ViT's: TensorRT 8's plugin takes its attention, all but the last block's, which is of one
    token."""
    path = tmp_path / "hybrid.npz"
    write_random_checkpoint(path, "R+ViT-Ti/16", image_size=(64, 96), num_classes=10, depth=3)
    found = load_checkpoint(path, image_size=(64, 96))
    assert found.attentions == ((64, 2 * 3 + 1),)
    hybrid = found.family.model(found)
    report = export_model(hybrid, tmp_path / "model.onnx", target=lowering_named("trt8", "plugin"))
    kinds = collections.Counter(node.op_type for node in ir.load(tmp_path / "model.onnx").graph)
    assert (kinds["CustomQKVToContextPluginDynamic"], kinds["Softmax"]) == (2, 1)
    batch = np.random.default_rng(0).uniform(-1, 1, (3, 64, 96, 3)).astype(np.float32)
    got = run_session(open_session(tmp_path / "model.onnx"), batch)["logits"]
    expected = hybrid.run(batch)["logits"]
    assert np.abs(got - expected).max() <= 1e-4 * np.abs(expected).max()
    assert list(report.taps) == ["root", "block_00", "block_01", "block_02", "encoder_norm"]
