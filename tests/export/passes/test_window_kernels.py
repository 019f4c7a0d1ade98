"""Windowed attention as nodes of our kernel, on graphs of a few nodes: form, what is refused or left alone, numbers
against NumPy."""

import numpy as np
import pytest
from export_graphs import FLOAT32, computed, described, ops

from vit_convert.core.errors import ExportError
from vit_convert.export.passes.attention_plugin import DOMAIN
from vit_convert.export.passes.cleanup import clean
from vit_convert.export.passes.window_kernels import WINDOWS, WINDOWS_TO_KERNELS

SIZE, HEADS = 32, 2  # of the kernel's heads
WIDTH = SIZE * HEADS
PARTS = ("query", "key", "value", "out")
NAMES = {part: f"stage_0/block_0/attn/{part}/kernel" for part in PARTS} | {
    f"{part}_bias": f"stage_0/block_0/attn/{part}/bias" for part in PARTS
}
NAMES["bias"] = "stage_0/block_0/attn/bias"


def head(part, perm, windows):
    """Queries, keys or values as they are traced; the windows of an image beside its heads if each has its own bias."""
    text = f"""
    p{part} = MatMul (t, {part}) s{part} = Add (p{part}, {part}_bias) r{part} = Reshape (s{part}, split)"""
    if windows == 1:
        return f"{text} h{part} = Transpose <perm = {perm}> (r{part})"
    return f"{text} t{part} = Transpose <perm = {perm}> (r{part}) h{part} = Reshape (t{part}, {part}_heads)"


def attention(windows):
    """x [rows, width, 1, 1] -> -y, the same; with `z`, what a block may add."""
    parts = [head(part, [0, 2, 3, 1] if part == "key" else [0, 2, 1, 3], windows) for part in PARTS[:3]]
    return f"""t = Reshape (x, flat) {"".join(parts)}
    product = MatMul (hquery, hkey) scores = Add (product, bias) weights = Softmax <axis = -1> (scores)
    mixed = MatMul (weights, hvalue) apart = Reshape (mixed, heads) back = Transpose <perm = [0, 2, 1, 3]> (apart)
    joined = Reshape (back, flat) pout = MatMul (joined, out) o = Add (pout, out_bias) f = Reshape (o, square)
    y = Neg (f)"""


def shapes(windows, area, size=SIZE):
    width = HEADS * size
    return {
        **dict.fromkeys(PARTS, (width, width)),
        **{f"{part}_bias": (width,) for part in PARTS},
        "bias": (1, windows * HEADS, area, area),
    }


def graph(*, windows=1, area=4, per_image=None, size=SIZE, edits=(), outputs=None):
    """The attention of `per_image` windows of an image, with a bias for all of them or one for each."""
    width, per_image = HEADS * size, per_image or windows
    parameters = shapes(windows, area, size)
    weights = ", ".join(f"float{list(shape)} {name}" for name, shape in parameters.items())
    tokens, many = per_image * area, windows * HEADS
    numbers = {"flat": (-1, tokens, width), "square": (-1, width, 1, 1), "split": (-1, area, HEADS, size)}
    numbers |= {"heads": (-1, HEADS, area, size), "key_heads": (-1, many, size, area)}
    numbers |= dict.fromkeys(("query_heads", "value_heads"), (-1, many, area, size))
    constants = [f"int64[{len(row)}] {name} = {{{', '.join(map(str, row))}}}" for name, row in numbers.items()]
    text = f"""g (float[m, {width}, 1, 1] x, float[n, {tokens}, {width}] z, {weights}) =>
    ({outputs or f"float[m, {width}, 1, 1] y"}) <{", ".join(constants)}> {{ {attention(windows)} }}"""
    for old, new in edits:
        assert old in text, old
        text = text.replace(old, new)
    model = described(text, *parameters, names=NAMES, opset=17)
    for i, node in enumerate(model.graph):
        node.name = f"{node.op_type}_{i}"
    return model


def random_parameters(windows, area):
    rng = np.random.default_rng(3)
    return {
        NAMES[name]: (rng.standard_normal(shape) / (8 if len(shape) == 2 else 1)).astype(np.float32)
        for name, shape in shapes(windows, area).items()
    }


def by_hand(params, x, windows, area):
    """The attention of rows [rows, width] in float64, window by window and head by head."""
    p = {word: params[name].astype(np.float64) for word, name in NAMES.items()}
    rows = x.astype(np.float64)
    query, key, value = (rows @ p[part] + p[f"{part}_bias"] for part in PARTS[:3])
    mixed = np.zeros_like(rows)
    for number, start in enumerate(range(0, len(rows), area)):
        window = slice(start, start + area)
        for one in range(HEADS):
            columns = slice(one * SIZE, (one + 1) * SIZE)
            scores = query[window, columns] @ key[window, columns].T + p["bias"][0, number % windows * HEADS + one]
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            mixed[window, columns] = weights / weights.sum(-1, keepdims=True) @ value[window, columns]
    return mixed @ p["out"] + p["out_bias"]


