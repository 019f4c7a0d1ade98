"""The pooled token's way, on graphs small enough to be read: what may be computed for one token alone, and what may
not."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from export_graphs import graph, random_feeds, run

from vit_convert.export.passes.prune_to_pooled_token import _along_last, pooled_token, prune_tokens


def numbers(count: int, factor: int = 1) -> str:
    """So many numbers, the same each time."""
    return f"{{{', '.join(str(round(0.1 * (i * factor % 7) - 0.2, 1)) for i in range(count))}}}"


WEIGHTS = f"""
    float[8, 8] w = {numbers(64)}, float[8, 8] k = {numbers(64, 2)}, float[8, 8] v = {numbers(64, 3)}, float[4,
    4] f = {numbers(16, 5)},
    float[8] b = {numbers(8)}, float[1, 4, 8] table = {numbers(32)}, float[1, 1, 8] first = {numbers(8, 3)},
    float scale = {{0.5}},
    float[4, 8] all = {numbers(32, 2)}, int64[1] vector_one = {{1}}, int64[2] vectors = {{0, 1}}, int64[1] last = {{2}},
    int64[1] negative = {{-1}}, int64 zero = {{0}}, int64 two = {{2}}, int64[1] vector = {{0}},
    int64[4] split = {{0, 4, 2, 4}},
    int64[3] merge = {{0, 4, 8}}"""


def text(body: str, outputs: str = "float[n, 8] y") -> str:
    return f"g (float[n, 4, 8] x) => ({outputs}) <{WEIGHTS}> {{ {body} }}"


def pruned(body: str, outputs: str = "float[n, 8] y") -> tuple[ir.Model, int]:
    """Prunes, and holds the result against the graph before it."""
    model = graph(text(body, outputs))
    feeds = random_feeds(model)
    before = run(model, feeds)
    count = prune_tokens(model)
    check_shapes(model)
    for expected, got in zip(before, run(model, feeds), strict=True):
        assert got.shape == expected.shape
        assert np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max()  # float32 sums of eight, in another order
    return model, count


def check_shapes(model: ir.Model) -> None:
    """The shapes that the pass noted are those that ONNX infers; it raises where they differ."""
    onnx.shape_inference.infer_shapes(ir.to_proto(model), check_type=True, strict_mode=True, data_prop=True)


def tokens_of(model: ir.Model, op_type: str) -> list[int]:
    """The lengths of the second axis of what the operators of a type give."""
    return [node.outputs[0].shape[1] for node in model.graph if node.op_type == op_type]


@pytest.mark.parametrize("index", ["zero", "two"])
def test_the_token_is_taken_before_what_works_on_each_by_itself(index):
    body = f"""
        n = LayerNormalization <axis = -1, epsilon = 1e-6, stash_type = 1> (x, b, b) h = MatMul (n, w) s = Add (h,
        b) r = Relu (s)
        t = Add (r, x) y = Gather <axis = 1> (t, {index})"""
    model, count = pruned(body)
    assert count == 5
    for op_type in ("LayerNormalization", "MatMul", "Add", "Relu"):
        assert set(tokens_of(model, op_type)) == {1}, op_type
    # the stream is read twice, by the norm and by the residual sum, and its token is taken once
    assert [node.op_type for node in model.graph].count("Gather") == 1
    taken = next(node for node in model.graph if node.op_type == "Gather")
    assert taken.inputs[0].name == "x" and taken.inputs[1].const_value.numpy().tolist() == [0 if index == "zero" else 2]


ATTENTION = """
    q = MatMul (x, w) qs = Reshape (q, split) qh = Transpose <perm = [0, 2, 1, 3]> (qs)
    kk = MatMul (x, k) ks = Reshape (kk, split) kh = Transpose <perm = [0, 2, 3, 1]> (ks)
    vv = MatMul (x, v) vs = Reshape (vv, split) vh = Transpose <perm = [0, 2, 1, 3]> (vs)
    SCORES p = Softmax <axis = -1> (scores) o = MatMul (p, vh)
    ot = Transpose <perm = [0, 2, 1, 3]> (o) BETWEEN
    m = Reshape (ob, merge) h = MatMul (m, w) z = Add (h, x) y = Gather <axis = 1> (z, two)"""


@pytest.mark.parametrize(
    "scores",
    [
        "scores = MatMul (qh, kh)",
        "a = MatMul (qh, kh) scores = Mul (a, scale)",
        "qq = Mul (qh, scale) scores = MatMul (qq, kh)",
    ],
)
def test_only_keys_and_values_of_all_tokens_are_computed(scores):
    model, count = pruned(ATTENTION.replace("SCORES", scores).replace("BETWEEN", "").replace("ob", "ot"))
    projections = [node for node in model.graph if node.op_type == "MatMul" and node.inputs[1].name in {*"wkv"}]
    # queries and the output projection of one token
    assert sorted(node.outputs[0].shape[1] for node in projections) == [1, 1, 4, 4]
    assert all(node.outputs[0].shape[2] == 1 for node in model.graph if node.op_type == "Softmax")
    assert count >= 10
    # with one token, swapping heads and tokens moves nothing: the two that are left are those of the keys and of the
    # values
    assert sorted(node.attributes["perm"].as_ints()[2] for node in model.graph if node.op_type == "Transpose") == [1, 3]


def test_a_transpose_that_no_reshape_follows_stays():
    text = ATTENTION.replace("SCORES", "scores = MatMul (qh, kh)").replace("BETWEEN", "ob = Neg (ot)")
    model, _ = pruned(text)
    assert [node.op_type for node in model.graph].count("Transpose") == 3  # of keys, of values, and this one


def test_heads_that_are_split_and_merged_without_a_transpose():
    model, count = pruned(
        "h = MatMul (x, w) r = Reshape (h, split) s = Neg (r) m = Reshape (s, merge) y = Gather <axis = 1> (m, two)"
    )
    assert count == 4 and tokens_of(model, "MatMul") == tokens_of(model, "Neg") == [1]


@pytest.mark.parametrize(
    ("body", "outputs"),
    [
        ("h = MatMul (x, w) y = Gather <axis = 2> (h, zero)", "float[n, 4] y"),  # a channel
        ("h = MatMul (x, w) y = Gather <axis = 0> (h, zero)", "float[4, 8] y"),  # an image
        ("h = MatMul (x, w) y = Gather <axis = 1> (h, vector)", "float[n, 1, 8] y"),  # keeps the axis
        # one as it is
        ("h = ReduceMean <keepdims = 1> (x, vector_one) r = Relu (h) y = Gather <axis = 1> (r, zero)", "float[n, 8] y"),
        ("h = ReduceMean <keepdims = 0> (x, vector_one) y = Relu (h)", "float[n, 8] y"),  # no choice at all
        ("h = Softmax <axis = 1> (x) y = Gather <axis = 1> (h, zero)", "float[n, 8] y"),  # over the tokens
        ("h = Softmax <axis = 1> (x) y = Gather <axis = 1> (h, two)", "float[n, 8] y"),
        ("h = LayerNormalization <axis = 1> (x, all, all) y = Gather <axis = 1> (h, zero)", "float[n, 8] y"),
        ("h = Add (x, table) y = Gather <axis = 1> (h, two)", "float[n, 8] y"),  # a row for each token
        (
            "m = ReduceMean <keepdims = 1> (x, vector_one) h = Sub (x, m) y = Gather <axis = 1> (h, two)",
            "float[n, 8] y",
        ),
        ("y = Gather <axis = 1> (x, zero)", "float[n, 8] y"),  # nothing before it
    ],
)
def test_what_is_left_alone(body, outputs):
    model = graph(text(body, outputs))
    before = [node.op_type for node in model.graph]
    assert prune_tokens(model) == 0
    assert [node.op_type for node in model.graph] == before


def test_what_others_read_is_computed_for_all_tokens():
    """A tap, a second output and a reader that mixes tokens each need the whole tensor."""
    model, count = pruned(
        "h = MatMul (x, w) s = Add (h, b) y = Gather <axis = 1> (s, zero)", "float[n, 8] y, float[n, 4, 8] h"
    )
    assert count == 1 and tokens_of(model, "MatMul") == [4] and tokens_of(model, "Add") == [1]
    body = "h = MatMul (x, w) t = Transpose <perm = [0, 2, 1]> (h) s = Add (h, b) y = Gather <axis = 1> (s, zero)"
    model, count = pruned(body, "float[n, 8] y, float[n, 8, 4] t")
    assert count == 1 and tokens_of(model, "MatMul") == [4]


def test_what_is_broadcast_along_the_tokens_is_no_operand_by_token():
    model, count = pruned("h = MatMul (x, w) s = Add (h, first) r = Relu (s) y = Gather <axis = 1> (r, two)")
    assert count == 3 and tokens_of(model, "MatMul") == [1]  # a constant with one row for all tokens, or none
    for mean in ("ReduceMean <keepdims = 0> (h, vector_one)", "ReduceMean <keepdims = 1> (h, vector_one)"):
        body = f"h = MatMul (x, w) g = {mean} u = Relu (h) s = Add (u, g) r = Relu (s) y = Gather <axis = 1> (r, two)"
        if "0" in mean:
            body = body.replace("(h, vector_one)", "(h, vectors)")
        model, count = pruned(body)
        assert count == 1 and tokens_of(model, "MatMul") == [4]


@pytest.mark.parametrize("axes", ["last", "negative"])
def test_a_mean_of_each_token(axes):
    body = f"m = ReduceMean <keepdims = 1> (x, {axes}) d = Sub (x, m) y = Gather <axis = 1> (d, two)"
    model, count = pruned(body)
    assert count == 2 and tokens_of(model, "ReduceMean") == [1]


def test_mixing_tokens_ends_the_way():
    turned = "t = Transpose <perm = [0, 2, 1]> (x) h = MatMul (t, f) u = Transpose <perm = [0, 2, 1]> (h)"
    model, count = pruned(f"{turned} s = Relu (u) y = Gather <axis = 1> (s, two)")
    assert count == 2
    assert [node.outputs[0].shape[2] for node in model.graph if node.op_type == "MatMul"] == [4]


# --- which token ----------------------------------------------------------------------------------------------------

POOLS = "h = MatMul (x, w) s = Add (h, b) y = Gather <axis = 1> (s, {index})"


@pytest.mark.parametrize(("index", "place"), [("zero", 0), ("two", 2), ("last_but_one", 2), ("end", 3)])
@pytest.mark.parametrize("asked", ["from the beginning", "from the end", "any"])
def test_any_token_may_be_pooled(index, place, asked):
    """Text towers pool their last token; the index counts from either end, in the graph and in what is asked for."""
    body = text(POOLS.format(index=index)).replace(
        "int64 zero", "int64 last_but_one = {-2}, int64 end = {-1}, int64 zero"
    )
    model = graph(body)
    feeds = random_feeds(model)
    (before,) = run(model, feeds)
    token = {"from the beginning": place, "from the end": place - 4, "any": None}[asked]
    assert pooled_token(model, token) == place
    assert prune_tokens(model, token) == 2 and tokens_of(model, "MatMul") == [1]
    (got,) = run(model, feeds)
    assert np.abs(got - before).max() <= 1e-5 * np.abs(before).max()  # float32 sums of eight, in another order


def test_another_token_than_the_models_is_no_pool():
    model = graph(text(POOLS.format(index="two")))
    assert pooled_token(model, 0) is None and prune_tokens(model, 0) == 0
    assert tokens_of(model, "MatMul") == [4]


@pytest.mark.parametrize(
    ("opset", "node", "along"),
    [
        (17, "ReduceMean <axes = [-1]> (x)", True),
        (17, "ReduceMean <axes = [2]> (x)", True),
        (17, "ReduceMean <axes = [1]> (x)", False),
        (17, "ReduceMean <axes = [1, 2]> (x)", False),
        (17, "ReduceMean (x)", False),  # over everything
        (20, "ReduceMean (x, last)", True),
        (20, "ReduceMean (x, two)", True),
        (20, "ReduceMean (x, one)", False),
        (20, "ReduceMean (x, both)", False),
        (20, "ReduceMean (x, given)", False),  # nobody knows
        (20, "ReduceMean (x)", False),
        (20, "LayerNormalization (x, scale)", True),
        (20, "LayerNormalization <axis = -1> (x, scale)", True),
        (20, "LayerNormalization <axis = 2> (x, scale)", True),
        (20, "LayerNormalization <axis = 1> (x, scale)", False),
        (20, "Softmax (x)", True),
        (20, "Softmax <axis = 1> (x)", False),
    ],
)
def test_what_is_of_each_token_by_itself(opset, node, along):
    model = graph(
        f"""g (float[n, 4, 8] x, int64[1] given, float[8] scale) => (float[n, a, b] y)
        <int64[1] last = {{-1}}, int64[1] two = {{2}}, int64[1] one = {{1}}, int64[2] both = {{1, 2}}> {{
        y = {node} }}""",
        opset,
    )
    assert _along_last(model.graph[0]) is along


# --- a token of its own for each row ----------------------------------------------------------------------------------

ROWS = np.array([[2], [0], [3]])
CHOSEN = "at = Equal (places, place) f1 = Cast <to = 1> (at) chosen = Reshape (f1, row)"
OF_ROWS = "float[n, 4, 8] x, int64[n, 1] place", "int64[1, 4] places = {0, 1, 2, 3}, int64[3] row = {0, 1, 4},"
CAUSAL = "float[1, 1, 4, 4] mask = {0, -99, -99, -99, 0, 0, -99, -99, 0, 0, 0, -99, 0, 0, 0, 0},"


def by_row(body: str, outputs: str = "float[n, 1, 8] y") -> tuple[ir.Model, int]:
    """Prunes a graph that takes each row's token by a product, and holds the result against the graph before it."""
    inputs, constants = OF_ROWS
    whole = text(body, outputs).replace("float[n, 4, 8] x", inputs).replace("<\n", f"<{constants}{CAUSAL}\n", 1)
    model = graph(whole)
    feeds = {"x": np.random.default_rng(0).normal(size=(3, 4, 8)).astype(np.float32), "place": ROWS}
    before = run(model, feeds)
    count = prune_tokens(model, "the end")
    check_shapes(model)
    for expected, got in zip(before, run(model, feeds), strict=True):
        assert got.shape == expected.shape
        assert np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max()  # float32 sums of eight, in another order
    return model, count


