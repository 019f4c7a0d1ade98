"""Channels of queries, keys and values made to reach equally far: the model computes what it did."""

import numpy as np
import onnx_ir as ir
import pytest

from vit_convert.quantize.equalize import attention_inputs, equalize, factors


def test_factors_of_known_ranges():
    # One head of two channels: queries reach 4 and 1, keys lie in 1 ± 1 and ± 4, values in 10 ± 1 and ± 0.5.
    low = np.array([-4, -1, 0, -4, 9, -0.5], np.float32)
    high = np.array([2, 1, 2, 4, 11, 0.5], np.float32)
    found = factors(low, high, 1)
    np.testing.assert_allclose(found.query, [[0.5, 2.0]])  # queries and keys both reach 2 in both channels
    np.testing.assert_allclose(found.key_shift, [[-1, 0]])
    np.testing.assert_allclose(found.value, [[2, 4]])  # and so do the values
    np.testing.assert_allclose(found.value_shift, [[-10, 0]])


def test_channel_that_is_always_zero_stays_finite():
    found = factors(np.zeros(6, np.float32), np.zeros(6, np.float32), 1)
    assert all(np.isfinite(x).all() for x in (found.query, 1 / found.query, found.value, 1 / found.value))


def conv(x, weight, bias):
    """A convolution with a kernel of one on [images, channels, tokens]."""
    return np.einsum("oc,nct->not", weight[:, :, 0, 0].astype(np.float64), x) + bias[:, None]


def attention(qkv, heads):
    """What the node computes: softmax(q · k) · v for each head, whose channels are its queries, its keys, its
    values."""
    images, channels, tokens = qkv.shape
    q, k, v = np.moveaxis(qkv.reshape(images, heads, 3, channels // heads // 3, tokens), 2, 0)
    scores = np.einsum("nhdt,nhds->nhts", q, k)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("nhts,nhds->nhdt", weights, v).reshape(images, channels // 3, tokens)


HEADS, SIZE, WIDTH = 2, 4, 5


def block(*, projection="Conv", reader=False, source="Conv"):
    """A convolution, an attention and its projection as a graph, and their weights."""
    rng = np.random.default_rng(0)
    shapes = {
        "w": (HEADS * 3 * SIZE, WIDTH, 1, 1),
        "b": (HEADS * 3 * SIZE,),
        "p": (WIDTH, HEADS * SIZE, 1, 1),
        "c": (WIDTH,),
    }
    weights = {name: (rng.normal(size=shape) * 0.4).astype(np.float32) for name, shape in shapes.items()}
    weights["b"] += np.repeat([0.5, 2.0, 20.0, -0.5, -3.0, 8.0], SIZE).astype(np.float32)  # keys and values far from 0
    value = {name: ir.Value(name=name, const_value=ir.tensor(array, name=name)) for name, array in weights.items()}
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT))
    before = ir.node(source, [x, value["w"], value["b"]], name="qkv")
    middle = ir.node("VitAttention", [before.outputs[0]], {"heads": HEADS}, domain="ours", name="attention")
    after = ir.node(projection, [middle.outputs[0], value["p"], value["c"]], name="projection")
    nodes = [before, middle, after, *([ir.node("Relu", [middle.outputs[0]], name="reader")] if reader else [])]
    before.outputs[0].name = "qkv"
    graph = ir.Graph(
        [x], [after.outputs[0]], nodes=nodes, initializers=[*value.values()], opset_imports={"": 17, "ours": 1}
    )
    return ir.Model(graph, ir_version=8), weights


def computed(weights, x):
    qkv = conv(x, weights["w"], weights["b"])
    return qkv, conv(attention(qkv, HEADS), weights["p"], weights["c"])


def extremes_of(qkv):
    return {"qkv": (qkv.min((0, 2)).astype(np.float32), qkv.max((0, 2)).astype(np.float32))}


def test_the_graph_computes_what_it_did_and_every_part_reaches_equally_far():
    model, weights = block()
    x = np.random.default_rng(1).normal(size=(3, WIDTH, 7))
    qkv, before = computed(weights, x)
    assert attention_inputs(model) == ["qkv"]
    assert equalize(model, extremes_of(qkv)) == 1
    changed = {name: model.graph.initializers[name].const_value.numpy() for name in weights}
    assert all(array.dtype == np.float32 and array.shape == weights[name].shape for name, array in changed.items())
    equal, after = computed(changed, x)
    # Weights are rounded to float32 after a division and a product or two: some 1e-7 each, scores of up to 50 make 1e-5
    # of it.
    assert np.abs(after - before).max() < 1e-4 * np.abs(before).max()
    reach = np.abs(equal).max((0, 2)).reshape(HEADS, 3, SIZE)
    was = np.abs(qkv).max((0, 2)).reshape(HEADS, 3, SIZE)
    most = reach[:, :2].max()
    np.testing.assert_allclose(reach[:, 2], most, rtol=1e-4)  # values to the largest of queries and keys
    np.testing.assert_allclose(reach[:, 0], reach[:, 1], rtol=1e-4)  # queries as their keys
    assert was.max() / was.min() > 10 > 3 > reach.max() / reach.min()


@pytest.mark.parametrize("options", [{"projection": "MatMul"}, {"reader": True}, {"source": "Gemm"}])
def test_an_attention_between_other_nodes_is_left_alone(options):
    """Its values could not be changed back behind it, or are not those of a convolution."""
    model, weights = block(**options)
    assert equalize(model, {}) == 0
    for name, array in weights.items():
        assert np.array_equal(model.graph.initializers[name].const_value.numpy(), array)
