"""Products counted in graphs, against formulas of ViT; and sides that shape inference gave names of its own."""

import dataclasses

import onnx
import pytest
from graphs_by_hand import graph as by_hand
from graphs_by_hand import node
from onnx import parser

from vit_convert.engine.inspection.estimate import estimate
from vit_convert.engine.inspection.onnx_wire import Value, read_graph
from vit_convert.engine.inspection.sides import solve_sides
from vit_convert.engine.inspection.work import count_work


@pytest.fixture
def graph(tmp_path):
    def make(text, opset=17):
        model = parser.parse_model(f'<ir_version: 10, opset_import: ["" : {opset}]>\n{text}')
        onnx.save(onnx.shape_inference.infer_shapes(model), tmp_path / "text.onnx")
        return read_graph(tmp_path / "text.onnx")

    return make


def constant(name, *sides):
    count = 1
    for side in sides:
        count *= side
    return f"float[{', '.join(map(str, sides))}] {name} = {{{', '.join('0' * count)}}}"


def test_a_vit(bundle_path):
    """mu/16 at 64x64 has one block of width 32, an MLP of 128, 16 patches and a class token, 10 classes."""
    width, mlp, tokens, patches, classes = 32, 128, 17, 16, 10
    # what lies behind the attention's keys and values is computed for the class token alone, as no other is used
    products = {
        (patches, 16 * 16 * 3, width),
        *((tokens, width, width, part) for part in ("key", "value")),
        *((1, width, width, part) for part in ("query", "out")),
        (1, width, mlp),
        (1, mlp, width),
        (1, width, classes),
    }
    attention = 2 * 2 * 1 * tokens * width
    expected = attention + sum(2 * rows * inner * outer for rows, inner, outer, *_ in products)
    found = count_work(read_graph(bundle_path / "model.onnx"), {"batch": 1})
    assert found.gflop_per_image * 1e9 == pytest.approx(expected, abs=500)  # six digits of a GFLOP
    assert found.weights == sum(inner * outer for _, inner, outer, *_ in products)
    assert found.values_per_image == sum(rows * (inner + outer) for rows, inner, outer, *_ in products)


@pytest.mark.parametrize(
    ("text", "flop", "weights", "values"),
    [
        # 3x3 over 2 groups: 8 channels of 4x4 from 2 each
        (
            f"g (float[N, 4, 6, 6] x) => (float[N, 8, 4, 4] y) <{constant('w', 8, 2, 3, 3)}> "
            "{ y = Conv <group = 2> (x, w) }",
            2 * 8 * 16 * 2 * 9,
            144,
            4 * 36 + 8 * 16,
        ),
        (
            f"g (float[N, 6] x) => (float[N, 2] y) <{constant('w', 2, 6)}> {{ y = Gemm <transB = 1> (x, w) }}",
            2 * 6 * 2,
            12,
            8,
        ),
        # of two values: computed, and taken to be fused
        ("g (float[N, 5, 4] x, float[N, 4, 3] z) => (float[N, 5, 3] y) { y = MatMul(x, z) }", 2 * 5 * 4 * 3, 0, 0),
        # one weight in two products is read once
        (
            f"g (float[N, 4] x) => (float[N, 4] y) <{constant('w', 4, 4)}> {{ a = MatMul(x, w) y = MatMul(a, w) }}",
            4 * 16,
            16,
            16,
        ),
        # quantized: the weight lies behind two nodes
        (
            f"g (float[N, 4] x) => (float[N, 4] y) <{constant('w', 4, 4)}, float s = {{0.5}}, int8 z = {{0}}> {{"
            " q = QuantizeLinear(w, s, z) d = DequantizeLinear(q, s, z) y = MatMul(x, d) }",
            2 * 16,
            16,
            8,
        ),
    ],
    ids=["convolution", "gemm", "two values", "shared weight", "quantized"],
)
def test_products(graph, text, flop, weights, values):
    """Of so large a batch that the six digits which are kept of a GFLOP hold the work of each image."""
    found, many = graph(text), 10**6
    counted = [count_work(found, {"N": count}) for count in (1, many)]
    assert (counted[0].weights, counted[0].values_per_image) == (weights, values)
    assert counted[1].gflop_per_image * 1e9 == pytest.approx(many * flop, rel=1e-12)
    assert (counted[1].weights, counted[1].values_per_image) == (weights, many * values)


@pytest.mark.parametrize(
    ("inputs", "output", "flop"),
    [
        # [batch, heads, queries, width] against [batch, heads, keys, width]: twice a product of these four
        ([(2, 3, 1000, 40), (2, 3, 700, 40), (2, 3, 700, 40)], (2, 3, 1000, 40), 2 * 2 * 2 * 3 * 1000 * 700 * 40),
        # [batch, queries, width of all heads]
        ([(2, 1000, 120), (2, 700, 120), (2, 700, 120)], (2, 1000, 120), 2 * 2 * 2 * 1000 * 700 * 120),
    ],
)
def test_attention_in_one_node(inputs, output, flop):
    sides = dict(zip("qkv", inputs))
    made = by_hand(node("Attention", "q k v", "y"), **{name: Value("float32", s) for name, s in sides.items()},
                   y=Value("float32", output))  # fmt: skip
    assert count_work(made, {}).gflop_per_image * 1e9 == pytest.approx(flop, rel=1e-12)
    masked = dataclasses.replace(made, nodes=[node("Attention", "q k v mask", "y")])  # of which nothing is known
    assert count_work(masked, {}) == count_work(made, {})


