"""A rotated residual stream: the model computes what it did, its largest channels are spread, and what is not
understood is left alone."""

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from tiny_vit import TinyViT, normalize, run

from vit_convert.core.compare import compare
from vit_convert.core.onnx_file import is_rotated, open_session, run_session, save_onnx
from vit_convert.quantize.rotate import rotate_streams

# Only roundings differ: of the weights, 2**-24 each, and of sums of 64 and 128 of them; in float64 nothing is left.
EXACT = 1e-5


def rotated(tmp_path, **options):
    path = TinyViT(**options).save(tmp_path / "model.onnx")
    result = rotate_streams(ir.load(path))
    save_onnx(result.model, tmp_path / "rotated.onnx")
    return path, tmp_path / "rotated.onnx", result


@pytest.mark.parametrize("options", [{}, {"fused_qkv": False, "opset": 17}, {"outliers": 30.0}])
def test_it_computes_what_it_did(tmp_path, images, options):
    before, after, result = rotated(tmp_path, **options)
    assert result.widths == (64,) and len(result.norms) == 5 and not result.declined and not result.products
    operators = [[node.op_type for node in ir.load(path).graph] for path in (before, after)]
    assert operators[0] == operators[1] and is_rotated(after) and not is_rotated(before)
    x = normalize(images)
    assert compare(run(before, x)[0], run(after, x)[0]).max_rel <= EXACT


def test_outlier_channels_are_spread(tmp_path, images):
    before, after, result = rotated(tmp_path, outliers=30.0)
    name, x = result.norms[2], normalize(images)
    largest = [np.abs(run_session(open_session(path, [name]), x)[name]) for path in (before, after)]
    # of a row of 64 values whose mean square is 1, one can be 8 at most
    assert largest[1].max() < 0.7 * largest[0].max()
    weights = {name: v.const_value.numpy() for name, v in ir.load(after).graph.initializers.items() if v.const_value}
    scale = weights["Transformer/encoderblock_0/LayerNorm_0/scale"]
    np.testing.assert_array_equal(scale, np.ones(64, np.float32))
    for writer in ("out/kernel", "out/bias"):  # writes no mean
        kernel = weights[f"Transformer/encoderblock_1/MultiHeadDotProductAttention_0/{writer}"]
        np.testing.assert_allclose(kernel.sum(-1), 0, rtol=0, atol=1e-6)


def test_the_graph_is_left_as_it_was(tmp_path):
    path = TinyViT().save(tmp_path / "model.onnx")
    model = ir.load(path)
    before = {name: v.const_value.numpy().tobytes() for name, v in model.graph.initializers.items() if v.const_value}
    rotate_streams(model)
    assert before == {name: v.const_value.numpy().tobytes() for name, v in model.graph.initializers.items()}


def graph(text, given="float[2, 5, 6] x", functions=""):
    """A model of `x` by ONNX's text, with seeded weights for the names of SHAPES that stand in it."""
    head = f'<ir_version: 9, opset_import: ["" : 18, "own" : 1]> agraph ({given}) => ('
    proto = onnx.parser.parse_model(head + text + functions)
    rng, used = np.random.default_rng(5), {name for node in proto.graph.node for name in node.input}
    for name, shape in (SHAPES | dict.fromkeys(INTEGERS, ())).items():
        if name in used:
            weight = INTEGERS[name] if name in INTEGERS else rng.normal(0.3, 1, shape).astype(np.float32)
            proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, name))
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto, strict_mode=True))


SHAPES = {"w": (6, 6), "v": (6, 6), "up": (6, 8), "down": (8, 6), "tok": (5, 5)}
INTEGERS = {"axes": np.array([1]), "order": np.array([1, 0, 2, 5, 4, 3]), "four": np.array([4, 0, 1, 1])}
INTEGERS |= {"square": np.array([[4, 0], [1, 1]]), "scalar": np.array(3)}
SHAPES |= dict.fromkeys(["g", "c", "g2", "c2", "g3", "c3", "offset"], (6,))
SHAPES |= {"first": (6, 6, 1, 1), "wide": (8, 6, 1, 1), "narrow": (6, 8, 1, 1), "last": (6, 6, 1, 1)}
SHAPES |= dict.fromkeys(["gamma", "beta", "gamma2", "beta2"], (6, 1, 1))
BLOCK = "s = MatMul(x, w) n = LayerNormalization<axis=-1>(s, g, c) a = MatMul(n, up) r = Relu(a) d = MatMul(r, down) "
BLOCK += "t = Add(s, d) m = LayerNormalization<axis=-1>(t, g2, c2) "


