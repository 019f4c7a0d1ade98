"""A text tower's graph for all lengths up to its own: what is cut in it, and that it gives what the fixed length
gives."""

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from vit_convert.core.errors import ExportError
from vit_convert.core.text_length import shortened
from vit_convert.core.token_samples import sample_texts
from vit_convert.export.exporter import export_model
from vit_convert.export.passes.dynamic_length import make_lengths_dynamic, making_lengths_dynamic
from vit_convert.export.targets import target_named
from vit_convert.export.weights import describe
from vit_convert.families.load import load_checkpoint
from vit_convert.families.random import write_random_checkpoint

# Length, heads' size and width are all 4: only its axis tells the length.
TEXT = """<ir_version: 10, opset_import: ["" : 20]>
g (int32[N, 4] tokens) => (float[N, 4, 4] y) <float[8, 4] words, float[1, 4, 4] table,
 float[1, 1, 4, 4] mask = {0,-9,-9,-9,0,0,-9,-9,0,0,0,-9,0,0,0,0},
 int64[4] split = {0,4,1,4}, int64[3] joined = {0,4,4}> {
 found = Gather (words, tokens)
 placed = Add (found, table)
 heads = Reshape (placed, split)
 turned = Transpose <perm = [0, 2, 1, 3]> (heads)
 keys = Transpose <perm = [0, 2, 3, 1]> (heads)
 scores = MatMul (turned, keys)
 masked = Add (scores, mask)
 weights = Softmax (masked)
 values = MatMul (weights, turned)
 back = Transpose <perm = [0, 2, 1, 3]> (values)
 y = Reshape (back, joined) }"""

TOWERS = {"CLIP-mu/16": "safetensors:txt", "LiT-mu": "npz:txt", "TIPS-mu/14": "npz"}
ATOL = 1e-6  # of embeddings of length 1: float32 products of 12 to 64 numbers, summed in other orders


def text():
    model = ir.from_onnx_text(TEXT)
    read = {value.name: value for node in model.graph for value in node.inputs}
    for name in ("words", "table", "mask", "split", "joined"):
        if name not in model.graph.initializers:
            model.graph.initializers.add(read[name])
    shapes = {"found": (4, 4), "placed": (4, 4), "heads": (4, 1, 4), "back": (4, 1, 4)}
    for node in model.graph:
        for value in node.outputs:
            value.shape = ir.Shape(["N", *shapes[value.name]]) if value.name in shapes else value.shape
    describe(model)
    return model


def test_what_a_graph_cuts_and_copies():
    model = text()
    making_lengths_dynamic("table", "tokens")(model)
    assert list(model.graph.inputs[0].shape) == ["batch", "length"]
    cut = [node for node in model.graph if node.op_type == "Slice"]
    read = [value.name for node in cut for value in node.inputs[:1]]
    assert len(cut) == 3 and {"table", "mask"} <= {*read} and "words" not in read
    axes = [node.inputs[3].const_value.numpy().tolist() for node in cut]
    assert sorted(axes) == [[1], [2], [3]]
    shapes = [n.inputs[1].const_value.numpy().tolist() for n in model.graph if n.op_type == "Reshape"]
    assert shapes == [[0, 0, 1, 4], [0, 0, 4]]


def test_a_graph_without_the_table_is_refused():
    with pytest.raises(ExportError, match="position table"):
        make_lengths_dynamic(text(), "no_such_table", "tokens")


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    """Each tower: its model, some texts of its own length."""
    found = {}
    for variant, part in TOWERS.items():
        suffix, _, tower = part.partition(":")
        path = tmp_path_factory.mktemp("lengths") / f"model.{suffix}"
        write_random_checkpoint(path, variant, image_size=(32, 32) if tower else None, towers="" if tower else "text")
        loaded = load_checkpoint(f"{path}:{tower}" if tower else path)
        model = loaded.family.model(loaded)
        found[variant] = model, sample_texts(model.signature.inputs[0], 5, np.random.default_rng(3))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("target", ["rtx", "trt8"])
@pytest.mark.parametrize("variant", TOWERS)
def test_short_texts_give_what_they_give_filled_up(towers, tmp_path, variant, target):
    """By JAX at the tower's own length; and so do the taps, as far as the texts go."""
    model, whole = towers[variant]
    taken = model.signature.inputs[0]
    longest, path = taken.shape[1], tmp_path / "model.onnx"
    report = export_model(model, path, target=target_named(target, dynamic=True), dynamic_length=True, taps=True)
    session = onnxruntime.InferenceSession(path)
    for length in (3, longest // 2, longest):
        tokens = shortened(taken, whole, length)
        filled = np.full_like(whole, taken.pad)
        filled[:, :length] = tokens
        expected = model.run(filled)
        short = model.run(tokens)
        names = ["embedding", *report.taps]
        for name, value in zip(names, session.run(names, {"tokens": tokens})):
            if name == "embedding":
                np.testing.assert_allclose(value, expected[name], atol=ATOL)
                np.testing.assert_allclose(short[name], expected[name], atol=ATOL)
            else:
                np.testing.assert_allclose(value.reshape(short[name].shape), short[name], atol=1e-5)