@pytest.mark.parametrize("scores", ["scores = MatMul (qh, kh)", "a = MatMul (qh, kh) scores = Add (a, mask)"])
def test_each_row_keeps_its_own_token(scores):
    """What is chosen is computed behind the blocks, as a model does that pools at its end."""
    end = f"{CHOSEN} z0 = Relu (z) p0 = MatMul (chosen, z0) y = Neg (p0)"
    body = ATTENTION.replace("SCORES", scores).replace("BETWEEN", "").replace("ob", "ot")
    model, count = by_row(body.replace("y = Gather <axis = 1> (z, two)", end))
    projections = [node for node in model.graph if node.op_type == "MatMul" and node.inputs[1].name in {*"wkv"}]
    assert sorted(node.outputs[0].shape[1] for node in projections) == [1, 1, 4, 4]
    assert all(node.outputs[0].shape[2] == 1 for node in model.graph if node.op_type == "Softmax")
    assert tokens_of(model, "Relu") == [1] and count >= 10
    seen = set(model.graph.inputs) | set(model.graph.initializers.values())
    for node in model.graph:  # the order is one in which it can be computed
        assert {value for value in node.inputs if value is not None and value.producer()} <= seen
        seen |= set(node.outputs)


@pytest.mark.parametrize(
    ("body", "outputs"),
    [
        # a mean by weights that come from the stream itself is no choice that could be made before
        (
            "h = MatMul (x, w) s = Relu (h) g = ReduceMean <keepdims = 0> (s, last) c = Reshape (g, row) "
            "y0 = MatMul (c, s) y = Neg (y0)",
            "float[n, 1, 8] y",
        ),
        (f"{CHOSEN} h = MatMul (x, w) y = MatMul (chosen, h)", "float[n, 1, 8] y"),  # the pool is the output
        (f"{CHOSEN} y0 = MatMul (chosen, x) y = Neg (y0)", "float[n, 1, 8] y"),  # nothing before it
        # rows of heads that no product takes
        (
            f"{CHOSEN} r = Reshape (x, split) s = Neg (r) h = Reshape (s, merge) y0 = MatMul (chosen, h) y = Neg (y0)",
            "float[n, 1, 8] y, float[n, 4, 2, 4] r",
        ),
        ("h = MatMul (x, w) y = Gather <axis = 1> (h, two)", "float[n, 8] y"),  # the same of each row
    ],
)
def test_what_is_left_alone_where_rows_differ(body, outputs):
    model, count = by_row(body, outputs)
    assert count == 0 and pooled_token(model, "the end") in ("the end", None)


def test_a_product_is_a_choice_only_where_the_model_says_so():
    model, count = by_row(f"{CHOSEN} h = MatMul (x, w) y0 = MatMul (chosen, h) y = Neg (y0)")
    assert count == 1 and tokens_of(model, "MatMul") == [1, 1]
    for token in (None, 0, 2):
        inputs, constants = OF_ROWS
        whole = text(f"{CHOSEN} h = MatMul (x, w) y = MatMul (chosen, h)", "float[n, 1, 8] y")
        model = graph(whole.replace("float[n, 4, 8] x", inputs).replace("<\n", f"<{constants}\n", 1))
        assert pooled_token(model, token) is None and prune_tokens(model, token) == 0
