"""LayerNorm in every spelling that JAX code traces to."""

import numpy as np
import onnx_ir as ir
import pytest
from export_graphs import declined, graph, ops, random_feeds, rewrite, run

from vit_convert.export.rules import layernorm
from vit_convert.export.rules.rule import apply_rule

WEIGHTS = (
    "float[4] scale = {1, 2, 3, 4}, float[4] bias = {0.1, 0.2, 0.3, 0.4}, float[4] ones = {1, 1, 1, 1}, float[4] "
    "zeros = {0, 0, 0, 0}"
)
CONSTANTS = (
    "float eps = {1e-6}, float zero = {0}, float one = {1}, float four = {4}, int64[1] last = {2}, int64[3] kept "
    "= {0, 3, 1}"
)


def text(body: str, output: str = "float[n, 3, 4] y") -> str:
    return f"g (float[n, 3, 4] x) => ({output}) <{WEIGHTS}, {CONSTANTS}> {{ {body} }}"


def mean(value: str, opset: int, axis: int = 2, keepdims: int = 1) -> str:
    """ReduceMean in the form of its opset: axes are an attribute before 18 and an input from then on."""
    if opset < 18:
        return f"ReduceMean <axes = [{axis}], keepdims = {keepdims}> ({value})"
    return f"ReduceMean <keepdims = {keepdims}> ({value}, last)"


def fast_variance(opset: int, floor: str = "Max (raw, zero)") -> str:
    return f"""
        m = {mean("x", opset)} square = Mul (x, x) second = {mean("square", opset)} mm = Mul (m, m)
        raw = Sub (second, mm)
        v = {floor} shifted = Add (v, eps) deviation = Sub (x, m) root = Sqrt (shifted) y = Div (deviation, root)"""


def two_pass(opset: int, result: str = "y = Div (d, root)") -> str:
    return f"""
        m = {mean("x", opset)} d = Sub (x, m) dd = Mul (d, d) v = {mean("dd", opset)}
        shifted = Add (v, eps) root = Sqrt (shifted) {result}"""


@pytest.mark.parametrize("opset", [17, 20])
@pytest.mark.parametrize("floor", ["Max (raw, zero)", "Max (zero, raw)"])
def test_fast_variance(opset, floor):
    # E[x²] − E[x]² loses digits to cancellation, which is why it is replaced: the comparison allows it 1e-5.
    model, count = rewrite(text(fast_variance(opset, floor)), layernorm.FastVarianceLayerNorm(), opset, tolerance=1e-5)
    assert count.applied == 1
    assert ops(model) == ["LayerNormalization"]
    assert model.graph[0].attributes["epsilon"].as_float() == pytest.approx(1e-6)


@pytest.mark.parametrize("opset", [17, 20])
def test_two_pass(opset):
    model, count = rewrite(text(two_pass(opset)), layernorm.TwoPassLayerNorm(), opset)
    assert count.applied == 1
    assert ops(model) == ["LayerNormalization"]


@pytest.mark.parametrize("opset", [17, 20])
@pytest.mark.parametrize(
    ("rule", "spelt"), [("FastVarianceLayerNorm", 0), ("TwoPassLayerNorm", 1), ("GuardedLayerNorm", 2)]
)
def test_epsilon_and_the_spelling_of_the_last_axis(opset, rule, spelt):
    """An epsilon that shows, and the last axis counted from the end; a mean keeps its axis where nothing is said."""
    body = (fast_variance, two_pass, guarded)[spelt](opset).replace("[2]", "[-1]").replace(", keepdims = 1", "")
    graph_text = (
        text(body)
        .replace("eps = {1e-6}", "eps = {0.1}")
        .replace("last = {2}", "last = {-1}")
        .replace("<keepdims = 1>", "")
    )
    model, count = rewrite(graph_text, getattr(layernorm, rule)(), opset, tolerance=1e-5)
    assert count.applied == 1
    assert model.graph[0].attributes["epsilon"].as_float() == pytest.approx(0.1)


