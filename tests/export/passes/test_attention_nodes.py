"""Attention over all tokens as a node of TensorRT's plugin, on graphs of a few nodes: what is refused or left alone,
numbers against NumPy."""

import numpy as np
import onnx_ir as ir
import pytest
from export_graphs import FLOAT32, computed, described, ops

from vit_convert.core.errors import ExportError
from vit_convert.export.passes.attention_plugin import (
    ATTENTION_FOR_KERNELS,
    ATTENTION_TO_PLUGIN,
    ATTENTION_TO_PLUGIN_IF_IT_FITS,
    DOMAIN,
    PLUGIN,
    fits,
    fits_kernels,
)
from vit_convert.export.passes.cleanup import clean

TOKENS, HEADS, SIZE = 3, 2, 64
WIDTH = HEADS * SIZE
PARTS = ("query", "key", "value", "out")
SHAPES = dict.fromkeys(PARTS, (WIDTH, WIDTH)) | {f"{part}_bias": (WIDTH,) for part in PARTS}
NAMES = {part: f"block_0/{part}/kernel" for part in PARTS} | {f"{part}_bias": f"block_0/{part}/bias" for part in PARTS}
BODY = "t = Reshape (x, flat)" + "".join(
    f"""
    p{part} = MatMul (t, {part}) s{part} = Add (p{part}, {part}_bias) r{part} = Reshape (s{part}, split)
    h{part} = Transpose <perm = {[0, 2, 3, 1] if part == "key" else [0, 2, 1, 3]}> (r{part})"""
    for part in PARTS[:3]
)
BODY += """
    scores = MatMul (hquery, hkey) weights = Softmax <axis = -1> (scores) mixed = MatMul (weights, hvalue)
    back = Transpose <perm = [0, 2, 1, 3]> (mixed) joined = Reshape (back, flat)
    pout = MatMul (joined, out) o = Add (pout, out_bias) f = Reshape (o, square) y = Neg (f)"""


def graph(*edits, outputs=f"float[m, {WIDTH}, 1, 1] y"):
    """x [rows, width, 1, 1] -> -y, the same; `z` has the batch first, as the plugin's ends are counted from it."""
    weights = ", ".join(f"float{list(shape)} {name}" for name, shape in SHAPES.items())
    numbers = {"flat": (-1, TOKENS, WIDTH), "square": (-1, WIDTH, 1, 1), "split": (-1, TOKENS, HEADS, SIZE)}
    constants = [f"int64[{len(row)}] {name} = {{{', '.join(map(str, row))}}}" for name, row in numbers.items()]
    text = f"""g (float[n, {TOKENS}, {WIDTH}] z, float[m, {WIDTH}, 1, 1] x, {weights}) => ({outputs})
    <{", ".join(constants)}> {{ {BODY} }}"""
    for old, new in edits:
        assert old in text, old
        text = text.replace(old, new)
    return described(text, *SHAPES, names=NAMES, opset=17)


def by_hand(params, rows):
    p = {word: params[name].astype(np.float64) for word, name in NAMES.items()}
    query, key, value = (rows @ p[part] + p[f"{part}_bias"] for part in PARTS[:3])
    mixed = np.zeros_like(rows)
    for start in range(0, len(rows), TOKENS):
        for one in range(HEADS):
            place = slice(start, start + TOKENS), slice(one * SIZE, (one + 1) * SIZE)
            scores = query[place] @ key[place].T  # the factor 1/√d is in the query's weights
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            mixed[place] = weights / weights.sum(-1, keepdims=True) @ value[place]
    return mixed @ p["out"] + p["out_bias"]


@pytest.mark.parametrize("change", [ATTENTION_TO_PLUGIN, ATTENTION_TO_PLUGIN_IF_IT_FITS, ATTENTION_FOR_KERNELS])
def test_form_and_numbers(change):
    model = graph()
    assert change(model).places == 1
    clean(model)
    assert [op for op in ops(model) if op in ("Conv", PLUGIN, "Neg")] == ["Conv", PLUGIN, "Conv", "Neg"]
    assert model.opset_imports[DOMAIN] == 1
    rng = np.random.default_rng(0)
    params = {NAMES[name]: (rng.standard_normal(shape) / 11).astype(np.float32) for name, shape in SHAPES.items()}
    z, x = (rng.standard_normal(shape).astype(np.float32) for shape in ((2, TOKENS, WIDTH), (2 * TOKENS, WIDTH, 1, 1)))
    expected = -by_hand(params, x[:, :, 0, 0].astype(np.float64))
    (got,) = computed(model, params, z, x)
    np.testing.assert_allclose(got[:, :, 0, 0], expected, rtol=0, atol=FLOAT32 * np.abs(expected).max())


