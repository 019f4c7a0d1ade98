"""Each rule of inspection from both of its sides and at its bounds, on graphs of one or a few nodes."""

import itertools

import pytest
from graphs_by_hand import graph, node

from vit_convert.engine.inspection.command import precision_of
from vit_convert.engine.inspection.dla import dla_refusals
from vit_convert.engine.inspection.findings import CHANGED, REFUSED, UNKNOWN, findings
from vit_convert.engine.inspection.fusions import fusions
from vit_convert.engine.inspection.onnx_wire import Graph, Node, Value

F16, F32 = "float16", "float32"


def told(found, target):
    return [(row.what, row.where, row.why) for row in findings(found, target)]


@pytest.mark.parametrize(
    ("target", "opset", "what"),
    [
        ("trt8", 8, REFUSED), ("trt8", 9, None), ("trt8", 17, None), ("trt8", 18, REFUSED),
        ("trt10", 20, None), ("trt10", 21, UNKNOWN), ("trt10", 24, UNKNOWN), ("trt10", 25, UNKNOWN),
        ("trt11", 21, None), ("trt11", 24, None), ("rtx", 26, None), ("rtx", 27, UNKNOWN), ("rtx", 8, UNKNOWN),
    ],
)  # fmt: skip
def test_opsets(target, opset, what):
    rows = findings(graph(node("Relu"), opset=opset), target)
    assert [row.what for row in rows] == ([what] if what else [])
    assert all(row.where == "graph" and row.op == "" and str(opset) in row.why and row.fix for row in rows)


def test_a_graph_without_onnxs_own_operators_has_no_opset_that_is_read():
    found = Graph({"mine": 3}, [node("A", domain="mine")], (), (), {}, frozenset(), {}, frozenset(), {})
    assert (REFUSED, "graph", "opset 0, it reads 9 to 17") in told(found, "trt8")


def test_ends_of_the_graph():
    ends = {"inputs": ["x", "u"], "outputs": ["y"]}
    found = graph(node("Relu"), x="int64", y="int64", u=Value(F32, None), **ends)
    assert told(found, "trt8") == [
        (REFUSED, "x", "input of int64, which it does not have"),
        (UNKNOWN, "u", "input without a shape in the file"),
        (REFUSED, "y", "output of int64, which it does not have"),
    ]
    assert [row.fix for row in findings(found, "trt8")][0::2] == [
        f"Make it int32 in the graph: it is an {word} of the engine." for word in ("input", "output")
    ]
    assert told(found, "trt10") == [(UNKNOWN, "u", "input without a shape in the file")]
    assert told(graph(node("Relu"), x="int64", y="int64"), "trt8") == []  # within the graph it becomes int32


@pytest.mark.parametrize("domain", ["tensorrt.plugin", "vit_convert"])
@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("trt8", []),
        ("trt10", [(UNKNOWN, "y", "a plugin that is made for TensorRT 8.6")]),
        ("trt11", [(UNKNOWN, "y", "a plugin that is made for TensorRT 8.6")]),
        ("rtx", [(REFUSED, "y", "a plugin, for which it has no library")]),
    ],
)
def test_plugins_of_both_domains(domain, target, expected):
    plugin = node("Thing", domain=domain)
    assert told(graph(plugin), target) == expected
    # what onnxruntime runs in its place is no function that the parser goes into
    assert told(graph(plugin, functions=[(domain, "Thing")]), target) == expected
    assert all(target in row.fix or "without one" in row.fix for row in findings(graph(plugin), target))


def test_domains_of_others():
    other = node("Thing", domain="mine", name="n")
    assert told(graph(other), "trt11") == [(UNKNOWN, "n", "domain 'mine': needs a plugin")]
    assert told(graph(other, functions=[("mine", "Thing")]), "trt11") == []
    assert len(told(graph(other, functions=[("mine", "Other")]), "trt11")) == 1
    assert told(graph(node("Relu", domain="mine")), "trt11") == [(UNKNOWN, "y", "domain 'mine': needs a plugin")]


