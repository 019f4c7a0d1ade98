"""Which layers of a weakly typed build are asked for in which precision; TensorRT's network is stood in for, as it
takes a GPU."""

import types

import pytest

from vit_convert.core.errors import BuildError
from vit_convert.engine.backend.trt import Backend
from vit_convert.engine.builder.network import ParsedGraph
from vit_convert.engine.builder.precision import set_weak_precision
from vit_convert.engine.builder.request import BuildRequest

KINDS = types.SimpleNamespace(CONSTANT=1, SHUFFLE=2, MATRIX_MULTIPLY=3, CONVOLUTION=4, SOFTMAX=5)
FLAGS = types.SimpleNamespace(
    FP16="FP16", INT8="INT8", OBEY_PRECISION_CONSTRAINTS="OBEY", PREFER_PRECISION_CONSTRAINTS="PREFER"
)
TYPES = types.SimpleNamespace(INT8="int8", FLOAT="fp32")
MODULE = types.SimpleNamespace(LayerType=KINDS, BuilderFlag=FLAGS, DataType=TYPES)
BACKEND = Backend("tensorrt", "8.6.0", MODULE, None, None)
BUILDER = types.SimpleNamespace(platform_has_fast_fp16=True, platform_has_fast_int8=True)


class Layer:
    def __init__(self, name, kind, inputs, output):
        self.name, self.type, self._inputs, self._output = name, kind, inputs, output
        self.precision, self.types = None, {}
        self.num_inputs, self.num_outputs = len(inputs), 1

    def _tensor(self, name):
        return types.SimpleNamespace(name=name, dtype=types.SimpleNamespace(name="FLOAT"), is_execution_tensor=True)

    def get_input(self, i):
        return self._tensor(self._inputs[i])

    def get_output(self, i):
        return self._tensor(self._output)

    def set_output_type(self, i, dtype):
        self.types[i] = dtype


def attention(first):
    """Dense with its weight behind a shuffle, scores of two activations, softmax."""
    return [
        Layer("w", KINDS.CONSTANT, [], "w"),
        Layer("w3", KINDS.SHUFFLE, ["w"], "w3"),
        Layer("block_00/query", KINDS.MATRIX_MULTIPLY, [first, "w3"], "q"),
        Layer("turn", KINDS.SHUFFLE, ["q"], "k"),
        Layer("block_00/scores", KINDS.MATRIX_MULTIPLY, ["q", "k"], "s"),
        Layer("block_00/softmax", KINDS.SOFTMAX, ["s"], "p"),
    ]


def configured(layers, precision, keep_fp32=(), **options):
    network = types.SimpleNamespace(num_layers=len(layers), get_layer=lambda i: layers[i])
    flags = set()
    builder_config = types.SimpleNamespace(set_flag=flags.add)
    request = BuildRequest("g.onnx", precision, keep_fp32=keep_fp32, **options)
    set_weak_precision(ParsedGraph(BACKEND, "g.onnx", network), BUILDER, builder_config, request)
    return flags, {layer.name: layer.precision for layer in layers if layer.precision}


def test_a_calibrated_build_asks_for_int8_where_there_are_weights():
    conv = Layer("block_00/fc1", KINDS.CONVOLUTION, ["x"], "h")
    assert configured([conv, *attention("h")], "int8", calibrator=object()) == (
        {"FP16", "INT8", "PREFER"},
        {"block_00/fc1": "int8"},
    )
    assert configured(attention("x"), "int8", calibrator=object()) == (
        {"FP16", "INT8", "PREFER"},
        {"block_00/query": "int8"},
    )


def test_what_reads_a_tensor_without_a_range_is_not_asked_for_int8():
    layers = [Layer(f"block_0{i}/fc1", KINDS.CONVOLUTION, [f"x{i}"], f"h{i}") for i in range(2)]
    flags, found = configured(layers, "int8", calibrator=object(), ranges=dict.fromkeys(("x1", "h0"), 1.0))
    assert flags == {"FP16", "INT8", "PREFER"} and found == {"block_01/fc1": "int8"}


def test_what_stays_in_fp32_is_obeyed_and_int8_left_to_the_timings():
    layers = [Layer(f"block_0{i}/fc1", KINDS.CONVOLUTION, ["x"], f"h{i}") for i in range(2)]
    flags, found = configured(layers, "int8", ["block_01"], calibrator=object())
    assert flags == {"FP16", "INT8", "OBEY"} and found == {"block_01/fc1": "fp32"}
    assert layers[1].types == {0: "fp32"}


def test_a_graph_with_qdq_nodes_says_itself_what_is_int8():
    assert configured(attention("x"), "int8") == ({"FP16", "INT8"}, {})
    assert configured(attention("x"), "fp16") == ({"FP16"}, {})
    assert configured(attention("x"), "fp32") == (set(), {})


@pytest.mark.parametrize(
    ("pattern", "kept"),
    [
        ("block_01", (0, 1)),
        ("block_01/fc1", (0,)),
        ("*/fc1", (0, 2)),
        ("Transformer/encoderblock_10", (2,)),
        ("head", (3,)),
    ],
)
def test_layers_are_named_as_everywhere_in_the_config(pattern, kept):
    """Nodes have the names that the export gives them; TensorRT's layers take them over."""
    blocks = "Transformer/encoderblock_1", "Transformer/encoderblock_1", "Transformer/encoderblock_10"
    names = [*map("/".join, zip(blocks, ("MlpBlock_0/Dense_0/Conv", "Pow", "MlpBlock_0/Dense_0/Conv"))), "head/MatMul"]
    _, found = configured([Layer(name, KINDS.CONVOLUTION, ["x"], name) for name in names], "fp16", [pattern])
    assert found == {names[i]: "fp32" for i in kept}


def test_kept_layers_are_obeyed_and_a_pattern_without_a_layer_is_an_error():
    flags, found = configured(attention("x"), "fp16", ["block_00/softmax"])
    assert flags == {"FP16", "OBEY"} and found == {"block_00/softmax": "fp32"}
    with pytest.raises(BuildError, match="keep_fp32 block_7: no layer has such a name"):
        configured(attention("x"), "fp16", ["block_7"])