def test_a_mean_that_drops_its_axis_is_declined():
    """On a square, where the means of the rows are subtracted from the columns."""
    body = two_pass(17).replace("keepdims = 1> (x)", "keepdims = 0> (x)")
    assert declined(text(body).replace("n, 3, 4", "4, 4").replace("[2]", "[1]"), layernorm.TwoPassLayerNorm(), 17) == (
        "the mean does not keep its axis"
    )


def test_a_width_that_is_not_known_is_declined():
    assert (
        declined(text(two_pass(17)).replace("n, 3, 4", "n, 3, m"), layernorm.TwoPassLayerNorm(), 17)
        == "the last axis is dynamic"
    )


def test_mean_over_another_axis_is_declined():
    middle = two_pass(17).replace("[2]", "[1]")
    assert (
        declined(text(middle), layernorm.TwoPassLayerNorm(), 17) == "the mean is over axes [1], not the last one of 3"
    )


@pytest.mark.parametrize("which", [1, 2])
def test_either_mean_over_another_axis_is_declined(which):
    """The mean, and the mean of squares: [n, 1, 4] is subtracted or added as well as [n, 3, 1]."""
    parts = two_pass(17).split("[2]")
    body = parts[0] + ("[1]" if which == 1 else "[2]") + parts[1] + ("[1]" if which == 2 else "[2]") + parts[2]
    assert declined(text(body), layernorm.TwoPassLayerNorm(), 17) == "the mean is over axes [1], not the last one of 3"


def test_a_floor_that_is_not_zero_is_declined():
    assert "the zero is" in declined(text(fast_variance(20, "Max (raw, eps)")), layernorm.FastVarianceLayerNorm())


def test_epsilon_that_is_computed_is_declined():
    body = two_pass(20).replace("Add (v, eps)", "Add (v, m)")
    assert declined(text(body), layernorm.TwoPassLayerNorm()) == "epsilon is not a constant"


def test_root_mean_square_norm_does_not_match():
    body = (
        f"square = Mul (x, x) v = {mean('square', 20)} shifted = Add (v, eps) root = Sqrt (shifted) y = Div (x, root)"
    )
    assert declined(text(body), layernorm.TwoPassLayerNorm()) == ""


def guarded(opset: int) -> str:
    axes, last = ("<axes = [2], keepdims = 1>", "") if opset < 18 else ("<keepdims = 1>", ", last")
    return f"""
        m = ReduceMean {axes} (x{last}) d = Sub (x, m) low = ReduceMin {axes} (x{last}) high = ReduceMax {axes}
        (x{last})
        constant = Equal (low, high) delta = Sub (m, m) finite = Equal (delta, zero) both = And (constant, finite)
        stable = Where (both, zero, d) square = Mul (stable, stable) wide = Cast <to = 11> (square)
        wide_mean = ReduceMean {axes} (wide{last}) v = Cast <to = 1> (wide_mean)
        shifted = Add (v, eps) root = Sqrt (shifted) y = Div (stable, root)"""


@pytest.mark.parametrize("opset", [17, 20])
def test_guarded(opset):
    model, count = rewrite(text(guarded(opset)), layernorm.GuardedLayerNorm(), opset)
    assert count.applied == 1
    assert ops(model) == ["LayerNormalization"]


def test_guard_that_yields_something_else_is_declined():
    body = guarded(20).replace("Where (both, zero, d)", "Where (both, one, d)")
    assert "the guard is 1.0" in declined(text(body), layernorm.GuardedLayerNorm())


@pytest.mark.parametrize("opset", [17, 20])
@pytest.mark.parametrize("total", ["ReduceSum", "ReduceSumSquare"])
@pytest.mark.parametrize("order", ["Reshape, Div", "Div, Reshape"])
def test_mean_of_sum(opset, total, order):
    reduction = (
        "<axes = [2], keepdims = 0> (x)" if total == "ReduceSumSquare" and opset < 18 else "<keepdims = 0> (x, last)"
    )
    tail = (
        "r = Reshape (s, kept) y = Div (r, four)"
        if order == "Reshape, Div"
        else "r = Div (s, four) y = Reshape (r, kept)"
    )
    model, count = rewrite(text(f"s = {total} {reduction} {tail}", "float[n, 3, 1] y"), layernorm.MeanOfSum(), opset)
    assert count.applied == 1
    assert ops(model) == (["Mul", "ReduceMean"] if total == "ReduceSumSquare" else ["ReduceMean"])


