"""What will not build, what will fuse, how much memory and the same with trtexec: each by a small graph of its own."""

import json
import pathlib

import pytest

from vit_convert.core.config import default_config
from vit_convert.engine.inspection import command
from vit_convert.engine.inspection.estimate import estimate
from vit_convert.engine.inspection.findings import CHANGED, REFUSED, UNKNOWN, findings
from vit_convert.engine.inspection.fusions import fusions
from vit_convert.engine.inspection.onnx_wire import read_graph
from vit_convert.engine.inspection.support import SUPPORT
from vit_convert.engine.inspection.trtexec import FLAGS, Asked, trtexec_line

NAMES = pathlib.Path(__file__).parents[1] / "backend" / "trt_names"


def told(graph, target, what=REFUSED):
    return [f"{found.op}: {found.why}" for found in findings(graph, target) if found.what == what]


PLAIN = "g (float[N, 4] x) => (float[N, 4] y) { y = Relu(x) }"
GELU = "g (float[N, 4] x) => (float[N, 4] y) { y = Gelu(x) }"


def test_nothing_against_a_plain_graph(graph):
    for target in SUPPORT:
        assert findings(graph(PLAIN), target) == []


@pytest.mark.parametrize(
    ("text", "opset", "target", "expected"),
    [
        (PLAIN, 18, "trt8", ": opset 18, it reads 9 to 17"),
        (GELU, 20, "trt8", "Gelu: trt8 has no Gelu"),
        ("g (float[N] x) => (int64[M] y) { y, i, j, k = Unique(x) }", 17, "trt10", "Unique: trt10 has no Unique"),
        (
            "g (bfloat16[N, 4] x) => (bfloat16[N, 4] y) { y = Relu(x) }",
            17,
            "trt8",
            "Relu: y is bfloat16, which trt8 does not have",
        ),
        ("g (int16[4] x) => (int16[4] y) { y = Neg(x) }", 17, "trt8", ": an input of int16, which trt8 does not have"),
        ("g (int64[N] x) => (int64[N] y) { y = Neg(x) }", 17, "trt8", ": input of int64, which it does not have"),
        (
            "g (float[N, 4] x) => (float[N, 4] y) { y = Einsum <equation = \"...i->...i\"> (x) }",
            17,
            "trt11",
            "Einsum: ...i->...i: no ellipsis and no diagonal is read",
        ),
        (
            "g (float[N, 4] x, int64[1] a) => (float[N] y) { y = ReduceMean <keepdims = 0> (x, a) }",
            18,
            "trt10",
            "ReduceMean: axes that are computed; they have to be constants",
        ),
    ],
)  # fmt: skip
def test_what_will_not_build(graph, text, opset, target, expected):
    assert expected in told(graph(text, opset), target)


F = "float[2, 4, 4, 4]"
ONE_NODE = [  # what a parser reads, and what it refuses: of operators, attributes, types and opsets
    (f"({F} x) => ({F} y) {{ y = Relu(x) }}", 28),
    (f"({F} x) => ({F} y) {{ y = Relu(x) }}", 7),
    (f"({F} x) => ({F} y) {{ y = MeanVarianceNormalization(x) }}", 17),
    ("(float[4] x) => (int64[1, N] y) { y = NonZero(x) }", 17),
    ("(int32[4] x) => (int32[4] y) { y = BitwiseNot(x) }", 18),
    ("(uint8[4] x, uint8[4] b) => (uint8[4] y) { y = Add(x, b) }", 17),
    ("(int16[4] x) => (int16[4] y) { y = Neg(x) }", 17),
    (f"({F} x) => (float[2, 4, 2, 2] y) {{ y = LpPool <kernel_shape = [3, 3], p = 3> (x) }}", 17),
    (f"({F} x) => (float[2, 4, 2, 2] y) {{ y = LpPool <kernel_shape = [3, 3], p = 2> (x) }}", 17),
    *((f"(float[4, 2] x, int64[1, 1] i, float[1, 2] u) => (float[4, 2] y) {{ y = ScatterND {mode} (x, i, u) }}", 18)
      for mode in ("", '<reduction = "add">')),
]  # fmt: skip