def both(model, tmp_path, shape=(2, 5, 6)):
    """What a model gives before and after, and what was done."""
    result = rotate_streams(model)
    found = []
    for name, each in (("before", model), ("after", result.model)):
        save_onnx(each, tmp_path / f"{name}.onnx")
        x = np.random.default_rng(1).normal(size=shape).astype(np.float32)
        found.append(open_session(tmp_path / f"{name}.onnx").run(None, {"x": x}))
    return *found, result


@pytest.mark.parametrize(
    ("text", "products"),
    [
        ("float[2, 5, 6] y) { " + BLOCK + "y = MatMul(m, v) }", ()),
        ("float[2, 5, 6] m) { " + BLOCK + "}", ("m",)),  # the graph gives the last norm
        # pooled, and then turned back: the product is one of five
        ("float[2, 6] y) { " + BLOCK + "y = ReduceMean<keepdims=0>(m, axes) }", ("y",)),
        ("float[2, 1, 6] y) { " + BLOCK + "k = Gather<axis=1>(m, axes) y = MatMul(k, v) }", ()),
        ("float[2, 5, 6] y) { " + BLOCK + "y = Tanh(m) }", ("m",)),
        ("float[2, 5, 6] m, float[2, 5, 6] y) { " + BLOCK + "y = MatMul(m, v) }", ("m",)),
    ],
)
def test_what_reads_the_last_norm(tmp_path, text, products):
    before, after, result = both(graph(text), tmp_path)
    assert result.widths == (6,) and result.products == products and result.norms == ("n", "m")
    for x, y in zip(before, after, strict=True):
        assert compare(x, y).max_rel <= EXACT


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("float[2, 5, 6] t) { " + BLOCK + "}", "t is an output of the graph"),
        ("float[2, 5, 6] y) { " + BLOCK + "q = Tanh(s) y = Add(q, m) }", "Tanh"),
        (
            "float[2, 5, 6] y) { n = LayerNormalization<axis=-1>(x, g, c) y = MatMul(n, v) }",
            "x is an input of the graph",
        ),
        # a norm in the middle that something else reads would need a product for every token
        ("float[2, 5, 6] y) { " + BLOCK + "k = Tanh(n) o = MatMul(m, v) y = Add(o, k) }", "n is read by more"),
        (  # channels in another order
            "float[2, 5, 6] y) { " + BLOCK + "q = Gather<axis=2>(t, order) o = LayerNormalization<axis=-1>(q, g, c) "
            "y = MatMul(o, v) }",
            "chooses or joins channels",
        ),
        # a Mixer's tokens: neither their weights nor their bias have a channel
        (
            "float[2, 5, 6] y) { s = MatMul(x, w) n = LayerNormalization<axis=-1>(s, g, c) "
            "p = Transpose<perm=[0, 2, 1]>(n) o = MatMul(p, tok) d = Transpose<perm=[0, 2, 1]>(o) t = Add(s, d) "
            "m = LayerNormalization<axis=-1>(t, g2, c2) y = MatMul(m, v) }",
            "MatMul",
        ),
        # a post-norm block: the LayerNorm writes what it read
        (
            "float[2, 5, 6] y) { s = MatMul(x, w) n = LayerNormalization<axis=-1>(s, g, c) d = MatMul(n, v) "
            "t = Add(n, d) m = LayerNormalization<axis=-1>(t, g2, c2) y = MatMul(m, v) }",
            "LayerNormalization",
        ),
    ],
)
def test_what_is_left_alone(tmp_path, text, why):
    before, after, result = both(graph(text), tmp_path)
    assert any(why in reason for reason in result.declined.values()), result.declined
    for x, y in zip(before, after, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=EXACT * np.abs(x).max())


def test_a_stream_whose_shape_is_not_known_is_left_alone():
    model = graph("float[2, 5, 6] y) { " + BLOCK + "y = MatMul(m, v) }")
    next(value for node in model.graph for value in node.outputs if value.name == "t").shape = None
    assert rotate_streams(model).declined == {"n": "t has no known shape"}


def test_a_norm_without_a_bias(tmp_path):
    text = "float[2, 5, 6] y) { " + BLOCK.replace("(s, g, c)", "(s, g)") + "y = MatMul(m, v) }"
    before, after, result = both(graph(text), tmp_path)
    assert result.norms == ("n", "m") and compare(before[0], after[0]).max_rel <= EXACT


@pytest.mark.parametrize("linear", ["d = MatMul(n, v)", "e = MatMul(n, v) d = Add(e, offset)"])
def test_a_linear_from_a_norm_straight_into_the_stream(tmp_path, linear):
    """The norm's bias comes out of it as a bias of its own, which the stream has rotated."""
    block = f"s = MatMul(x, w) n = LayerNormalization<axis=-1>(s, g, c) {linear} t = Add(s, d) "
    text = "float[2, 5, 6] y) { " + block + "m = LayerNormalization<axis=-1>(t, g2, c2) y = MatMul(m, v) }"
    before, after, result = both(graph(text), tmp_path)
    assert result.norms == ("n", "m") and compare(before[0], after[0]).max_rel <= EXACT