def test_operators_have_their_own_fix_or_a_common_one():
    fixes = {op: [row.fix for row in findings(graph(node(op)), "trt8")] for op in ("Gelu", "BitwiseAnd", "Unique")}
    assert "Erf" in fixes["Gelu"][0] and len(fixes["Gelu"]) == 1
    assert fixes["BitwiseAnd"] == fixes["Unique"] == [
        "Write it with operators that it reads, or leave it outside the engine."
    ]  # fmt: skip
    assert [row.op for row in findings(graph(node("Unique")), "rtx")] == ["Unique"]
    assert told(graph(node("Unheard", name="n")), "rtx") == [(UNKNOWN, "n", "Unheard is in no list of ours")]


@pytest.mark.parametrize(
    ("dtype", "fix"),
    [
        ("bfloat16", "Use fp16, or TensorRT 10 or later."),
        ("float8_e4m3fn", "Use int8 or fp16, or TensorRT 10 or later."),
        ("int4", "Use int8 or fp16, or TensorRT 10 or later."),
        ("float4_e2m1", "Use int8 or fp16, or TensorRT 10 or later."),
        ("uint16", "Use another type."),
    ],
)
def test_types(dtype, fix):
    given = findings(graph(node("Relu", "x w", "y"), x=dtype, w=dtype, y=dtype, weights=["w"]), "trt8")
    assert [(row.what, row.why, row.fix) for row in given] == [
        (REFUSED, f"{name} is {dtype}, which trt8 does not have", fix)
        for name in ("w", "y")  # x is another node's
    ]
    assert (told(graph(node("Relu"), y=dtype), "rtx") == []) is (dtype != "uint16")


def test_doubles_become_floats():
    found = graph(node("Relu", "x", "y z", name="n"), x="float64", y="float64", z=F32)
    for target in ("trt8", "trt10", "trt11", "rtx"):
        assert told(found, target) == [(CHANGED, "n", "y is float64 and becomes float32")]


def quantized(zero="int8", scale=F32, inputs="x s z", value=b"\0", **more):
    nodes = node("QuantizeLinear", inputs, "q"), node("DequantizeLinear", inputs.replace("x", "q"), "y")
    return graph(*nodes, x=F32, s=scale, z=zero, q=zero, y=F32, constants={"z": value}, **more)


ZERO = "a zero point that is not 0"
UINT8 = "uint8: it quantizes to signed types, symmetrically"


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (quantized(), {"trt8": [], "trt10": []}),
        (quantized(value=b"\0\0\1"), {"trt8": [(REFUSED, ZERO)], "trt10": [(REFUSED, ZERO)]}),
        (quantized(value=b""), {"trt8": [], "trt10": []}),
        (quantized("uint8", value=b"\x80"), {"trt8": [(REFUSED, UINT8)], "trt10": [(CHANGED, UINT8)]}),
        (quantized(scale=F16), {"trt8": [(REFUSED, "scale of float16, 8.6 wants float32")], "trt10": []}),
        (quantized(scale=""), {"trt8": [], "trt10": []}),
        (quantized(inputs="x s"), {"trt8": [(REFUSED, "no zero point, which 8.6 wants")], "trt10": []}),
        (quantized("int16"), {"trt8": [(REFUSED, "int16: it quantizes to int8")]}),
        (quantized(""), {"trt8": [], "rtx": []}),
        (
            quantized(weights=["q"]),
            {"trt8": [(REFUSED, "weights stored in int8, which 8.6 does not read")], "trt10": []},
        ),
        (quantized(weights=["x"]), {"trt8": [], "trt10": []}),
    ],
)
def test_quantization_on_both_sides(found, expected):
    """Each reason once at each of the two nodes, but for weights, which only one of them reads."""
    for target, rows in expected.items():
        got = [(what, why) for what, _, why in told(found, target) if "which trt8 does not have" not in why]
        assert set(got) == set(rows) and len(got) == (len(rows) if rows and "weights" in rows[0][1] else 2 * len(rows))


def test_layer_norms():
    norm = node("LayerNormalization", "x s b", "y")
    mixed = graph(norm, x=F16, s=F32, b=F16, y=F16)
    assert told(mixed, "rtx") == [(REFUSED, "y", "inputs of float16 and float32: it wants one type")]
    assert told(mixed, "trt11") == told(graph(norm, x=F16, s=F16), "rtx") == []  # of b the file says nothing
    more = graph(node("LayerNormalization", "x s b", "y mean"))
    assert told(more, "trt10") == [(REFUSED, "y", "more than its first output is used")]
    empty = Node("n", "LayerNormalization", "", ["x", "s", ""], ["y", "", ""], {})
    assert told(graph(empty, x=F16, s=F16), "rtx") == []


