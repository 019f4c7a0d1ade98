"""Graphs of towers: they agree with JAX at every block, and have nothing that half precision or TensorRT 8.6 stumbles
over."""

import dataclasses
import functools
import pathlib
import tempfile

import numpy as np
import onnx_ir as ir
import pytest

from vit_convert.core.errors import ExportError
from vit_convert.core.onnx_file import open_session, run_session, save_onnx
from vit_convert.core.token_samples import sample_texts
from vit_convert.export.exporter import export_model
from vit_convert.export.targets import lowering_named, target_named
from vit_convert.families.load import load_checkpoint
from vit_convert.families.random import write_random_checkpoint
from vit_convert.families.towers.architecture import Encoder, ImageTower, TextTower, leaf_shapes
from vit_convert.families.towers.draw import draw
from vit_convert.families.towers.model import tower_model
from vit_convert.quantize.half_precision import to_fp16

# Variant, what follows the file, side in pixels, nodes of a block for rtx and trt8.
TOWERS = {
    "siglip image": ("SigLIP-mu/14", ":img", 32, (29, 35)),  # 14 pixels a patch: the last four are left out
    "siglip text": ("SigLIP-mu/16", ":txt", 32, (29, 36)),
    "clip image": ("CLIP-mu/16", ":img", 32, (31, 31)),
    # the last block takes two rows by products, and has no token of the others to transpose
    "clip text": ("CLIP-mu/16", ":txt", 32, (32, 32)),
    "lit bert": ("LiT-mu", ":txt", 32, (35, 41)),
    "lit image": ("LiT-mu", ":img", 32, (29, 36)),
    "tips image": ("TIPS-mug/14", "", 28, (33, 33)),
    "tips text": ("TIPS-mu/14", ":txt", 28, (34, 33)),
    "gemma3": ("Gemma3-mu/14", "", 56, (29, 35)),
}

FOR_8 = ("siglip image", "clip text", "lit bert")


@functools.cache
def tower(name):
    """The model, its inputs, and what JAX makes of them; three blocks."""
    variant, part, side, _ = TOWERS[name]
    more = {"towers": "text"} if name == "tips text" else {}
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / ("a.safetensors" if variant.startswith("CLIP") else "a.npz")
        write_random_checkpoint(path, variant, image_size=(side, side), depth=3, **more)
        loaded = load_checkpoint(f"{path}{part}")
    model = loaded.family.model(loaded)
    fed = inputs(model)
    return model, fed, model.run(fed)


def inputs(model):
    taken, generator = model.signature.inputs[0], np.random.default_rng(0)
    if taken.is_image:
        return generator.uniform(-1, 1, (3, *taken.shape[1:])).astype(np.float32)
    return sample_texts(taken, 3, generator)


def errors(path, model, fed, reference, names, token=None):
    """Largest error of each tensor over its scale."""
    session, found = open_session(path, names), {}
    for name, got in run_session(session, {model.signature.inputs[0].name: fed}, names).items():
        expected = reference[name][: len(fed)]
        if got.size != expected.size:
            rows = reference[token][: len(fed)] if isinstance(token, str) else token
            expected = expected[np.arange(len(fed)), rows][:, None]
        found[name] = np.abs(got.reshape(expected.shape) - expected).max() / np.abs(expected).max()
    return found


@pytest.mark.parametrize(("name", "target"), [*((name, "rtx") for name in TOWERS), *((name, "trt8") for name in FOR_8)])
def test_agrees_block_by_block_within_its_budget(tmp_path, name, target):
    """At 1e-4 of the scale; float32 in another order differs by about 1e-6."""
    model, fed, reference = tower(name)
    report = export_model(model, tmp_path / "model.onnx", target=target_named(target))
    assert [*report.taps] == [*model.taps]
    assert report.nodes_per_block <= TOWERS[name][3][target == "trt8"]
    for batch in (1, 3):
        names = [model.output, *report.taps]
        found = errors(tmp_path / "model.onnx", model, fed[:batch], reference, names, report.pooled_token)
        assert max(found.values()) < 1e-4, found


def test_the_end_of_each_text_is_found_and_alone_goes_through_the_last_block(tmp_path):
    """Its place by NumPy, its products by their shapes; what it gives is held against JAX above."""
    model, fed, _ = tower("clip text")
    end = model.kind.end
    fed = np.array(fed)
    fed[fed == end] = 1
    fed[0, [3, 5]], fed[1, 0] = end, end  # the third has none: the last token stands for it
    assert model.run(fed)["pooled_token"].tolist() == [3, 0, fed.shape[1] - 1]
    report = export_model(model, tmp_path / "model.onnx", target=target_named("rtx"))
    assert report.pooled_token == "pooled_token"
    found = errors(tmp_path / "model.onnx", model, fed, model.run(fed), [model.output, "block_02"], "pooled_token")
    assert max(found.values()) < 1e-4, found
    tokens = {
        node.name.rsplit("/", 2)[-2]: node.outputs[0].shape[1]
        for node in ir.load(tmp_path / "model.onnx").graph
        if node.op_type == "MatMul" and "encoderblock_2/" in node.name and node.inputs[1].const_value is not None
    }
    length = fed.shape[1]
    assert tokens == {"query": 1, "key": length, "value": length, "out": 1, "Dense_0": 1, "Dense_1": 1}