# What the kernels of the lowering "fused" compute: LayerNorm over the channels of [tokens, channels, 1, 1].
FUSED = """
<domain: "own", opset_import: ["" : 18]> VitNorm (x, g, c) => (y) { y = LayerNormalization <axis = 1> (x, g, c) }
<domain: "own", opset_import: ["" : 18]> VitAddNorm (b, x, g, c) => (t, y) {
    t = Add (b, x) y = LayerNormalization <axis = 1> (t, g, c) }"""
FUSED_BLOCK = (
    "s = Conv(x, first, offset) n = own.VitNorm(s, gamma, beta) a = Conv(n, wide) r = Relu(a) d = Conv(r, narrow) "
)
FUSED_BLOCK += "t, m = own.VitAddNorm(d, s, gamma2, beta2) "


@pytest.mark.parametrize(
    ("text", "products"),
    [
        ("float[10, 6, 1, 1] y) { " + FUSED_BLOCK + "y = Conv(m, last) }", ()),
        ("float[10, 6, 1, 1] m) { " + FUSED_BLOCK + "}", ("m",)),  # turned back by a convolution
        # the sum goes on: a second block's norm reads what the first one's gave
        (
            "float[10, 6, 1, 1] y) { "
            + FUSED_BLOCK
            + "q = Conv(m, last) e = Relu(q) f = Conv(e, last) u, o = own.VitAddNorm(f, t, gamma, beta) "
            "y = Conv(o, first) }",
            (),
        ),
    ],
)
def test_norms_of_our_kernels(tmp_path, text, products):
    model = graph(text, "float[10, 6, 1, 1] x", FUSED)
    shapes = {"a": 8, "r": 8}
    for node in model.graph:  # which ONNX does not infer behind functions
        for value in node.outputs:
            value.shape = ir.Shape([10, shapes.get(value.name, 6), 1, 1])
    before, after, result = both(model, tmp_path, (10, 6, 1, 1))
    assert result.widths == (6,) and result.products == products and result.norms[:2] == ("n", "m")
    assert compare(before[0], after[0]).max_rel <= EXACT
    weights = {name: v.const_value.numpy() for name, v in result.model.graph.initializers.items()}
    np.testing.assert_allclose(weights["narrow"].sum(0), 0, rtol=0, atol=1e-6)  # writes no mean


def test_a_convolution_from_a_norm_straight_into_the_stream(tmp_path):
    text = "float[10, 6, 1, 1] y) { s = Conv(x, first, offset) n = own.VitNorm(s, gamma, beta) d = Conv(n, last) "
    text += "t, m = own.VitAddNorm(d, s, gamma2, beta2) y = Conv(m, last) }"
    model = graph(text, "float[10, 6, 1, 1] x", FUSED)
    before, after, result = both(model, tmp_path, (10, 6, 1, 1))
    assert result.norms == ("n", "m") and compare(before[0], after[0]).max_rel <= EXACT


@pytest.mark.parametrize(("chosen", "shape"), [("four", "[2, 4, 6]"), ("square", "[2, 2, 2, 6]"), ("scalar", "[2, 6]")])
def test_tokens_that_are_chosen_keep_their_channels(tmp_path, chosen, shape):
    """The last axis, however many the indices have."""
    text = f"float{shape} y) {{ {BLOCK} q = Gather<axis=1>(t, {chosen}) o = LayerNormalization<axis=-1>(q, g3, c3) "
    text += "z = MatMul(m, v) k = ReduceMean<keepdims=0>(z) u = MatMul(o, w) y = Add(u, k) }"
    before, after, result = both(graph(text), tmp_path)
    assert result.norms == ("n", "m", "o") and not result.declined
    assert compare(before[0], after[0]).max_rel <= EXACT


def test_sizes_of_a_stream_may_be_read(tmp_path):
    text = (
        "float[2, 5, 6] y) { " + BLOCK + "z = MatMul(m, v) k = Shape(t) j = Shape(m) i = Max(k, j) y = Reshape(z, i) }"
    )
    before, after, result = both(graph(text), tmp_path)
    assert result.norms == ("n", "m") and not result.declined and not result.products
    assert compare(before[0], after[0]).max_rel <= EXACT


def test_a_shared_weight_is_parted(tmp_path):
    """One matrix writes the stream and reads it: each use gets its own."""
    text = "float[2, 5, 6] y) { " + BLOCK + "y = MatMul(m, w) }"
    before, after, result = both(graph(text), tmp_path)
    assert result.widths == (6,)
    assert compare(before[0], after[0]).max_rel <= EXACT