def lowered(model):
    before = {*model.graph}
    assert WINDOWS_TO_KERNELS(model).places == 1
    made = [node.outputs[0] for node in model.graph if node not in before]
    # nothing infers the shape and type behind our node
    assert [tuple(value.shape) for value in made[:3]] == [(None, times * WIDTH, 1, 1) for times in (3, 1, 1)]
    assert all(tuple(value.shape) == (None, WIDTH, 1, 1) for value in made[3:])
    assert {value.dtype.name for value in made} == {"FLOAT"}
    clean(model)
    return model


def kept(node):
    return {name: node.attributes[name].value for name in ("heads", "tokens", "head", "windows", "quantized")}


@pytest.mark.parametrize("windows", [1, 2])
@pytest.mark.parametrize("area", [4, 3])  # the kernel reads two columns of the bias at a time
def test_form_and_numbers(windows, area):
    """Two images of two windows, with a bias for all windows or one for each."""
    model = lowered(graph(windows=windows, area=area, per_image=2))
    assert ops(model) == ["Conv", WINDOWS, "Conv", "Neg"]
    qkv, attention, projection, _ = model.graph
    assert (attention.domain, model.opset_imports[DOMAIN]) == (DOMAIN, 1)
    assert kept(attention) == {"heads": HEADS, "tokens": area, "head": 32, "windows": windows, "quantized": 0}
    # TensorRT's parser asks the plugin of this version
    assert [attention.attributes[f"plugin_{word}"].value for word in ("version", "namespace")] == ["1", ""]
    assert [each.attributes["kernel_shape"].as_ints() for each in (qkv, projection)] == [(1, 1)] * 2
    assert tuple(attention.inputs[1].shape) == (windows * HEADS, area, area + area % 2)
    # what replaces a weight has its name, so that it is found in the checkpoint
    assert attention.inputs[1].name == NAMES["bias"] and projection.inputs[1].name == NAMES["out"]
    assert {value.name for value in qkv.inputs[1:]} == {
        f"stage_0/block_0/attn/qkv/{word}" for word in ("kernel", "bias")
    }
    params, x = random_parameters(windows, area), np.random.default_rng(4).standard_normal((4 * area, WIDTH, 1, 1))
    expected = -by_hand(params, x[:, :, 0, 0], windows, area)
    (got,) = computed(model, params, x.astype(np.float32), np.zeros((2, 2 * area, WIDTH), np.float32))
    assert got.shape == x.shape
    np.testing.assert_allclose(got[:, :, 0, 0], expected, rtol=0, atol=FLOAT32 * np.abs(expected).max())


@pytest.mark.parametrize("added", ["Add (o, z)", "Add (z, o)"])
def test_what_a_block_adds_is_flat_too(added):
    """So that our LayerNorm can take the addition along."""
    edits = [("f = Reshape (o, square)", f"b = {added} f = Reshape (b, square)")]
    model = lowered(graph(windows=2, edits=edits))
    assert sorted(ops(model)) == ["Add", "Conv", "Conv", "Neg", "Reshape", WINDOWS]
    add = next(node for node in model.graph if node.op_type == "Add")
    assert [tuple(value.shape)[1:] for value in (*add.inputs, *add.outputs)] == [(WIDTH, 1, 1)] * 3
    params, rng = random_parameters(2, 4), np.random.default_rng(5)
    x, z = rng.standard_normal((16, WIDTH, 1, 1)), rng.standard_normal((2, 8, WIDTH))
    expected = -by_hand(params, x[:, :, 0, 0], 2, 4) - z.reshape(16, WIDTH)
    (got,) = computed(model, params, x.astype(np.float32), z.astype(np.float32))
    np.testing.assert_allclose(got[:, :, 0, 0], expected, rtol=0, atol=FLOAT32 * np.abs(expected).max())


