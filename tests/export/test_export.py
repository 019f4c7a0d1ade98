"""Whole models: what is written agrees with JAX, is small, and is named after the checkpoint."""

import collections
import dataclasses
import itertools

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from export_graphs import architecture, random_images, random_params
from exported_vit import assert_agrees, reference, tiny, written
from flax import traverse_util

from vit_convert.core.compare import compare
from vit_convert.core.errors import ExportError, UsageError
from vit_convert.core.onnx_file import open_session, run_session, save_onnx
from vit_convert.export import weights
from vit_convert.export.exporter import export_model
from vit_convert.export.lower import onnx_from_apply
from vit_convert.export.targets import TARGETS, target_named
from vit_convert.export.trace import trace
from vit_convert.families.vit.architecture import signature_of
from vit_convert.families.vit.model import vit_model
from vit_convert.families.vit.module import ViT, param_shapes


@pytest.mark.parametrize(
    ("target", "pool"),
    [*((target, "tok") for target in TARGETS), *itertools.product(["trt8", "rtx"], ["gap", "map", "none"])],
)
def test_agrees_with_jax(tmp_path, target, pool):
    arch = architecture(pool=pool)
    written(arch, tmp_path / "model.onnx", target=target)
    assert_agrees(arch, tmp_path / "model.onnx")


@pytest.mark.parametrize("target", ["trt8", "rtx"])
def test_tokens_alone_agree_with_jax(tmp_path, target):
    arch = architecture(pool="none", num_classes=0)  # the final norm is the output then, and no tap
    written(arch, tmp_path / "model.onnx", target=target)
    assert_agrees(arch, tmp_path / "model.onnx")


@pytest.mark.parametrize(
    ("target", "changes"),
    [
        ("trt8", {"gelu": "erf"}),
        ("rtx", {"gelu": "erf", "depth": 1}),
        ("rtx", {"representation_size": 24}),
        ("trt8", {"num_classes": 0}),
        ("rtx", {"num_classes": 0, "depth": 2}),
        ("rtx", {"num_heads": 4, "mlp_dim": 48, "image_size": (16, 80)}),
        ("trt8", {"norm_epsilon": 1e-3, "depth": 1}),
    ],
    ids=str,
)
def test_architectures(tmp_path, target, changes):
    arch = architecture(**changes)
    written(arch, tmp_path / "model.onnx", target=target)
    assert_agrees(arch, tmp_path / "model.onnx")


@pytest.mark.parametrize("target", ["trt8", "rtx"])
def test_nchw(tmp_path, target):
    arch = architecture()
    written(arch, tmp_path / "model.onnx", target=target, layout="NCHW")
    assert [str(dim) for dim in ir.load(tmp_path / "model.onnx").graph.inputs[0].shape] == ["batch", "3", "48", "64"]
    assert_agrees(arch, tmp_path / "model.onnx", layout="NCHW", with_taps=False)


def test_nchw_needs_no_transpose_before_the_patches(tmp_path):
    report = written(architecture(), tmp_path / "nhwc.onnx")
    turned = written(architecture(), tmp_path / "nchw.onnx", layout="NCHW")
    assert turned.num_nodes == report.num_nodes - 1


def test_taps_are_outputs_with_every_token(tmp_path):
    arch = architecture()
    report = written(arch, tmp_path / "model.onnx", taps=True)
    names = [value.name for value in ir.load(tmp_path / "model.onnx").graph.outputs]
    assert names == ["logits", "block_00", "block_01", "block_02", "encoder_norm"] == ["logits", *report.taps]
    session = open_session(tmp_path / "model.onnx")
    got = run_session(session, random_images(arch))
    for name in names:
        assert got[name].shape == reference(arch)[name].shape  # nothing is pruned
        assert compare(reference(arch)[name], got[name]).max_rel < 1e-4


# --- size -----------------------------------------------------------------------------------------------------------


def test_modern_targets_share_their_rules():
    assert TARGETS["trt10"].rules == TARGETS["trt11"].rules == TARGETS["rtx"].rules


@pytest.mark.parametrize(
    ("target", "lowering", "budget"),
    [("trt8", "", 36), ("trt8", "matmul", 34), ("trt8", "primitives", 50), ("rtx", "", 30)],
)
@pytest.mark.parametrize(("pool", "depth"), [("tok", 1), ("tok", 3), ("gap", 3)])
def test_node_budget(tmp_path, target, lowering, budget, pool, depth):
    report = written(architecture(pool=pool, depth=depth), tmp_path / "model.onnx", target=target, lowering=lowering)
    nodes = list(ir.load(tmp_path / "model.onnx").graph)
    blocks = collections.Counter(
        node.name.split("/")[1] for node in nodes if node.name.startswith("Transformer/encoderblock_")
    )
    assert len(blocks) == depth
    assert max(blocks.values()) == report.nodes_per_block <= budget
    assert len(nodes) - sum(blocks.values()) <= 20
    assert report.num_shapes == sum(node.op_type == "Shape" for node in nodes) <= 1
    assert report.num_nodes == len(nodes)
    on_integers = {node.op_type for node in nodes for value in node.outputs if value.dtype == ir.DataType.INT64}
    assert on_integers <= {"Shape"}
    onnx.checker.check_model(str(tmp_path / "model.onnx"), full_check=True)
    assert ir.load(tmp_path / "model.onnx").opset_imports[""] == (17 if target == "trt8" else 20)


