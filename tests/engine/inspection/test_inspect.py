"""What will not build, what will fuse, how much memory and the same with trtexec: each by a small graph of its own."""

import json
import pathlib
import types

import onnx
import pytest
from onnx import parser

from vit_convert.core.bundle import Bundle
from vit_convert.core.config import default_config
from vit_convert.core.dialect import DIALECTS
from vit_convert.core.errors import BuildError
from vit_convert.engine.__main__ import main
from vit_convert.engine.inspection import command
from vit_convert.engine.inspection.estimate import estimate
from vit_convert.engine.inspection.findings import CHANGED, REFUSED, UNKNOWN, findings
from vit_convert.engine.inspection.fusions import fusions
from vit_convert.engine.inspection.onnx_wire import read_graph
from vit_convert.engine.inspection.support import SUPPORT
from vit_convert.engine.inspection.trtexec import FLAGS, Asked, trtexec_line

NAMES = pathlib.Path(__file__).parents[1] / "backend" / "trt_names"


@pytest.fixture
def graph(tmp_path):
    """Reads a graph from its text, with the types and shapes that onnx infers."""

    def make(text, opset=17, domains=""):
        whole = f'<ir_version: 10, opset_import: ["" : {opset}{domains}]>\n{text}'
        model = onnx.shape_inference.infer_shapes(parser.parse_model(whole))
        onnx.save(model, tmp_path / "text.onnx")
        return read_graph(tmp_path / "text.onnx")

    return make


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
        (PLAIN, 25, "trt11", ": opset 25, it reads 9 to 24"),
        (GELU, 20, "trt8", "Gelu: trt8 has no Gelu"),
        ("g (float[N] x) => (int64[M] y) { y, i, j, k = Unique(x) }", 17, "trt10", "Unique: trt10 has no Unique"),
        (
            "g (bfloat16[N, 4] x) => (bfloat16[N, 4] y) { y = Relu(x) }",
            17,
            "trt8",
            "Relu: y is bfloat16, which trt8 does not have",
        ),
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


def test_gelu_builds_elsewhere_and_the_fix_says_how(graph):
    assert [told(graph(GELU, 20), target) for target in ("trt10", "trt11", "rtx")] == [[], [], []]
    (found,) = [row for row in findings(graph(GELU, 20), "trt8") if row.op == "Gelu"]
    assert "Erf" in found.fix and "target=trt8" in found.fix


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


def test_the_command(bundle_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "parser_says", lambda path, target: ("its parser was not asked (test)", None))
    assert main(["engine", "inspect", str(bundle_path)]) == 0
    said = capsys.readouterr().out
    assert "model.onnx: fp32, opset 17" in said and "trt8, as fp16 by a flag: no obstacle found" in said
    assert "lowerings/matmul.onnx" in said and "--maxShapes=images:" in said
    assert main(["engine", "inspect", str(bundle_path / "model.onnx"), "--for=trt10,rtx"]) == 0
    assert "trt10: no obstacle found" in capsys.readouterr().out
    assert main(["engine", "inspect", str(bundle_path), "--for=trt9"]) == 2
    assert "--for=trt9: not one of trt8, trt10, trt11, rtx" in capsys.readouterr().err


def test_a_graph_that_will_not_build_ends_with_7(graph, tmp_path, capsys, monkeypatch):
    graph(GELU, 20)
    monkeypatch.setattr(command, "parser_says", lambda path, target: ("its parser was not asked (test)", None))
    assert main(["engine", "inspect", str(tmp_path / "text.onnx"), "--for=trt8"]) == 7
    found = capsys.readouterr()
    assert "will not build: Gelu: trt8 has no Gelu" in found.out and "text.onnx for trt8" in found.err


def test_the_parser_itself_is_asked(tmp_path, graph):
    """Ours says nothing of a product whose sides do not fit; TensorRT-RTX does."""
    pytest.importorskip("tensorrt_rtx")
    graph(PLAIN)
    assert command.parser_says(tmp_path / "text.onnx", "rtx")[1] is True
    header, body = '<ir_version: 10, opset_import: ["" : 17]>', "{ y = MatMul(x, w) }"
    wrong = parser.parse_model(f"{header} g (float[2, 4] x, float[3, 5] w) => (float[2, 5] y) {body}")
    onnx.save(wrong, tmp_path / "bad.onnx")
    words, accepted = command.parser_says(tmp_path / "bad.onnx", "rtx")
    assert accepted is False and "refuses it" in words and "in all" not in words
    words, accepted = command.parser_says(tmp_path / "bad.onnx", "trt8")
    assert accepted is None and words.startswith("its parser was not asked (")