@pytest.mark.parametrize(("name", "target"), [("clip text", "rtx"), ("clip text", "trt8"), ("lit bert", "trt8")])
def test_texts_need_no_64_bits_and_no_infinity(tmp_path, name, target):
    export_model(tower(name)[0], tmp_path / "model.onnx", target=target_named(target))
    graph = ir.load(tmp_path / "model.onnx").graph
    assert not {node.op_type for node in graph} & {"ArgMax", "NonZero", "Where", "CumSum", "Shape"}
    computed = {value.dtype for node in graph if node.op_type != "Constant" for value in node.outputs}
    assert ir.DataType.INT64 not in computed
    for value in graph.initializers.values():
        numbers = value.const_value.numpy()
        assert numbers.dtype != np.float32 or np.abs(numbers).max(initial=0) < 65504, value.name
    (taken,) = graph.inputs
    assert taken.dtype == ir.DataType.INT32


@pytest.mark.parametrize("name", ["clip text", "lit bert"])
def test_in_half_precision(tmp_path, name):
    model, fed, reference = tower(name)
    export_model(model, tmp_path / "model.onnx", target=target_named("rtx"))
    typed = to_fp16(ir.load(tmp_path / "model.onnx")).model
    save_onnx(typed, tmp_path / "half.onnx")
    session = open_session(tmp_path / "half.onnx")
    got = run_session(session, {model.signature.inputs[0].name: fed}, [model.output])[model.output]
    expected = reference[model.output]
    cosine = (got * expected).sum(-1) / np.linalg.norm(got, axis=-1) / np.linalg.norm(expected, axis=-1)
    assert cosine.min() > 0.9999


# --- TensorRT 8's attention plugin ------------------------------------------------------------------------------------

SIXTY_FOUR = Encoder(128, 2, 64, 2)  # heads of 64, which the plugin has kernels for


def of(architecture):
    values = {name: draw(0, name, shape) for name, shape in leaf_shapes(architecture).items()}
    return tower_model(architecture, values)


@pytest.mark.parametrize(("mask", "lowering"), [("causal", "plugin"), ("padding", "plugin"), ("padding", "kernels")])
def test_what_does_not_serve_under_a_mask(tmp_path, mask, lowering):
    architecture = TextTower("t", "t", SIXTY_FOUR, "end", vocabulary=30, length=8, mask=mask, start=28, end=29, pad=0)
    with pytest.raises(ExportError, match="no attention over all of a fixed number of tokens"):
        export_model(of(architecture), tmp_path / "model.onnx", target=lowering_named("trt8", lowering))
    free = dataclasses.replace(architecture, mask="none")
    export_model(of(free), tmp_path / "model.onnx", target=lowering_named("trt8", "plugin"))
    assert "CustomQKVToContextPluginDynamic" in {node.op_type for node in ir.load(tmp_path / "model.onnx").graph}


def test_our_kernels_serve_under_a_causal_mask(tmp_path):
    """Each node says so, and what stands for it in the file computes it; the last block attends from one row."""
    model = of(TextTower("t", "t", SIXTY_FOUR, "end", vocabulary=30, length=8, mask="causal", start=28, end=29, pad=0))
    fed = inputs(model)
    export_model(model, tmp_path / "model.onnx", target=lowering_named("trt8", "kernels"))
    nodes = list(ir.load(tmp_path / "model.onnx").graph)
    attentions = [node for node in nodes if node.op_type == "VitAttention"]
    assert [node.attributes["causal"].as_int() for node in attentions] == [1]  # of two blocks
    assert [node.outputs[0].shape[2] for node in nodes if node.op_type == "Softmax"] == [1]
    assert errors(tmp_path / "model.onnx", model, fed, model.run(fed), ["embedding"])["embedding"] < 1e-4


def test_what_stands_for_a_causal_attention_before_our_kernels_computes_it(tmp_path):
    """A pass's graph is right by itself, whatever the next one makes of it."""
    model = of(TextTower("t", "t", SIXTY_FOUR, "end", vocabulary=30, length=8, mask="causal", start=28, end=29, pad=0))
    fed, target = inputs(model), dataclasses.replace(lowering_named("trt8", "kernels"), last=())
    export_model(model, tmp_path / "model.onnx", target=target)
    nodes = list(ir.load(tmp_path / "model.onnx").graph)
    plugins = [node for node in nodes if node.op_type == "CustomQKVToContextPluginDynamic"]
    assert [node.attributes["causal"].as_int() for node in plugins] == [1]
    assert errors(tmp_path / "model.onnx", model, fed, model.run(fed), ["embedding"])["embedding"] < 1e-4


@pytest.mark.parametrize("target", ["rtx", "trt8"])
def test_a_text_without_an_end_ends_with_its_last_token(tmp_path, target):
    """Nothing would be pooled otherwise, and an embedding of zeros over its length is NaN."""
    model, fed, _ = tower("clip text")
    taken = model.signature.inputs[0]
    cut = np.where(fed == taken.end, 5, fed)
    ended = cut.copy()
    ended[:, -1] = taken.end
    export_model(model, tmp_path / "model.onnx", target=target_named(target))
    session = open_session(tmp_path / "model.onnx", [])
    got = run_session(session, {"tokens": cut}, ["embedding"])["embedding"]
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got, model.run(cut)["embedding"], atol=1e-5)
    with_end = model.run(ended)["embedding"]
    assert np.abs(got - with_end).max() > 1e-3  # the last place's own token, not an end put in its place


def test_the_plugin_serves_the_blocks_before_attention_pooling(tmp_path):
    """The probe attends from one row, which the plugin does not know either: it keeps its products."""
    model = of(ImageTower("t", "t", SIXTY_FOUR, "map", patch_size=8, image_size=(16, 16)))
    fed = inputs(model)
    export_model(model, tmp_path / "model.onnx", target=lowering_named("trt8", "plugin"))
    kinds = [node.op_type for node in ir.load(tmp_path / "model.onnx").graph]
    assert kinds.count("CustomQKVToContextPluginDynamic") == 2 and kinds.count("Softmax") == 1
    assert errors(tmp_path / "model.onnx", model, fed, model.run(fed), ["embedding"])["embedding"] < 1e-4