@pytest.mark.parametrize("opset", [17, 20])
@pytest.mark.parametrize(("axis", "kept", "divisor"), [(-1, "n, 3, 1", 4), (1, "n, 1, 4", 3), (-2, "n, 1, 4", 3)])
def test_mean_of_sum_over_any_axis(opset, axis, kept, divisor):
    """By a scalar of any rank."""
    body = "s = ReduceSum <keepdims = 0> (x, last) r = Reshape (s, kept) y = Div (r, count)"
    constants = (
        f"float[1] count = {{{divisor}}}, int64[3] kept = {{{kept.replace('n', '0')}}}, int64[1] last = {{{axis}}}"
    )
    graph_text = text(body, f"float[{kept}] y").replace(CONSTANTS, constants)
    if axis != -1:  # what remains of the sum is [n, 4], whose second axis a 0 would copy
        graph_text = graph_text.replace("{0, 1, 4}", "{-1, 1, 4}")
    model, count = rewrite(graph_text, layernorm.MeanOfSum(), opset)
    assert count.applied == 1
    assert ops(model) == ["ReduceMean"]


@pytest.mark.parametrize(
    ("x", "axes", "kept", "reason"),
    [
        ("n, 3, 4", "1, 2", "n, 1, 1", "the sum is over axes [1, 2], not a constant one"),
        ("n, 3, 4", "", "n, 3, 1", "the sum is over axes None, not a constant one"),
        ("n, 3, 4", "0", "1, 3, 4", "the summed axis is dynamic"),
    ],
)
def test_other_sums_are_declined(x, axes, kept, reason):
    body = "s = ReduceSum <keepdims = 0> (x, last) r = Reshape (s, kept) y = Div (r, four)"
    graph_text = text(body, f"float[{kept}] y").replace("{0, 3, 1}", f"{{{kept.replace('n', '-1')}}}")
    count = axes.count(",") + 1
    if axes:
        graph_text = graph_text.replace("int64[1] last = {2}", f"int64[{count}] last = {{{axes}}}")
    else:  # said at run time
        graph_text = graph_text.replace("int64[1] last = {2}, ", "").replace("x) =>", "x, int64[1] last) =>")
    assert declined(graph_text, layernorm.MeanOfSum()) == reason


def test_sum_divided_by_another_number_is_declined():
    body = "s = ReduceSum <keepdims = 0> (x, last) r = Reshape (s, kept) y = Div (r, one)"
    assert declined(text(body, "float[n, 3, 1] y"), layernorm.MeanOfSum()) == "the divisor is 1.0, not 4"


def test_mean_that_keeps_another_axis_is_declined():
    body = "s = ReduceSum <keepdims = 0> (x, last) r = Reshape (s, other) y = Div (r, four)"
    graph_text = text(body, "float[n, 1, 3] y").replace("int64[3] kept = {0, 3, 1}", "int64[3] other = {0, 1, 3}")
    assert declined(graph_text, layernorm.MeanOfSum()) == "the mean has shape ('n', '1', '3'), not ('n', '3', '1')"


@pytest.mark.parametrize("opset", [17, 20])
@pytest.mark.parametrize(
    ("result", "left"),
    [
        ("inverse = Div (one, root) y = Mul (d, inverse)", ["Div"]),
        ("inverse = Div (one, root) y = Mul (inverse, d)", ["Div"]),
        ("inverse = Div (one, root) factor = Mul (inverse, scale) y = Mul (d, factor)", ["Div", "Mul"]),
        ("inverse = Div (one, root) factor = Mul (scale, inverse) y = Mul (factor, d)", ["Div", "Mul"]),
    ],
)
def test_reciprocal_root(opset, result, left):
    model, count = rewrite(text(two_pass(opset, result)), layernorm.DivideByRoot(), opset)
    assert count.applied == 1
    assert ops(model)[-len(left) :] == left
    assert "Div" not in ops(model)[: -len(left)]