def test_plain_export_is_twice_as_large():
    """That the budget means something: what jax2onnx leaves of one block, before any substitution."""
    counts = []
    for depth in (1, 2):
        arch = architecture(depth=depth)

        def apply(leaves, images, arch=arch):
            return {
                "logits": ViT(arch).apply({"params": traverse_util.unflatten_dict(dict(leaves), sep="/")}, images)[0]
            }

        counts.append(sum(1 for _ in trace(apply, param_shapes(arch), signature_of(arch).inputs, ["logits"], 20).graph))
    assert counts[1] - counts[0] > 60


def test_a_block_that_grew_is_refused(tmp_path):
    tight = dataclasses.replace(TARGETS["rtx"], max_nodes_per_block=10)
    arch = architecture()
    with pytest.raises(ExportError, match="nodes in a block of Transformer/encoderblock_0/…, target rtx allows 10"):
        export_model(tiny(arch), tmp_path / "model.onnx", target=tight)
    assert not (tmp_path / "model.onnx").exists()


def test_unknown_target_names_the_nearest():
    with pytest.raises(UsageError, match="Did you mean trt10"):
        target_named("trt-10")


# --- unrolling and pruning ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["trt8", "rtx"])
def test_unrolled_equals_fully_traced(tmp_path, target):
    arch = architecture(depth=5)
    unrolled = tiny(arch)
    assert unrolled.repeats
    assert not any("encoderblock_2" in name for name in unrolled.traced_shapes)

    def apply(leaves, images):
        logits, taps = ViT(arch).apply({"params": traverse_util.unflatten_dict(dict(leaves), sep="/")}, images)
        return {"logits": logits, **taps}

    whole = dataclasses.replace(unrolled, apply=apply, traced_shapes=param_shapes(arch), traced_taps=unrolled.taps)
    images = random_images(arch)
    results, counts = [], []
    for name, model in (("unrolled", unrolled), ("whole", whole)):
        report = written(arch, tmp_path / f"{name}.onnx", target=target, model=model)
        results.append(run_session(open_session(tmp_path / f"{name}.onnx", unrolled.taps), images))
        counts.append((report.num_nodes, report.nodes_per_block))
    assert counts[0] == counts[1]
    for name, value in results[0].items():
        np.testing.assert_array_equal(value, results[1][name], err_msg=name)  # the same operators in the same order


def applied(rules):
    return {rule.rule: rule.applied for rule in rules}


def graph_of(arch, target="rtx", *, prune=True):
    model = tiny(arch)
    inputs, stacks = model.signature.inputs, model.stacks
    built = onnx_from_apply(
        model.apply,
        model.traced_shapes,
        inputs,
        [model.output],
        model.traced_taps,
        TARGETS[target],
        stacks=stacks,
        prune=prune,
    )
    weights.bind(built.model, model.params)
    return built