@pytest.mark.parametrize(
    ("target", "dtype", "expected"),
    [
        ("trt10", F16, [(UNKNOWN, "y", "Attention is read since 10.14")]),
        ("trt11", F32, []),
        ("rtx", F16, []),
        ("rtx", F32, [(REFUSED, "y", "Attention in float32, which TensorRT-RTX 1.7 does not build")]),
        ("trt8", F16, [(REFUSED, "y", "trt8 has no Attention")]),
    ],
)
def test_attention_as_an_operator(target, dtype, expected):
    found = graph(node("Attention", "q k v"), q=dtype)
    assert told(found, target) == expected
    assert [(row.kind, row.fused, row.where) for row in fusions(found, target)] == [("attention", True, "y")]


@pytest.mark.parametrize(("dtype", "opset", "count"), [("bfloat16", 21, 1), ("bfloat16", 22, 0), (F16, 21, 0)])
def test_convolutions_in_bfloat16(dtype, opset, count):
    rows = told(graph(node("Conv", "x w"), x=dtype, opset=opset), "trt11")
    assert rows == [(UNKNOWN, "y", "Conv in bfloat16 is defined from opset 22 on")] * count


@pytest.mark.parametrize("op", ["ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin"])
def test_axes_have_to_be_constants(op):
    computed = [(REFUSED, "y", "axes that are computed; they have to be constants")]
    assert told(graph(node(op, "x a")), "rtx") == computed
    assert told(graph(node(op, "x a"), weights=["a"]), "rtx") == []
    assert told(graph(node("Constant", "", "a"), node(op, "x a")), "rtx") == []
    assert told(graph(node("Relu", "b", "a"), node(op, "x a")), "rtx") == computed
    assert told(graph(node(op, "x")), "rtx") == told(graph(Node("", op, "", ["x", ""], ["y"], {})), "rtx") == []


@pytest.mark.parametrize(
    ("equation", "read"),
    [
        ("ab,bc->ac", True), ("ab, bc -> ac", True), ("ii->i", False), ("ab,bb->ab", False), ("...a,ab->...b", False),
        ("ab,cd", True), ("ab->aa", True), ("", True),
    ],
)  # fmt: skip
def test_einsums(equation, read):
    rows = told(graph(node("Einsum", "x z", equation=equation)), "trt10")
    assert rows == ([] if read else [(REFUSED, "y", f"{equation}: no ellipsis and no diagonal is read")])


# --- what fuses -------------------------------------------------------------------------------------------------------


def heads(shape=("n", 2, 9, 32), dtype=F16):
    return {name: Value(dtype, tuple(shape)) for name in ("q", "k", "v")}


def attention(*between, after="Softmax", **values):
    """Scores, what lies between, a softmax, and the product with the values."""
    names = ["r", *(f"b{i}" for i in range(len(between)))]
    chain = [node(op, f"{a} c", b) for op, a, b in zip(between, names, names[1:])]
    nodes = [node("MatMul", "q k", "r"), *chain, node(after, names[-1], "p"), node("MatMul", "p v", "y")]
    return graph(*nodes, **{**heads(), **values})


RECOGNISED = "MatMul, Softmax and MatMul in a form that is recognised"
WIDTH = "it wants 16 to 256, a multiple of 8"


@pytest.mark.parametrize(
    ("width", "fused"), [(8, False), (15, False), (16, True), (20, False), (24, True), (256, True), (264, False)]
)
def test_widths_of_heads(width, fused):
    (found,) = fusions(attention(**heads(("n", 2, 9, width))), "trt10")
    assert (found.kind, found.where, found.fused) == ("attention", "r", fused)
    assert found.why == (RECOGNISED if fused else f"heads of width {width}: {WIDTH}")


def test_a_width_that_varies_is_not_judged():
    assert [row.fused for row in fusions(attention(**heads(("n", 2, 9, "w"))), "trt10")] == [True]