def test_reciprocal_of_two_does_not_match():
    body = two_pass(20, "inverse = Div (four, root) y = Mul (d, inverse)")
    assert declined(text(body), layernorm.DivideByRoot()) == ""


NORM = "n = LayerNormalization <axis = -1, epsilon = 1e-6, stash_type = 1>"


@pytest.mark.parametrize("product", ["Mul (n, scale)", "Mul (scale, n)"])
def test_scale_is_taken_in(product):
    model, count = rewrite(text(f"{NORM} (x, ones, zeros) y = {product}"), layernorm.LayerNormScale())
    assert count.applied == 1
    assert ops(model) == ["LayerNormalization"]
    assert model.graph[0].inputs[1].name == "scale"


@pytest.mark.parametrize("total", ["Add (n, bias)", "Add (bias, n)"])
def test_bias_is_taken_in(total):
    model, count = rewrite(text(f"{NORM} (x, scale, zeros) y = {total}"), layernorm.LayerNormBias())
    assert count.applied == 1
    assert ops(model) == ["LayerNormalization"]
    assert model.graph[0].inputs[2].name == "bias"


@pytest.mark.parametrize(
    ("rule", "args", "last"), [("LayerNormScale", "ones, zeros", "Mul"), ("LayerNormBias", "scale, zeros", "Add")]
)
def test_what_takes_in_a_scale_or_a_bias_keeps_epsilon(rule, args, last):
    norm = NORM.replace("1e-6", "0.1")
    model, count = rewrite(text(f"{norm} (x, {args}) y = {last} (n, bias)"), getattr(layernorm, rule)())
    assert count.applied == 1
    assert model.graph[0].attributes["epsilon"].as_float() == pytest.approx(0.1)


def test_a_bias_before_the_scale_is_declined():
    """(x + b) · s is not x · s + b; and a second bias would replace the first."""
    for given, last, rule in (
        ("ones, bias", "Mul (n, scale)", layernorm.LayerNormScale()),
        ("scale, bias", "Add (n, ones)", layernorm.LayerNormBias()),
    ):
        assert declined(text(f"{NORM} (x, {given}) y = {last}"), rule) == "the bias so far is not 0 everywhere"


LEADING = (
    "<float[1, 1, 4] wide = {1, 2, 3, 4}, float[3, 4] tall = {1,2,3,4, 1,2,3,4, 1,2,3,4}, float[1, 4, 1] turned "
    "= {1, 2, 3, 4}>"
)


@pytest.mark.parametrize("before", [17, 20])
def test_scale_and_bias_with_leading_axes_of_one(before):
    """As a broadcast leaves them, in a vision transformer that is written with [1, 1, width] parameters."""
    weights = f"<{WEIGHTS}, {LEADING[1:]}"
    for rule, args, last in [
        (layernorm.LayerNormScale(), "ones, zeros", "Mul"),
        (layernorm.LayerNormBias(), "scale, zeros", "Add"),
    ]:
        body = f"g (float[n, 3, 4] x) => (float[n, 3, 4] y) {weights} {{ {NORM} (x, {args}) y = {last} (n, wide) }}"
        model, count = rewrite(body, rule, before)
        assert count.applied == 1 and ops(model)[-1] == "LayerNormalization"
        assert "has shape ('3', '4'), not ('4',)" in declined(body.replace("(n, wide)", "(n, tall)"), rule, before)
    square = body.replace("float[n, 3, 4]", "float[n, 4, 4]").replace("(n, wide)", "(n, turned)")
    assert "has shape ('1', '4', '1'), not ('4',)" in declined(square, layernorm.LayerNormBias(), before)