@pytest.mark.parametrize("target", ["trt8", "rtx"])
@pytest.mark.parametrize("depth", [1, 3])
def test_pruning_changes_no_logits(tmp_path, target, depth):
    arch = architecture(depth=depth)
    images = random_images(arch)
    blocks = tiny(arch).taps[:depth]
    results = {}
    for prune in (True, False):
        built = graph_of(arch, target, prune=prune)
        path = tmp_path / f"{prune}.onnx"
        save_onnx(built.model, path)
        found = run_session(open_session(path, blocks), images)
        results[prune] = found["logits"]
        assert (applied(built.rules)["prune_tokens"] > 0) is prune
        tokens = [found[block].size // (len(images) * arch.width) for block in blocks]
        assert tokens == [13] * (depth - 1) + [1 if prune else 13]
    # The same products in other shapes: onnxruntime's kernels may sum them in another order, hence float32 rounding
    # over a few blocks.
    assert compare(results[False], results[True]).max_rel < 1e-5


def test_pruned_block_keeps_keys_and_values_whole():
    built = graph_of(architecture(depth=2))
    last = {
        node.name.removeprefix("Transformer/encoderblock_1/"): node.outputs[0]
        for node in built.model.graph
        if "block_1/" in node.name
    }
    attention = "MultiHeadDotProductAttention_0"
    assert {name: last[f"{attention}/{name}/MatMul"].shape[1] for name in ("query", "key", "value", "out")} == {
        "query": 1,
        "key": 13,
        "value": 13,
        "out": 1,
    }
    assert last["MlpBlock_0/Dense_0/MatMul"].shape[1] == 1


@pytest.mark.parametrize("pool", ["gap", "map", "none"])
def test_pruning_leaves_other_poolings_alone(pool):
    assert applied(graph_of(architecture(pool=pool)).rules)["prune_tokens"] == 0


@pytest.mark.parametrize(("layout", "patches"), [("NHWC", 1), ("NCHW", 0)])
def test_folded_for_tensorrt_8(tmp_path, layout, patches):
    """The scale goes into the query's weights, and the patches into a MatMul where the pixels come last; the numbers
    stay JAX's."""
    arch = architecture()
    report = written(arch, tmp_path / "model.onnx", target="trt8", layout=layout)
    counts = {rule.rule: rule.applied for rule in report.rules}
    assert (counts["fold_scale"], counts["patch_to_matmul"], counts["mlps_to_convolutions"]) == (
        arch.depth,
        patches,
        arch.depth,
    )
    graph = ir.load(tmp_path / "model.onnx").graph
    assert sum(node.name == "embedding/Conv" for node in graph) == 1 - patches
    assert sum(node.name == "embedding/MatMul" for node in graph) == patches
    query = graph.initializers[
        "Transformer/encoderblock_1/MultiHeadDotProductAttention_0/query/kernel"
    ].const_value.numpy()
    kernel = tiny(arch).params["Transformer/encoderblock_1/MultiHeadDotProductAttention_0/query/kernel"]
    np.testing.assert_array_equal(query, (kernel / 4).reshape(query.shape))  # heads of 16: a power of two, so exact
    assert_agrees(arch, tmp_path / "model.onnx", layout=layout, with_taps=False)


# --- names and weights ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["trt8", "rtx"])
@pytest.mark.parametrize("pool", ["tok", "map"])
def test_weights_carry_the_checkpoint_names(tmp_path, target, pool):
    arch = architecture(pool=pool)
    model = tiny(arch)
    written(arch, tmp_path / "model.onnx", target=target)
    initializers = ir.load(tmp_path / "model.onnx").graph.initializers
    readable = {name for name in initializers if not name.startswith("constant_")}
    folded = {"embedding/bias"} if target == "trt8" else set()  # into the position table, which is added anyway
    assert readable == set(model.params) - folded
    for name in readable:
        assert initializers[name].const_value.size == model.params[name].size


def test_nodes_carry_their_place():
    names = [node.name for node in graph_of(architecture()).model.graph]
    assert len(set(names)) == len(names)
    for i in range(3):
        attention = f"Transformer/encoderblock_{i}/MultiHeadDotProductAttention_0"
        assert {f"{attention}/{part}/MatMul" for part in ("query", "key", "value", "out")} <= set(names)
        assert f"Transformer/encoderblock_{i}/Softmax" in names
        assert f"Transformer/encoderblock_{i}/MlpBlock_0/Dense_1/MatMul" in names
    assert {"embedding/Conv", "Transformer/encoder_norm/LayerNormalization", "head/Gemm"} <= set(names)


class Counted:
    """A parameter that counts how often its values are asked for; its shape is free."""

    def __init__(self, array):
        self.array, self.shape, self.size, self.reads = array, array.shape, array.size, 0

    def __array__(self, dtype=None, copy=None):
        self.reads += 1
        return np.asarray(self.array, dtype)


def test_weights_are_read_while_the_file_is_written(tmp_path):
    arch = architecture()
    model = tiny(arch)
    params = {name: Counted(array) for name, array in model.params.items()}
    built = graph_of(arch)
    weights.bind(built.model, params)
    assert not any(param.reads for param in params.values())
    save_onnx(built.model, tmp_path / "model.onnx")
    assert {param.reads for param in params.values()} == {1}


def test_missing_and_misshapen_parameters_are_named(tmp_path):
    arch = architecture()
    params = random_params(arch)
    del params["head/bias"]
    with pytest.raises(ExportError, match="head/bias: traced, but not among"):
        written(arch, tmp_path / "model.onnx", model=vit_model(arch, params))
    params = random_params(arch) | {"head/bias": np.zeros(8, np.float32)}
    with pytest.raises(ExportError, match=r"head/bias: traced with shape \(7,\), the checkpoint has head/bias \(8,\)"):
        written(arch, tmp_path / "model.onnx", model=vit_model(arch, params))
    assert list(tmp_path.iterdir()) == []


def test_report_counts_what_each_rule_did(tmp_path):
    report = written(architecture(depth=2), tmp_path / "model.onnx")
    counts = {rule.rule: rule.applied for rule in report.rules}
    assert counts["EinsumAttention"] == 2
    # two a block, one at the end
    assert counts["FastVarianceLayerNorm"] == counts["LayerNormScale"] == counts["LayerNormBias"] == 5
    assert counts["DenseToMatMul"] == 12  # query, key, value, out and two of the MLP, a block
    assert report.bytes == sum(path.stat().st_size for path in tmp_path.iterdir())
    assert report.nodes_traced > report.num_nodes
