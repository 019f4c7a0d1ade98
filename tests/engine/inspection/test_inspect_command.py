"""The command that looks before a build: what it prints, and how it ends."""

import json
import types

import numpy as np
import onnx
import pytest
from onnx import parser

from vit_convert.core.bundle import Bundle
from vit_convert.core.config import default_config
from vit_convert.core.dialect import DIALECTS
from vit_convert.core.errors import BuildError
from vit_convert.engine.__main__ import main
from vit_convert.engine.inspection import command
from vit_convert.engine.inspection.findings import REFUSED, findings

PLAIN = "g (float[N, 4] x) => (float[N, 4] y) { y = Relu(x) }"
GELU = "g (float[N, 4] x) => (float[N, 4] y) { y = Gelu(x) }"


def test_the_command(bundle_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "parser_says", lambda path, target: ("its parser was not asked (test)", None))
    assert main(["engine", "inspect", str(bundle_path)]) == 0
    said = capsys.readouterr().out
    assert "model.onnx: fp32, opset 17" in said and "trt8, as fp16 by a flag: no obstacle found" in said
    assert "lowerings/matmul.onnx" in said and "--maxShapes=images:" in said
    assert main(["engine", "inspect", str(bundle_path / "model.onnx"), "--for=trt10,rtx"]) == 0
    assert "trt10: no obstacle found" in capsys.readouterr().out
    words = ["--config.engine.workspace_gib=0.25", "--config.engine.preset=jetson_orin"]
    for path in (bundle_path, bundle_path / "model.onnx"):  # what may be changed for a build, may be looked at before
        assert main(["engine", "inspect", str(path), "--for=trt8", *words]) == 0
        said = capsys.readouterr().out
        assert "DLA: not used" in said and "--memPoolSize=workspace:256" in said, path
    assert main(["engine", "inspect", str(bundle_path), "--config.engine.workspace=1"]) == 2
    assert "engine.workspace" in capsys.readouterr().err
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
        of_bundle = command._of_bundle(str(bundle_path), asked, [])
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


def test_files_that_only_look_whole(graph, tmp_path, capsys, monkeypatch):
    """Weights elsewhere, a size that the file does not give, a body in a node, no file at all."""
    monkeypatch.setattr(command, "parser_says", lambda path, target: ("its parser was not asked (test)", None))
    inspect = ["engine", "inspect", "--for=trt10"]
    assert main([*inspect, str(tmp_path / "none.onnx")]) == 2
    assert "there is no such file or folder" in capsys.readouterr().err

    model = parser.parse_model(f'<ir_version: 10, opset_import: ["" : 17]> {PLAIN}')
    model.graph.input[0].type.tensor_type.ClearField("shape")
    onnx.save(model, tmp_path / "shapeless.onnx")
    assert main([*inspect, str(tmp_path / "shapeless.onnx")]) == 0
    said = capsys.readouterr().out
    assert "no trtexec line" in said and "input without a shape in the file: x" in said

    weight = onnx.numpy_helper.from_array(np.ones((4, 4), np.float32), "w")
    model = parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 17]> g (float[N, 4] x) => (float[N, 4] y) { y = MatMul(x, w) }'
    )
    model.graph.initializer.append(weight)
    path = tmp_path / "apart.onnx"
    onnx.save(model, path, save_as_external_data=True, location="apart.bin", size_threshold=0)
    assert main([*inspect, str(path)]) == 0 and "1 node" in capsys.readouterr().out
    (tmp_path / "apart.bin").unlink()
    assert main([*inspect, str(path)]) == 7
    assert "its weights lie in apart.bin, which is not beside it" in capsys.readouterr().err

    branches = "then_branch = t () => (float[N, 4] a) { a = Relu(x) }, "
    branches += "else_branch = e () => (float[N, 4] b) { b = Abs(x) }"
    graph(f"g (float[N, 4] x, bool c) => (float[N, 4] y) {{ y = If (c) <{branches}> }}")
    assert main([*inspect, str(tmp_path / "text.onnx")]) == 0
    assert "not known: If: the nodes of its body were not looked at" in capsys.readouterr().out