@pytest.mark.parametrize(
    "edit, why",
    [
        (("Softmax <axis = -1> (scores)", "Sigmoid (scores)"), "no softmax"),
        (("Softmax <axis = -1> (scores)", "Softmax <axis = -1> (x)"), "a softmax of an input"),
        (("Add (product, bias)", "Sub (product, bias)"), "another operator in place of the bias"),
        (("Add (product, bias)", "Add (product, product)"), "a bias that is computed"),
        (("Add (product, bias)", "Add (bias, bias)"), "no product"),
        (("product = MatMul (hquery, hkey)", "other = MatMul (hquery, hkey) product = Relu (other)"), "a ReLU between"),
        (("MatMul (weights, hvalue)", "Add (weights, bias)"), "no product behind it"),
        (("float[1, 2, 4, 4] bias", "float[4, 4] bias"), "a bias of two axes"),
        (("float[1, 2, 4, 4] bias", "float[1, 2, 1, 4] bias"), "a bias of each key"),
        (("float[1, 2, 4, 4] bias", "float[1, 1, 4, 4] bias"), "a bias that all heads share"),
        (("squery = Add (pquery, query_bias)", "squery = Mul (pquery, query_bias)"), "no layer for the queries"),
        (("skey = Add (pkey, key_bias)", "skey = Mul (pkey, key_bias)"), "none for the keys"),
        (("svalue = Add (pvalue, value_bias)", "svalue = Mul (pvalue, value_bias)"), "none for the values"),
        (("o = Add (pout, out_bias)", "o = Mul (pout, out_bias)"), "none behind it"),
        (("MatMul (t, query)", "MatMul (z, query)"), "queries of something else"),
        (("MatMul (t, key)", "MatMul (z, key)"), "keys of something else"),
        (("MatMul (t, value)", "MatMul (z, value)"), "values of something else"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_windowed_attention(edit, why):
    with pytest.raises(ExportError, match="no attention with a bias within windows") as refused:
        WINDOWS_TO_KERNELS(graph(edits=[edit]))
    assert refused.value.fix == "Leave it out of `lowerings`."


def test_a_bias_of_several_first_axes():
    """A bias of each image is none of the windows'."""
    with pytest.raises(ExportError, match="no attention with a bias"):
        WINDOWS_TO_KERNELS(graph(edits=[("float[1, 2, 4, 4] bias", "float[2, 2, 4, 4] bias")], per_image=2))


def test_scores_that_something_else_reads():
    """What else reads the softmax needs it, so that the kernel would save nothing."""
    with pytest.raises(ExportError, match="no attention with a bias"):
        edits = [("y = Neg (f)", "y = Neg (f) w = Neg (weights)")]
        WINDOWS_TO_KERNELS(graph(edits=edits, outputs=f"float[m, {WIDTH}, 1, 1] y, float[k, {HEADS}, 4, 4] w"))


@pytest.mark.parametrize("size, area, fits", [(32, 144, True), (32, 145, False), (16, 4, False), (64, 4, False)])
def test_what_the_kernel_supports(size, area, fits):
    model = graph(size=size, area=area)
    if fits:
        assert WINDOWS_TO_KERNELS(model).places == 1
        return
    with pytest.raises(ExportError, match=f"heads of {size} over {area} tokens; .* heads of 32 over at most 144") as e:
        WINDOWS_TO_KERNELS(model)
    assert e.value.fix == "Leave it out of `lowerings`."


READ_TWICE = ("y = Neg (f)", "y = Neg (f) w = Neg (v)"), f"float[m, {WIDTH}, 1, 1] y, float[n, 4, {WIDTH}] w"


@pytest.mark.parametrize(
    "edit, also, outputs",
    [
        (("t = Reshape (x, flat)", "t = Mul (z, z)"), (), "float[m, 64, 1, 1] y"),
        (("f = Reshape (o, square)", "f = Relu (o)"), (), "float[a, b, c] y"),
        (("square = {-1, 64, 1, 1}", "square = {-1, 32, 2, 1}"), (), "float[a, b, c, d] y"),
        (("square = {-1, 64, 1, 1}", "square = {-1, 32, 1, 2}"), (), "float[a, b, c, d] y"),
        (("int64[4] square = {-1, 64, 1, 1}", "int64[3] square = {-1, 1, 1}"), (), "float[a, b, c] y"),
        (("f = Reshape (o, square)", "f = Reshape (o, square) v = Relu (o)"), *READ_TWICE),
        (("f = Reshape (o, square)", "b = Add (o, z) f = Reshape (b, square) v = Relu (b)"), *READ_TWICE),
    ],
    ids=["computed", "no reshape", "rows", "columns", "three axes", "another reader", "another reader of the sum"],
)
def test_tokens_that_are_not_flat(edit, also, outputs):
    with pytest.raises(ExportError, match="the tokens are not flat around an attention") as refused:
        WINDOWS_TO_KERNELS(graph(edits=[edit, *([also] if also else [])], outputs=outputs))
    assert refused.value.fix == "Leave it out of `lowerings`."