@pytest.mark.parametrize(("text", "opset"), ONE_NODE)
def test_the_table_says_what_the_parser_says(graph, tmp_path, text, opset):
    """Of TensorRT-RTX, whose parser can be asked here; what the table does not know, it does not refuse."""
    pytest.importorskip("tensorrt_rtx")
    found = findings(graph(f"g {text}", opset), "rtx")
    words, reads = command.parser_says(tmp_path / "text.onnx", "rtx")  # where `graph` left it
    assert (REFUSED not in [row.what for row in found]) is reads, words


def test_gelu_builds_elsewhere_and_the_fix_says_how(graph):
    assert [told(graph(GELU, 20), target) for target in ("trt10", "trt11", "rtx")] == [[], [], []]
    (found,) = [row for row in findings(graph(GELU, 20), "trt8") if row.op == "Gelu"]
    assert "Erf" in found.fix and "target=trt8" in found.fix
    fused = {target: [(row.fused, row.why) for row in fusions(graph(GELU, 20), target)] for target in SUPPORT}
    assert fused["trt8"] == [(False, "trt8 has no Gelu")] and all(
        fused[name][0][0] for name in ("trt10", "trt11", "rtx")
    )


def test_what_only_a_parser_knows(graph):
    mine = graph("g (float[N] x) => (float[N] y) { y = mine.Thing(x) }", domains=', "mine" : 1')
    assert told(mine, "trt10", UNKNOWN) == ["Thing: domain 'mine': needs a plugin"]
    assert told(graph("g (float[N, 4] x) => (float[N, 4] y) { y = LpNormalization(x) }"), "trt11", UNKNOWN) == []
    window = graph("g (int64 n) => (float[M] y) { y = HannWindow(n) }", 17)
    assert "HannWindow: HannWindow is in no list of ours" in told(window, "trt11", UNKNOWN)
    assert told(graph(PLAIN, 21), "trt10", UNKNOWN) == [": opset 21: 10.0 and 10.1 read up to 20"]


def test_plugins(graph):
    text = "g (float[N] x) => (float[N] y) { y = tensorrt.plugin.CustomQKVToContextPluginDynamic(x) }"
    own = ', "tensorrt.plugin" : 1'
    assert told(graph(text, domains=own), "trt8") == []
    assert "a plugin, for which it has no library" in told(graph(text, domains=own), "rtx")[0]
    assert "a plugin that is made for TensorRT 8.6" in told(graph(text, domains=own), "trt11", UNKNOWN)[0]


QDQ = """g (float[N, 4] x) => (float[N, 4] y) <float s = {{0.5}}, {zero} z = {{{value}}}> {{
    q = QuantizeLinear(x, s, z)
    y = DequantizeLinear(q, s, z)
}}"""


@pytest.mark.parametrize(
    ("zero", "value", "target", "what", "expected"),
    [
        ("int8", 0, "trt8", REFUSED, None),
        ("int8", 3, "trt8", REFUSED, "a zero point that is not 0"),
        ("int8", 3, "rtx", REFUSED, "a zero point that is not 0"),
        ("uint8", 128, "trt8", REFUSED, "uint8: it quantizes to signed types, symmetrically"),
        ("uint8", 128, "trt10", CHANGED, "uint8: it quantizes to signed types, symmetrically"),
        ("float8e4m3fn", 0, "trt10", REFUSED, None),
        ("float8e4m3fn", 0, "trt8", REFUSED, "float8_e4m3fn: it quantizes to int8"),
        ("int16", 0, "trt11", REFUSED, "int16: it quantizes to int8, float8_e4m3fn, int4, float4_e2m1"),
    ],
)
def test_quantization(graph, zero, value, target, what, expected):
    found = told(graph(QDQ.format(zero=zero, value=value), 21 if zero == "int16" else 19), target, what)
    whys = [row.partition(": ")[2] for row in found]
    assert expected in whys if expected else not [why for why in whys if "opset" not in why]