NONE = "the model has no attention over all of a fixed number of tokens"


@pytest.mark.parametrize(
    "edit",
    [
        ("Softmax <axis = -1> (scores)", "Sigmoid (scores)"),
        ("scores = MatMul (hquery, hkey)", "n = MatMul (hquery, hkey) scores = Relu (n)"),
        ("MatMul (weights, hvalue)", "Add (weights, weights)"),
        ("MatMul (t, query)", "MatMul (z, query)"),
        ("MatMul (t, key)", "MatMul (z, key)"),
        ("MatMul (t, value)", "MatMul (z, value)"),
        ("squery = Add (pquery, query_bias)", "squery = Mul (pquery, query_bias)"),
        ("skey = Add (pkey, key_bias)", "skey = Mul (pkey, key_bias)"),
        ("svalue = Add (pvalue, value_bias)", "svalue = Mul (pvalue, value_bias)"),
        ("o = Add (pout, out_bias)", "o = Mul (pout, out_bias)"),
        ("MatMul (joined, out)", "MatMul (joined, joined)"),
        ("Add (pvalue, value_bias)", "Add (pvalue, t)"),
    ],
    ids=lambda edit: edit[1],
)
def test_what_is_no_attention(edit):
    outputs = "float[?, ?, ?, ?] y"
    with pytest.raises(ExportError, match=NONE) as refused:
        ATTENTION_TO_PLUGIN(graph(edit, outputs=outputs))
    assert refused.value.fix == "Leave it out of `lowerings`."
    assert ATTENTION_TO_PLUGIN_IF_IT_FITS(graph(edit, outputs=outputs)).places == 0


@pytest.mark.parametrize("shape", [["n", 2, "t", "t"], ["n", 2, 1, 3], ["n", "h", 3, 3], None])
def test_scores_of_another_shape(shape):
    """Of a range of sizes, of the pooled token alone, of heads that are not known; or nothing is known."""
    model = graph()
    scores = next(node.inputs[0] for node in model.graph if node.op_type == "Softmax")
    scores.shape = None if shape is None else ir.Shape(shape)
    with pytest.raises(ExportError, match=NONE):
        ATTENTION_TO_PLUGIN(model)


@pytest.mark.parametrize(
    "edits",
    [
        [("t = Reshape (x, flat)", "t = Mul (z, z)")],
        [("f = Reshape (o, square)", "f = Relu (o)")],
        [("y = Neg (f)", "y = Neg (f) w = Neg (o)")],
    ],
)
def test_tokens_that_are_not_flat(edits):
    outputs = f"float[?, ?, ?, ?] y, float[n, {TOKENS}, {WIDTH}] w" if "w =" in edits[0][1] else "float[?, ?, ?, ?] y"
    if "Relu" in edits[0][1]:
        outputs = "float[?, ?, ?] y"
    with pytest.raises(ExportError, match="the tokens are not flat around an attention") as refused:
        ATTENTION_TO_PLUGIN(graph(*edits, outputs=outputs))
    assert refused.value.fix == "Leave it out of `lowerings`."


def test_what_there_are_kernels_for():
    sizes, tokens = (32, 63, 64, 65, 72, 80, 96), (1, 64, 511, 512, 513, 5000)
    assert {(s, t) for s in sizes for t in tokens if fits(s, t)} == {(64, 1), (64, 64), (64, 511), (64, 512)}
    assert {s for s in sizes if fits_kernels(s, 5000)} == {64, 72, 80}
    # 227 KiB hold keys and values of 4 bytes each for rows of 64 + 8, in steps of 16 rows
    most = 227 * 1024 // (4 * 72 * 16) * 16
    assert [fits_kernels(64, t, causal=True) for t in (77, most, most + 1)] == [True, True, False]
    assert not fits_kernels(72, 16, causal=True)