def test_shapes_that_are_missing_or_of_other_ranks():
    (found,) = fusions(attention(v=Value(F16, None)), "trt10")
    assert (found.fused, found.why) == (False, "the file does not say its shapes")
    (found,) = fusions(attention(v=Value(F16, (9, 32))), "trt10")
    assert found.why.startswith("queries, keys and values of 4, 4, 2 axes: it wants [batch, heads, tokens, width")


@pytest.mark.parametrize("between", [("Mul",), ("Div",), ("Add", "Mul"), ("Cast", "Div", "Where")])
def test_scales_after_the_first_product(between):
    (found,) = fusions(attention(*between), "rtx")
    assert not found.fused
    assert found.why == "the scale stands after the first product: multiply the queries instead"


@pytest.mark.parametrize("between", [("Add",), ("Where",), ("Cast",), ("Identity",), ("Add", "Cast")])
def test_masks_and_casts_are_passed(between):
    assert [(row.fused, row.why) for row in fusions(attention(*between), "rtx")] == [(True, RECOGNISED)]


def test_the_mask_of_a_sum_may_stand_first():
    nodes = [node("MatMul", "q k", "r"), node("Add", "mask r", "s"), node("Softmax", "s", "p")]
    found = graph(*nodes, node("MatMul", "p v", "y"), **heads())
    assert [row.where for row in fusions(found, "rtx")] == ["r"]
    given = [node("Cast", "m", "mask"), *nodes]  # by another node
    assert [row.where for row in fusions(graph(*given, node("MatMul", "p v", "y"), **heads()), "rtx")] == ["r"]


@pytest.mark.parametrize(("steps", "found"), [(0, True), (3, True), (4, False)])
def test_scores_are_told_from_a_mask_by_a_product_a_few_steps_before(steps, found):
    """Of two sides that nodes give, the one behind which a product stands; four nodes are looked at."""
    names = ["r", *(f"c{i}" for i in range(steps))]
    casts = [node("Cast", a, b) for a, b in itertools.pairwise(names)]
    nodes = [node("Sin", "m", "mask"), node("MatMul", "q k", "r"), *casts, node("Add", f"mask {names[-1]}", "s")]
    nodes += [node("Softmax", "s", "p"), node("MatMul", "p v", "y")]
    assert len(fusions(graph(*nodes, **heads()), "rtx")) == found


@pytest.mark.parametrize("between", [("Relu",), ("Add", "Relu")])
def test_what_lies_between_may_make_it_something_else(between):
    assert fusions(attention(*between), "rtx") == []


def test_a_softmax_that_two_take_is_no_attention():
    found = attention()
    twice = Graph(**{**vars(found), "nodes": [*found.nodes, node("Relu", "p", "z")]})
    assert fusions(twice, "rtx") == []


def test_types_of_the_products():
    def why(half=False, **types):
        values = {name: Value(types.get(name, F16), ("n", 2, 9, 32)) for name in "qkv"}
        (found,) = fusions(attention(**values), "trt10", half=half)
        return found.why

    floats = "float32: the fused kernels are FP16, BF16, INT8 and FP8"
    every = dict.fromkeys("qkv", F32)
    assert why(**every) == floats and why(half=True, **every) == RECOGNISED
    assert why(**dict.fromkeys("qkv", "bfloat16")) == why(v="") == RECOGNISED  # of v the file does not say it
    assert why(v=F32) == "products of float16 and float32: both sides need one type"
    assert why(half=True, v=F32) == "products of float16 and float32: both sides need one type"
    assert why(**{**every, "v": ""}) == floats


def int8(tokens=9, width=32, pairs="qkvp"):
    shape = Value(F16, ("n", 2, tokens, width))
    nodes = [node("DequantizeLinear", f"{n}i", n) for n in "qkv" if n in pairs]
    nodes += [node("MatMul", "q k", "r"), node("Softmax", "r", "p0")]
    nodes += [node("QuantizeLinear", "p0", "p1"), node("DequantizeLinear", "p1", "p")] if "p" in pairs else []
    last = [] if "p" in pairs else [node("Identity", "p0", "p"), node("QuantizeLinear", "o", "oq")]
    return graph(*nodes, *last, node("MatMul", "p v", "y"), q=shape, k=shape, v=shape)