def test_quantization_of_8_6_wants_float_scales_zero_points_and_float_weights(graph):
    text = """g (float16[N, 1] x, float16 s) => (float16[N, 1] y) <int8[1, 1] w = {3}> {
        v = DequantizeLinear(w, s)
        q = QuantizeLinear(x, s)
        d = DequantizeLinear(q, s)
        y = MatMul(d, v)
    }"""
    found = told(graph(text, 19), "trt8")
    assert "DequantizeLinear: weights stored in int8, which 8.6 does not read" in found
    assert "DequantizeLinear: scale of float16, 8.6 wants float32" in found
    assert "QuantizeLinear: no zero point, which 8.6 wants" in found
    assert told(graph(text, 19), "trt10") == []


def test_layer_norm_of_rtx_wants_one_type(graph):
    text = """g (float16[N, 4] x) => (float16[N, 4] y) <float[4] s, float[4] b> { y = LayerNormalization(x, s, b) }"""
    assert "LayerNormalization: inputs of float16 and float32: it wants one type" in told(graph(text), "rtx")
    assert told(graph(text), "trt10") == []


def attention(kind="float16", heads="N, 2, 9, 32", keys="N, 2, 32, 9", scale=""):
    between = "s = Mul(r, c)\n    p = Softmax <axis = -1> (s)" if scale else "p = Softmax <axis = -1> (r)"
    return f"""g ({kind}[{heads}] q, {kind}[{keys}] k, {kind}[{heads}] v, {kind} c) => ({kind}[{heads}] y) {{
    r = MatMul(q, k)
    {between}
    y = MatMul(p, v)
}}"""


@pytest.mark.parametrize(
    ("text", "half", "why"),
    [
        (attention(), False, ""),
        (attention("float"), False, "float32: the fused kernels are FP16, BF16, INT8 and FP8"),
        (attention("float"), True, ""),  # a flag makes it FP16
        (attention(heads="N, 2, 9, 20", keys="N, 2, 20, 9"), False, "heads of width 20: it wants 16 to 256, a"),
        (attention(heads="N, 2, 9, 8", keys="N, 2, 8, 9"), False, "heads of width 8: it wants 16 to 256, a"),
        (attention(heads="N, 9, 32", keys="N, 32, 9"), False, "queries, keys and values of 3, 3, 3 axes"),
        (attention(scale="after"), False, "the scale stands after the first product: multiply the queries instead"),
    ],
)  # fmt: skip
def test_attention(graph, text, half, why):
    (found,) = fusions(graph(text), "trt8", half=half)
    assert found.kind == "attention" and found.fused is not bool(why) and why in found.why


def quantized_attention(heads="N, 2, 9, 32", keys="N, 2, 32, 9", scores=True):
    pair = "a = QuantizeLinear(p, s, z)\n b = DequantizeLinear(a, s, z)" if scores else "b = Identity(p)"
    rows = "\n".join(f"{n}q = QuantizeLinear({n}, s, z)\n {n}d = DequantizeLinear({n}q, s, z)" for n in "qkv")
    ends = f"(float[{heads}] q, float[{keys}] k, float[{heads}] v) => (float[{heads}] y)"
    return f"""g {ends} <float s = {{0.5}}, int8 z = {{0}}> {{
    {rows}
    r = MatMul(qd, kd)
    p = Softmax <axis = -1> (r)
    {pair}
    y = MatMul(b, vd)
}}"""


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (quantized_attention(), ""),
        (quantized_attention(scores=False), "only some of queries, keys, values and scores are quantized: all or none"),
        (quantized_attention("N, 2, 9, 128", "N, 2, 128, 9"), "heads of width 128 in INT8: it wants 16, 32, 64"),
        (quantized_attention("N, 2, 577, 64", "N, 2, 64, 577"), "577 tokens in INT8: at most 512"),
    ],
)
def test_attention_in_int8(graph, text, why):
    (found,) = fusions(graph(text), "trt10")
    assert found.fused is not bool(why) and why in found.why
    (old,) = fusions(graph(text), "trt8")
    assert not old.fused and "8.6 fuses next to no attention" in old.why


def test_a_softmax_of_classes_is_no_attention(graph):
    assert fusions(graph("g (float[N, 9] x) => (float[N, 9] y) { y = Softmax(x) }"), "rtx") == []


