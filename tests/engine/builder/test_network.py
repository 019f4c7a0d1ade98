"""From a file to a network: which node is to blame, and which nodes there is nothing for, by a parser that a script
plays."""

import types

import pytest

from vit_convert.core.errors import BuildError, UnbuildableError
from vit_convert.engine.builder.network import ParsedGraph, parse_graph, refused_nodes

LAYERS = types.SimpleNamespace(SOFTMAX="softmax", PLUGIN_V2="plugin", OTHER="other")


class Error:
    """What a parser says of one node; 8.6's does not name it."""

    def __init__(self, name, operator="Op", text="no layer"):
        self.node_name, self.node_operator, self.desc = (lambda: name), (lambda: operator), (lambda: text)


def layer(name, kind):
    return types.SimpleNamespace(name=name, type=kind)


class Network:
    """Some layers, two inputs, one output."""

    def __init__(self, layers):
        self.num_layers, self.num_inputs, self.num_outputs = len(layers), 2, 1
        self.get_layer, self.get_input, self.get_output = layers.__getitem__, ("a", "b").__getitem__, ("y",).__getitem__


@pytest.fixture
def world(tmp_path):
    """A backend whose parser finds these errors, in a graph of these layers."""

    def make(errors=(), layers=(), *, reads=None, names_nodes=True, gpu=None, attention=None, said="", logged=""):
        asked = []

        class Parser:
            num_errors = len(errors)

            def __init__(self, network, logger):
                self.network = network

            def parse_from_file(self, path):
                asked.append(path)
                return not errors if reads is None else reads

            def supports_model_v2(self, data, path):
                asked.append((data, path))
                return not errors

            def get_error(self, i):
                return errors[i]

        known = {
            "OnnxParser.supports_model_v2": names_nodes or None,
            "ParserError.node_name": names_nodes or None,
            "LayerType.ATTENTION_INPUT": attention,
        }
        backend = types.SimpleNamespace(
            module=types.SimpleNamespace(OnnxParser=Parser, LayerType=LAYERS, __name__="tensorrt"),
            version="1.2",
            gpu=gpu,
            find=known.get,
            strongly_typed=True,
            network_flags=lambda *, strongly_typed: int(strongly_typed),
            logger=types.SimpleNamespace(node_name=lambda: logged, explain=lambda: said),
        )
        flags = []
        builder = types.SimpleNamespace(create_network=lambda flag: flags.append(flag) or Network(list(layers)))
        (tmp_path / "m.onnx").write_bytes(b"graph")
        return backend, builder, tmp_path / "m.onnx", asked, flags

    return make


@pytest.mark.parametrize("typed", [True, False])
def test_what_is_read(world, typed):
    layers = [layer("a", "softmax"), layer("b", "other")]
    backend, builder, path, asked, flags = world(layers=layers)
    found = parse_graph(backend, builder, path, strongly_typed=typed)
    assert asked == [str(path)] and flags == [int(typed)]
    assert (found.graph, found.inputs, found.outputs, found.layers) == ("m.onnx", ["a", "b"], ["y"], tuple(layers))


def test_a_graph_that_is_not_there(world):
    backend, builder, path, asked, _ = world()
    path.unlink()
    with pytest.raises(BuildError, match=r"m\.onnx"):
        parse_graph(backend, builder, path, strongly_typed=True)
    assert not asked


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"errors": [Error("relu", text="no layer\nno layer"), Error("x")]}, "m.onnx: node relu: no layer"),
        ({"errors": [Error("relu")], "names_nodes": False, "logged": "gelu"}, "m.onnx: node gelu: no layer"),
        ({"errors": [Error("")]}, "m.onnx: no layer"),
        ({"reads": False, "said": "cannot open"}, "m.onnx: cannot open"),
        ({"reads": False, "said": "cannot open", "logged": "gelu"}, "m.onnx: node gelu: cannot open"),
    ],
)
def test_the_first_error_is_told_with_its_node(world, options, message):
    backend, builder, path, *_ = world(**options)
    with pytest.raises(UnbuildableError) as caught:
        parse_graph(backend, builder, path, strongly_typed=True)
    assert str(caught.value).splitlines()[0] == message and "tensorrt 1.2 cannot read this graph" in caught.value.fix


def test_a_parser_that_misses_a_library(world):
    """TensorRT 8.6's wheel has no libnvinfer_vc_plugin: its parser throws at an operator that needs it."""
    backend, builder, path, *_ = world()

    def parse_from_file(self, path):
        raise RuntimeError("Unable to open library: libnvinfer_vc_plugin.so.8")

    backend.module.OnnxParser = type("Parser", (), {"__init__": lambda *_: None, "parse_from_file": parse_from_file})
    with pytest.raises(UnbuildableError, match=r"m\.onnx: Unable to open library: libnvinfer_vc_plugin"):
        parse_graph(backend, builder, path, strongly_typed=True)


def test_every_node_that_is_refused(world):
    errors = [Error("relu", "Relu"), Error("gelu", "Gelu"), Error("relu", "Relu")]
    backend, builder, path, asked, flags = world(errors)
    assert refused_nodes(backend, builder, path) == ["relu (Relu)", "gelu (Gelu)"]
    assert asked == [(b"graph", str(path))] and flags == [1]
    backend, builder, path, asked, _ = world(errors, names_nodes=False)  # 8.6 does not tell
    assert refused_nodes(backend, builder, path) == [] and not asked


def test_one_of_the_two_names_is_not_enough(world):
    for missing in ("OnnxParser.supports_model_v2", "ParserError.node_name"):
        backend, builder, path, asked, _ = world([Error("relu")])
        there = backend.find
        backend.find = lambda name, there=there, missing=missing: None if name == missing else there(name)
        assert refused_nodes(backend, builder, path) == [] and not asked


def test_attentions_are_counted():
    """A softmax each, an Attention node each, and the attention plugin, but no LayerNorm's nor our GroupNorm's, which
    counted as attentions of R26+ViT-S/32: 37 in place of 12."""
    layers = [layer("a/softmax", "softmax"), layer("b", "attention"), layer("c/qkv", "plugin"), layer("d", "other")]
    layers += [layer("block_00/LayerNormalization", "plugin"), layer("e", "softmax")]
    layers += [layer("Relu", "plugin"), layer("stage_1/block_0/Relu_2", "plugin")]
    for attention, count in (("attention", 4), (None, 3)):
        backend = types.SimpleNamespace(
            module=types.SimpleNamespace(LayerType=LAYERS), find=lambda name, a=attention: a
        )
        assert ParsedGraph(backend, "m.onnx", Network(layers)).num_attentions == count


def test_attention_without_a_gpu_would_end_the_process(world):
    layers = [layer("a", "other"), layer("block_00/attention", "attention")]
    backend, builder, path, *_ = world(layers=layers, attention="attention")
    with pytest.raises(BuildError, match=r"m\.onnx: block_00/attention: tensorrt 1\.2 crashes on Attention"):
        parse_graph(backend, builder, path, strongly_typed=True)
    for options in ({"gpu": "one", "attention": "attention"}, {"attention": None}):
        backend, builder, path, *_ = world(layers=layers, **options)
        assert len(parse_graph(backend, builder, path, strongly_typed=True).layers) == 2
    backend, builder, path, *_ = world(layers=layers[:1], attention="attention")
    assert len(parse_graph(backend, builder, path, strongly_typed=True).layers) == 1
