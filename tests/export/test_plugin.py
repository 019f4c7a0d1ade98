"""The lowering with TensorRT's attention plugin: what onnxruntime computes by its model-local function agrees with
JAX."""

import ml_collections
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from export_graphs import architecture, random_images, random_params
from flax import traverse_util

from vit_convert.convert import convert
from vit_convert.core import config as configs
from vit_convert.core.bundle import Bundle
from vit_convert.core.compare import compare
from vit_convert.core.errors import ExportError
from vit_convert.core.onnx_file import open_session, run_session
from vit_convert.engine.handoff import read_facts
from vit_convert.export.exporter import export_model
from vit_convert.export.passes.attention_plugin import DOMAIN, MAX_TOKENS, PLUGIN
from vit_convert.export.targets import lowering_named
from vit_convert.families.random import write_random_checkpoint
from vit_convert.families.user.model import user_model
from vit_convert.families.vit.model import vit_model
from vit_convert.families.vit.module import ViT

HEADS = 3


def arch_with_heads_of(size, **changes):
    return architecture(width=size * HEADS, num_heads=HEADS, **changes)


def written(arch, path):
    model = vit_model(arch, random_params(arch))
    report = export_model(model, path, target=lowering_named("trt8", "plugin"))
    return model, report


@pytest.mark.parametrize("pool", ["tok", "gap"])
def test_agrees_with_jax(tmp_path, pool):
    arch = arch_with_heads_of(64, pool=pool)
    model, report = written(arch, tmp_path / "model.onnx")
    blocks = arch.depth - (pool == "tok")  # the last block of a class token attends from one token alone
    assert {rule.rule: rule.applied for rule in report.rules}["attention_to_plugin"] == blocks
    images = random_images(arch)
    expected, session = model.run(images)[model.output], open_session(tmp_path / "model.onnx")
    for batch in (1, 3, 5):
        got = run_session(session, images[:batch], [model.output])[model.output]
        # As for every graph in fp32; a wrong order of heads, scale or end of a sequence gives errors of the output's
        # own size.
        assert compare(expected[:batch], got).max_rel < 1e-4


def test_node_is_what_tensorrt_looks_up(tmp_path):
    arch = arch_with_heads_of(64)
    written(arch, tmp_path / "model.onnx")
    proto = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    nodes = [node for node in proto.graph.node if node.op_type == PLUGIN]
    assert {node.domain for node in nodes} == {DOMAIN} and [function.name for function in proto.functions] == [PLUGIN]
    given = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in nodes[0].attribute}
    assert given == {
        **{"type_id": 1, "hidden_size": arch.width, "num_heads": HEADS, "has_mask": 1, "var_seqlen": 1},
        **{"plugin_version": b"2", "plugin_namespace": b""},
    }
    shared = {tuple(node.input[1:]) for node in nodes}
    assert len(shared) == 1  # the ends of the sequences are computed once
    assert not any("query" in tensor.name for tensor in proto.graph.initializer if "encoderblock_0" in tensor.name)


def test_ends_of_the_sequences(tmp_path):
    arch = arch_with_heads_of(64)
    written(arch, tmp_path / "model.onnx")
    proto = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    ends = next(node.input[2] for node in proto.graph.node if node.op_type == PLUGIN)
    session = open_session(tmp_path / "model.onnx", [ends])
    for batch in (1, 4):
        got = run_session(session, random_images(arch)[:batch], [ends])[ends]
        assert got.dtype == np.int32 and got.tolist() == [
            (arch.grid[0] * arch.grid[1] + 1) * i for i in range(batch + 1)
        ]


def test_heads_without_a_kernel_are_refused(tmp_path):
    with pytest.raises(ExportError, match=r"heads of 32 over .* tokens; the plugin has kernels for heads of 64"):
        written(arch_with_heads_of(32), tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()


def test_long_sequences_are_refused(tmp_path):
    side = 4
    grid = int(MAX_TOKENS**0.5) + 1
    arch = arch_with_heads_of(64, patch_size=side, image_size=(side * grid, side * grid))
    with pytest.raises(ExportError, match=f"over at most {MAX_TOKENS}"):
        written(arch, tmp_path / "model.onnx")


def test_graph_of_dynamic_size_is_refused(tmp_path):
    arch = arch_with_heads_of(64)
    model = vit_model(arch, random_params(arch))
    with pytest.raises(ExportError, match="no attention over all of a fixed number of tokens"):
        target = lowering_named("trt8", "plugin")
        export_model(model, tmp_path / "model.onnx", target=target, dynamic_patch=arch.patch_size)


@pytest.mark.parametrize(
    ("variant", "asked", "expected"),
    [
        ("Ti/16", {}, ["plugin"]),
        ("Ti/16", {"lowerings": ("matmul",)}, ["matmul", "plugin"]),
        ("Ti/16", {"precision": "fp32"}, []),
        ("Ti/16", {"image_size": "dynamic:32..64"}, []),
        ("Ti/16", {"engine": {"backend": "none", "lowering": ""}}, []),
        ("mu/16", {}, []),  # heads of 16
    ],
)
def test_export_advises_it_where_it_fits(tmp_path, variant, asked, expected):
    write_random_checkpoint(tmp_path / "x.npz", variant, image_size=(32, 32), num_classes=10)
    given = {"checkpoint": str(tmp_path / "x.npz"), "target": "trt8", "engine": {"backend": "none"}, **asked}
    convert(configs.complete(ml_collections.ConfigDict(given), "x"), tmp_path, until="export", quiet=True)
    bundle = Bundle(tmp_path / "x")
    assert sorted(path.stem for path in bundle.lowerings.glob("*.onnx")) == expected
    fits = variant == "Ti/16" and asked.keys() <= {"lowerings", "engine"}
    assert read_facts(bundle).lowering == ("plugin" if fits else "")


def test_attentions_over_different_numbers_of_tokens(tmp_path):
    """Each number of tokens has sequences of its own: with those of the first attention the second read other images'
    tokens."""
    small, large = (arch_with_heads_of(64, pool="gap", patch_size=patch, depth=2) for patch in (16, 8))
    params = {"small": random_params(small), "large": random_params(large)}

    def forward(params, images):
        def one(arch, leaves):
            return ViT(arch).apply({"params": traverse_util.unflatten_dict(dict(leaves), sep="/")}, images)[0]

        return one(small, params["small"]) + one(large, params["large"])

    model = user_model(forward, params, image_shape=(*small.image_size, 3))
    report = export_model(model, tmp_path / "model.onnx", target=lowering_named("trt8", "plugin"))
    assert {rule.rule: rule.applied for rule in report.rules}["attention_to_plugin"] == 4
    graph = ir.load(tmp_path / "model.onnx").graph
    longest = {node.inputs[3].shape[0] for node in graph if node.op_type == PLUGIN}
    assert longest == {12, 48}
    images = random_images(small)
    expected, session = model.run(images)["logits"], open_session(tmp_path / "model.onnx")
    for batch in (1, 3, 5):
        got = run_session(session, images[:batch])["logits"]
        assert compare(expected[:batch], got).max_rel < 1e-4  # as for one number of tokens