def test_layer_norms_and_gelus(graph, bundle_path):
    spelt = """g (float[N, 4] x) => (float[N, 4] y) <float two = {2.0}, float e = {0.00001}> {
        m = ReduceMean <axes = [-1]> (x)
        d = Sub(x, m)
        s = Pow(d, two)
        v = ReduceMean <axes = [-1]> (s)
        w = Add(v, e)
        r = Sqrt(w)
        y = Div(d, r)
    }"""
    (found,) = fusions(graph(spelt), "trt8")
    assert found.kind == "LayerNorm" and not found.fused and "overflow FP16" in found.why
    kinds = [(row.kind, row.fused) for row in fusions(read_graph(bundle_path / "model.onnx"), "trt8", half=True)]
    assert kinds.count(("LayerNorm", True)) == 3 and kinds.count(("attention", True)) == 1  # mu has one block
    assert kinds.count(("GELU", True)) == 1


def test_memory_counts_what_lives_at_one_time(graph):
    weights = ", ".join(
        f"float[{sides}] {name} = {{{', '.join('0' * 32)}}}" for name, sides in (("w", "4, 8"), ("v", "8, 4"))
    )
    text = f"""g (float[N, 4] x) => (float[N, 4] y) <int64[2] sh = {{-1, 8}}, {weights}> {{
        a = MatMul(x, w)
        b = Relu(a)
        c = Reshape <allowzero = 0> (b, sh)
        y = MatMul(c, v)
    }}"""
    found = estimate(graph(text), {"N": 10})
    assert found.weights == 2 * 32 * 4 + 16 and found.building == 4 * found.weights
    # x (160) is gone when a and b (320 each) live; c is a view of b
    assert found.activations == 640 and (found.largest, found.largest_name) == (320, "a")
    assert estimate(graph(text), {"N": 10}, half=True).activations == 320


@pytest.mark.parametrize("target", FLAGS)
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_trtexec_is_given_flags_that_it_has(target, precision):
    shapes = {"images": ((1, 4, 4, 3), (8, 4, 4, 3), (16, 4, 4, 3))}
    asked = Asked(precision, version_compatible=True, hardware_compatible=True)
    words = trtexec_line(target, "a b.onnx", shapes, asked).split(" --")
    assert {word.partition("=")[0] for word in words[1:]} <= FLAGS[target]
    assert "minShapes=images:1x4x4x3" in words and "maxShapes=images:16x4x4x3" in words
    assert ("fp16" in words) is (target == "trt8" and precision != "fp32")
    assert ("stronglyTyped" in words) is (target == "trt10")
    assert words[0].startswith("tensorrt_rtx" if target == "rtx" else "trtexec")


def names_of(target, kind):
    """The names of an enum in the lists that were read from each TensorRT's own bindings."""
    file = {"trt8": "8.6", "trt10": "10", "trt11": "11", "rtx": "rtx"}[target]
    return json.loads((NAMES / f"{file}.json").read_text())["names"][kind].split()


@pytest.mark.parametrize("target", FLAGS)
def test_tables_agree_with_the_names_of_the_bindings(target):
    """A flag of the tool sets a name of the API: those of precision went with it; and so do types."""
    flags = {"fp16": "FP16", "int8": "INT8", "noTF32": "TF32", "versionCompatible": "VERSION_COMPATIBLE"}
    for flag, name in flags.items():
        assert flag not in FLAGS[target] or name in names_of(target, "BuilderFlag"), flag
    assert ("fp16" in FLAGS[target]) <= ("FP16" in names_of(target, "BuilderFlag"))
    assert ("stronglyTyped" in FLAGS[target]) <= ("STRONGLY_TYPED" in names_of(target, "NetworkDefinitionCreationFlag"))
    types = names_of(target, "DataType")
    assert ("bfloat16" in SUPPORT[target].types) is ("BF16" in types)
    assert SUPPORT[target].casts_int64 is ("INT64" not in types)
    assert ("float4_e2m1" in SUPPORT[target].types) is ("FP4" in types)


def test_what_fuses_is_printed(graph, tmp_path, capsys, monkeypatch):
    graph(attention("float"))
    monkeypatch.setattr(command, "parser_says", lambda path, target: ("(not asked)", None))
    command.inspect(str(tmp_path / "text.onnx"), ["rtx"], [], default_config())
    line = "attention: 0 of 1 expected to fuse; not: float32: the fused kernels are FP16, BF16, INT8 and FP8"
    assert f"    {line}\n" in capsys.readouterr().out