def test_the_parser_names_every_node_that_it_has_nothing_for(tmp_path):
    """Parsing ends at the first of them."""
    pytest.importorskip("tensorrt_rtx")
    text = "g (float[4, 4] x) => (float d, int64[M] y) { a = Relu(x) d = Det(a) y, i, j, k = Unique(a) }"
    model = parser.parse_model(f'<ir_version: 10, opset_import: ["" : 17]>\n{text}')
    for node in model.graph.node:
        node.name = f"the {node.op_type}"
    onnx.save(model, tmp_path / "two.onnx")
    words, accepted = command.parser_says(tmp_path / "two.onnx", "rtx")
    assert accepted is False and "in all it does not support the Det (Det), the Unique (Unique)" in words


def test_lowerings_are_of_the_bundles_own_generation(bundle_path):
    """They are spelt for it; model.onnx may be asked about for others, and is looked at for its own by default."""
    for asked, targets in (([], ["trt8"]), (["trt10", "rtx"], ["trt10", "rtx"])):
        of_bundle = command._of_bundle(str(bundle_path), asked)
        found = {subject.name: list(subject.targets) for subject in of_bundle}
        assert found.pop("model.onnx") == targets
        names = {path.name for path in (bundle_path / "lowerings").glob("*.onnx")}
        assert found == {f"lowerings/{name}": ["trt8"] for name in names} and names
        config = json.loads((bundle_path / "config.json").read_text())
        (sizes,) = {tuple(subject.sizes.items()) for subject in of_bundle}  # of the fixture's images
        assert sizes == (("height", 64), ("width", 64), ("batch", config["batch"]["max"]))


def test_the_estimate_line_by_line(graph, tmp_path, capsys, monkeypatch):
    graph("g (float[N, 256] x) => (float[N, 256] y) { a = Relu(x) y = Sqrt(a) }")
    monkeypatch.setattr(command, "parser_says", lambda path, target: ("(not asked)", None))
    config = default_config()
    config.batch.min, config.batch.opt, config.batch.max, config.engine.workspace_gib = 1, 2, 1024, 1.0
    command.inspect(str(tmp_path / "text.onnx"), ["rtx"], [], config)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    # x, a and y of 1024 times 256 numbers of four bytes are 1 MiB each, and two of them live at one time
    for first, last in (("values", 2), ("largest", 1), ("workspace", 1)):
        (row,) = [row for row in rows if row[:1] == [first]]
        assert float(row[-2]) == last and row[-1] == ("GiB" if first == "workspace" else "MiB"), row
    assert any(row[0].startswith("tensorrt_rtx") for row in rows if row)


@pytest.mark.parametrize(("count", "more"), [(1, ""), (2, ", and 1 more"), (3, ", and 2 more")])
def test_how_many_more_will_not_build(graph, tmp_path, monkeypatch, count, more):
    lines = " ".join(f"{y} = Gelu({x})" for x, y in zip("xabc", "abcd"[:count]))
    graph(f"g (float[N, 4] x) => (float[N, 4] {'abcd'[count - 1]}) {{ {lines} }}", 20)
    monkeypatch.setattr(command, "parser_says", lambda path, target: ("(not asked)", None))
    monkeypatch.setattr(command, "findings", lambda graph, target: refused(graph, target))
    with pytest.raises(BuildError) as caught:
        command.inspect(str(tmp_path / "text.onnx"), ["trt8"], [], default_config())
    assert str(caught.value).splitlines()[0].endswith(f"trt8 has no Gelu{more}")


def refused(graph, target):
    return [row for row in findings(graph, target) if row.what == REFUSED and row.op == "Gelu"]