@pytest.mark.parametrize(
    ("rule", "last", "place"), [(layernorm.LayerNormScale(), "Mul", 1), (layernorm.LayerNormBias(), "Add", 2)]
)
def test_scale_and_bias_that_are_constants_and_no_initializers(rule, last, place):
    """As an earlier rule leaves them: the value of a Constant node."""
    model = graph(text(f"{NORM} (x, {'ones' if last == 'Mul' else 'scale'}, zeros) y = {last} (n, bias)"))
    old = model.graph.initializers["bias"]
    node = ir.node("Constant", [], {"value": old.const_value})
    made = node.outputs[0]
    made.const_value, made.shape, made.dtype = old.const_value, old.shape, old.dtype
    model.graph.insert_before(model.graph[0], node)
    ir.convenience.replace_all_uses_with(old, made)
    assert apply_rule(rule, model).applied == 1
    norm = next(node for node in model.graph if node.op_type == "LayerNormalization")
    assert norm.inputs[place].const_value.numpy().tolist() == pytest.approx([0.1, 0.2, 0.3, 0.4])


def test_a_second_scale_is_declined():
    assert (
        declined(text(f"{NORM} (x, scale, zeros) y = Mul (n, bias)"), layernorm.LayerNormScale())
        == "the scale so far is not 1 everywhere"
    )


def test_scale_of_another_length_is_declined():
    assert (
        declined(text(f"{NORM} (x, ones, zeros) y = Mul (n, one)"), layernorm.LayerNormScale())
        == "the scale has shape (), not ('4',)"
    )


def test_residual_is_not_taken_for_a_bias():
    assert (
        declined(text(f"{NORM} (x, scale, zeros) y = Add (n, x)"), layernorm.LayerNormBias())
        == "the bias is not a weight"
    )


@pytest.mark.parametrize(
    ("attributes", "epsilon"),
    [
        ("<axis = -1, epsilon = 1e-6>", 1e-6),
        ("<axis = 2, epsilon = 1e-6>", 1e-6),
        ("<epsilon = 0.1>", 0.1),
        ("", 1e-5),  # what ONNX means by saying nothing
    ],
)
def test_primitives(attributes, epsilon):
    model, count = rewrite(
        text(f"y = LayerNormalization {attributes} (x, scale, bias)"), layernorm.LayerNormToPrimitives(), 17
    )
    assert count.applied == 1
    assert ops(model) == ["ReduceMean", "Sub", "Mul", "ReduceMean", "Add", "Sqrt", "Div", "Mul", "Add"]
    assert model.graph[4].inputs[1].const_value.numpy() == pytest.approx(epsilon)


@pytest.mark.parametrize("opset", [18, 20])
def test_primitives_only_before_opset_18(opset):
    body = "y = LayerNormalization <axis = -1, epsilon = 1e-6> (x, scale, bias)"
    assert "from opset 18 on" in declined(text(body), layernorm.LayerNormToPrimitives(), opset)


def test_primitives_only_for_the_last_axis():
    body = """g (float[n, 3, 4] x) => (float[n, 3, 4] y) <float[3, 4] s = {1,1,1,1,1,1,1,1,1,1,1,1}> {
        y = LayerNormalization <axis = 1, epsilon = 1e-6> (x, s, s) }"""
    assert "it normalises axis 1" in declined(body, layernorm.LayerNormToPrimitives(), 17)


def test_large_mean_survives():
    """What the fast variance cannot do: with a mean of 4096, E[x²] − E[x]² has lost the variance of 1 to float32
    rounding."""
    model = graph(text(fast_variance(20)))
    feeds = {"x": random_feeds(model)["x"] + 4096}
    exact = feeds["x"].astype(np.float64)
    exact = (exact - exact.mean(-1, keepdims=True)) / np.sqrt(exact.var(-1, keepdims=True) + 1e-6)
    before = np.abs(run(model, feeds)[0] - exact).max()
    apply_rule(layernorm.FastVarianceLayerNorm(), model)
    assert before > 0.1
    assert np.abs(run(model, feeds)[0] - exact).max() < 2e-3  # x itself is rounded to 4096 · 2^-24 = 2.4e-4
