"""A text tower's graph for all lengths up to its own: what is cut in it, and that it gives what the fixed length
gives."""

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from export_graphs import computed, described

from vit_convert.core.errors import ExportError
from vit_convert.core.text_length import shortened
from vit_convert.core.token_samples import sample_texts
from vit_convert.export.exporter import export_model
from vit_convert.export.passes.dynamic_length import _open_shapes, make_lengths_dynamic, making_lengths_dynamic
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
    placed = next(value for node in model.graph for value in node.outputs if value.name == "placed")
    assert placed.shape is None or [*map(str, placed.shape)][1] != "4"  # found anew


def test_the_contract_tells_a_length_that_is_fixed():
    wanted, model = making_lengths_dynamic("table", "tokens"), text()
    with pytest.raises(ir.passes.PostconditionError, match=r"the input tokens has \[4\]"):
        wanted.ensures(model)
    wanted(model)
    wanted.ensures(model)


@pytest.mark.parametrize(
    ("given", "numbers", "wanted"),
    [
        (("N", 4), (-1, 1, 1, 4), [0, 1, 1, -1]),  # a mask's axes: all that is known of its length is that it is left
        (("N", 4), (0, 1, 4, 1), [0, 1, -1, 1]),
        (("N", 4), (2, 1, 1, 4), [2, 1, 1, -1]),
        (("N", 4, 8), (0, 4, 2, 4), [0, 0, 2, 4]),
        (("N", 8), (0, 2, 4), [0, 2, 4]),  # no tokens: 4 is a size of its own
        (("N", 4, 2), (0, 8), [0, 8]),  # tokens, and none of them in the result
        ((4,), (4, 1), [4, 1]),
    ],
)
def test_what_a_reshape_says_of_any_length(given, numbers, wanted):
    model = text()
    shape, taken = ir.tensor(np.array(numbers), name="wanted"), ir.Value(name="taken", shape=ir.Shape(given))
    target = ir.Value(name="wanted", const_value=shape, shape=ir.Shape([len(numbers)]))
    model.graph.register_initializer(target)
    node = ir.node("Reshape", [taken, target])
    model.graph.insert_before(model.graph[0], node)
    _open_shapes(model.graph, 4)
    assert node.inputs[1].const_value.numpy().tolist() == wanted


def test_marks_of_the_last_token_are_cut_at_their_beginning():
    """Two of them; against NumPy, at every length."""
    words, table = np.random.default_rng(0).normal(size=(2, 8, 3)).astype(np.float32)
    model = described(
        """g (int32[n, 4] tokens, float[8, 3] words, float[1, 4, 3] table) => (float[n, 4] y)
        <float[4] first = {1, 2, 3, 4}, float[1, 4] second = {5, 7, 11, 13}, int64[1] axes = {2}> {
        found = Gather (words, tokens) placed = Add (found, table)
        score = ReduceSum <keepdims = 0> (placed, axes) half = Mul (score, first) y = Add (half, second) }""",
        "words",
        "table",
    )
    make_lengths_dynamic(model, "table", "tokens")
    for length in (1, 2, 4):
        tokens = np.random.default_rng(length).integers(0, 8, (3, length), np.int32)
        score = (words.astype(np.float64)[tokens] + table[:length]).sum(-1)
        expected = score * np.array([1, 2, 3, 4])[-length:] + np.array([5, 7, 11, 13])[-length:]
        (y,) = computed(model, {"words": words, "table": table[None, :4]}, tokens)
        np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5)  # float32 sums of six numbers, times 4


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