TOKENS = " tokens in INT8: at most 512, more are slower than FP16"


@pytest.mark.parametrize(
    ("found", "why"),
    [
        (int8(), RECOGNISED), (int8(512), RECOGNISED), (int8(513), f"513{TOKENS}"), (int8("t"), RECOGNISED),
        (int8(width=16), RECOGNISED), (int8(width=64), RECOGNISED),
        (int8(width=128), "heads of width 128 in INT8: it wants 16, 32, 64"),
        (int8(pairs="qkv"), "only some of queries, keys, values and scores are quantized: all or none"),
        (int8(pairs="qkp"), "only some of queries, keys, values and scores are quantized: all or none"),
        (int8(pairs="p"), "only some of queries, keys, values and scores are quantized: all or none"),
        (int8(pairs=""), RECOGNISED),  # the graph is quantized elsewhere
    ],
)  # fmt: skip
def test_attention_in_int8(found, why):
    assert [(row.fused, row.why) for row in fusions(found, "trt10")] == [(why == RECOGNISED, why)]
    (old,) = fusions(found, "trt8")
    assert not old.fused and old.why.startswith("TensorRT 8.6 fuses next to no attention of a graph with Q/DQ")


def test_kernels_of_plugins():
    ops = {"CustomQKVToContextPluginDynamic": "attention", "VitAttention": "attention", "VitNorm": "LayerNorm"}
    ops |= {"VitGroupNorm": "GroupNorm", "VitTwoGroupNorms": "GroupNorm"}
    for domain in ("tensorrt.plugin", "vit_convert"):
        found = fusions(graph(*(node(op, domain=domain) for op in ops)), "trt8")
        assert [(row.kind, row.fused, row.why) for row in found] == [(kind, True, "a plugin") for kind in ops.values()]


@pytest.mark.parametrize("op", ["Erf", "Tanh"])
def test_gelus_that_are_written_out(op):
    spelt = [node(op, "x", "a"), node("Add", "a one", "b"), node("Mul", "b x", "y")]
    assert [(row.kind, row.where, row.fused, row.why) for row in fusions(graph(*spelt), "trt8")] == [
        ("GELU", "a", True, f"written with {op}, which is recognised")
    ]
    assert fusions(graph(node(op, "x", "a"), node("Mul", "a x", "y")), "trt8") == []  # nothing is added
    assert fusions(graph(node(op, "x", "a"), node("Add", "a one", "y")), "trt8") == []  # nothing is multiplied
    assert fusions(graph(*spelt[:2], node("Relu", "b", "y")), "trt8") == []
    assert fusions(graph(node(op, "x", "y")), "trt8") == []


def test_norms_that_are_written_out():
    root = node("Sqrt", "v", "r")
    for nodes in ([node("ReduceMean", "x", "v"), root], [node("ReduceMean", "x", "u"), node("Add", "u e", "v"), root]):
        (found,) = fusions(graph(*nodes), "rtx")
        assert (found.kind, found.where, found.fused) == ("LayerNorm", "r", False) and "overflow FP16" in found.why
    assert fusions(graph(root), "rtx") == fusions(graph(node("Relu", "x", "v"), root), "rtx") == []


def test_operators_of_an_accelerator_and_the_lowest_precision():
    assert dla_refusals(graph(node("Conv"), node("Relu"))) == ""
    mixed = [node("Erf"), node("Conv"), node("MatMul"), node("Erf"), node("Relu", domain="mine")]
    assert dla_refusals(graph(*mixed)) == "it has no layer for 2 Erf, 1 MatMul, 1 Relu"
    rows = [("float8_e4m3fn", "fp8"), ("int8", "int8"), ("bfloat16", "bf16"), (F16, "fp16"), (F32, "fp32")]
    for place, (_, expected) in enumerate(rows):
        types = {f"v{i}": dtype for i, (dtype, _) in enumerate(rows) if i >= place}
        assert precision_of(graph(node("Relu", "x", " ".join(types)), **types)) == expected
    assert precision_of(graph(node("Relu"), x=F16, y=F32)) == "fp32"  # by what nodes give