@pytest.mark.parametrize(
    ("op", "attributes", "inner"), [("Gemm", {"transA": 1}, 3000), ("Gemm", {}, 500), ("MatMul", {"transA": 1}, 500)]
)
def test_which_side_is_summed_over(op, attributes, inner):
    """Gemm may turn its first factor; MatMul has no such attribute."""
    shapes = {"x": (3000, 500), "w": (7, 7), "y": (500, 40)}  # only the first's and the output's count
    made = by_hand(node(op, "x w", "y", **attributes), **{name: Value("float32", s) for name, s in shapes.items()})
    assert count_work(made, {}).gflop_per_image * 1e9 == pytest.approx(2 * 500 * 40 * inner, rel=1e-12)


def test_another_domains_product_is_none_of_onnxs():
    made = by_hand(node("MatMul", "x w", "y", domain="mine"), x=Value("float32", (9, 9)))
    assert count_work(made, {}) is None


@pytest.mark.parametrize(
    ("op", "inputs", "output", "given", "found"),
    [
        ("Reshape", [("n", 6)], ("m", 3), {"n": 4}, {"m": 8}),
        ("Reshape", [("n", 6)], ("m", 3), {}, {}),  # it follows from what is not known
        ("Reshape", [("n", 6)], ("m", "k"), {"n": 4}, {}),  # two at once
        ("Reshape", [("n", 6)], ("m", "k"), {"n": 4, "k": 2}, {"m": 12}),
        ("Reshape", [("n", 6)], ("?", 3), {"n": 4}, {}),  # no name that another value could have
        ("Reshape", [("n", 6)], ("m", 0), {"n": 4}, {}),
        ("Reshape", [("n", 6)], ("m", "m"), {"n": 6}, {}),
        ("Add", [("n", 6), (1, 6)], ("m", 6), {"n": 4}, {"m": 4}),
        ("Add", [(1, 6), ("n", 6)], ("m", 6), {"n": 4}, {"m": 4}),
        ("Mul", [(3, "n"), ("n",)], ("k", "m"), {"n": 4}, {"k": 3, "m": 4}),  # from the last side on
        ("Where", [("n",), (2, 1), (1, 1)], (2, "m"), {"n": 4}, {"m": 4}),
        ("Add", [("n", 6), ("p", 6)], ("m", 6), {"n": 4}, {}),
        ("Add", [("n", 6), (1, 6)], ("?", 6), {"n": 4}, {}),
        ("Add", [("n", 6), (1, 6)], ("m", 6), {"n": 4, "m": 4}, {}),
        ("Relu", [("n", 6)], ("m", 6), {"n": 4}, {}),  # whose shape inference keeps the name
        ("Add", [None, None], ("m", 6), {"n": 4}, {}),
        ("Add", [("n", 6), None], ("m", 6), {"n": 4}, {"m": 4}),
        ("Add", [("n", 6)], None, {"n": 4}, {}),
    ],
)
def test_which_sides_follow(op, inputs, output, given, found):
    names = [f"x{i}" for i, _ in enumerate(inputs)]
    values = {name: Value("float32", shape) for name, shape in zip([*names, "y"], [*inputs, output])}
    made = by_hand(node(op, " ".join(names), "y"), **values)
    assert solve_sides(made, given) == {**given, **found}


def test_what_follows_is_used_at_once():
    shapes = {"x": ("n", 6), "a": ("m", 3), "b": ("k", 3), "c": (3, "j")}
    nodes = node("Reshape", "x", "a"), node("Add", "a a", "b"), node("Reshape", "b", "c")
    made = by_hand(*nodes, **{name: Value("float32", shape) for name, shape in shapes.items()})
    given = {"n": 4}
    assert solve_sides(made, given) == {"n": 4, "m": 8, "k": 8, "j": 8} and given == {"n": 4}


def test_a_graph_that_does_not_tell(graph):
    text = f"g (float[N, M, 4] x) => (float[N, M, 4] y) <{constant('w', 4, 4)}> {{ y = MatMul(x, w) }}"
    assert count_work(graph(text), {"N": 1}) is None and count_work(graph(text), {"N": 1, "M": 3}) is not None
    assert count_work(graph("g (float[N] x) => (float[N] y) { y = Relu(x) }"), {"N": 1}) is None


def test_sides_behind_a_reshape(graph):
    """As where TensorRT 8.6 gets a block's products as 1x1 convolutions: batch and tokens become one side."""
    weights = f"int64[4] sh = {{-1, 4, 1, 1}}, {constant('w', 8, 4, 1, 1)}"
    text = f"""g (float[N, 3, 4] x) => (float[K, 8, 1, 1] y) <{weights}> {{
        a = Reshape(x, sh)
        b = Reshape(x, sh)
        c = Add(a, b)
        y = Conv(c, w)
    }}"""
    found = graph(text)
    inner = found.value("c").shape[0]
    assert inner not in ("N", 30) and solve_sides(found, {"N": 10})[inner] == 30
    assert (estimate(found, {"N": 10}).largest, estimate(found, {"N": 10}).largest_name) == (30 * 4 * 4, "c")