def test_a_refusal_of_the_parser_alone_ends_with_7(graph, tmp_path, monkeypatch):
    graph(PLAIN)
    for accepted in (True, None):
        monkeypatch.setattr(command, "parser_says", lambda path, target, said=accepted: ("words", said))
        command.inspect(str(tmp_path / "text.onnx"), ["rtx"], [], default_config())
    monkeypatch.setattr(command, "parser_says", lambda path, target: ("it refuses it: no kernel", False))
    with pytest.raises(BuildError, match=r"text\.onnx for rtx: it refuses it: no kernel"):
        command.inspect(str(tmp_path / "text.onnx"), ["rtx"], [], default_config())


@pytest.mark.parametrize(
    ("types", "expected"),
    [
        (("float",), "fp32"),
        (("float", "float16"), "fp16"),
        (("float", "bfloat16"), "bf16"),
        (("float", "float16", "int8"), "int8"),
        (("float16", "int8", "float8e4m3fn"), "fp8"),
    ],
)
def test_a_graph_is_of_its_lowest_precision(graph, types, expected):
    numbers = {"float": 1, "float16": 10, "bfloat16": 16, "int8": 3, "float8e4m3fn": 17}
    casts = "".join(f" c{i} = Cast <to = {numbers[kind]}> (x)" for i, kind in enumerate(types))
    found = graph(f"g (float[4] x) => (float[4] y) {{{casts} y = Relu(x) }}", 19)
    assert command.precision_of(found) == expected


def test_a_parser_that_gives_up_refuses_too(graph, tmp_path, monkeypatch):
    """Not of one node: it would end the process, or the file cannot be read."""
    pytest.importorskip("tensorrt_rtx")
    graph(PLAIN)

    def parse_graph(*arguments, **options):
        raise BuildError("text.onnx: crashes on Attention")

    monkeypatch.setattr(command, "parse_graph", parse_graph)
    words, accepted = command.parser_says(tmp_path / "text.onnx", "rtx")
    assert accepted is False and words.endswith("refuses it: text.onnx: crashes on Attention")


@pytest.mark.parametrize(
    ("target", "precisions", "flag"),
    [("trt8", ["fp16"], True), ("trt8", ["fp32"], False), ("trt8", [], False), ("trt10", ["fp16"], False)],
)
def test_a_flag_is_in_the_line_of_trtexec_where_it_lowers_a_graph(
    graph, tmp_path, capsys, monkeypatch, target, precisions, flag
):
    graph(PLAIN)
    monkeypatch.setattr(command, "parser_says", lambda path, target: ("(not asked)", None))
    command.inspect(str(tmp_path / "text.onnx"), [target], precisions, default_config())
    said = capsys.readouterr().out
    assert (" --fp16" in said) is flag and (f"{target}, as fp16 by a flag" in said) is flag


def test_a_graph_of_each_precision_is_looked_at(tmp_path):
    bundle = Bundle(tmp_path)
    bundle.lowerings.mkdir()
    made = ["model.onnx", "model.fp16.onnx", "model.int8.onnx", "lowerings/matmul.onnx", "lowerings/plugin.onnx"]
    for name in (*made, "model.onnx.data", "model.fp16.onnx.data", "other.onnx"):
        (tmp_path / name).touch()
    assert [path.relative_to(tmp_path).as_posix() for path in command._graphs(bundle)] == made


def test_what_fuses_is_printed(graph, tmp_path, capsys, monkeypatch):
    graph(attention("float"))
    monkeypatch.setattr(command, "parser_says", lambda path, target: ("(not asked)", None))
    command.inspect(str(tmp_path / "text.onnx"), ["rtx"], [], default_config())
    line = "attention: 0 of 1 expected to fuse; not: float32: the fused kernels are FP16, BF16, INT8 and FP8"
    assert f"    {line}\n" in capsys.readouterr().out


@pytest.mark.parametrize("target", ["trt8", "trt11"])
def test_another_generations_parser_is_not_asked(tmp_path, monkeypatch, target):
    """A newer one or an older one: TensorRT 10's parser says nothing of 8.6 and 11."""
    backend = types.SimpleNamespace(
        dialect=DIALECTS["trt10"], module=types.SimpleNamespace(__name__="tensorrt"), version="10.3.0"
    )
    monkeypatch.setattr(command, "load_backend", lambda name, **options: backend)
    assert command.parser_says(tmp_path / "a.onnx", target) == (
        "its parser was not asked (tensorrt 10.3.0 is installed)", None
    )  # fmt: skip
