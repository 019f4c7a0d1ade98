"""What is read of a graph: linears, blocks around Q/DQ pairs, activations, weights that are let go of, a hash of all
files."""

import hashlib

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from vit_convert.quantize.graph import (
    Layer,
    activations,
    derived,
    hash_model,
    initializer,
    linear_layers,
    linear_weight,
    moved,
    names_by_node,
    node_blocks,
    read_weight,
    weight_name,
)

# An activation that is called after another block, with a pair of its own; a weight with one; a product of constants;
# an integer.
GRAPH = """<ir_version: 10, opset_import: ["" : 20]>
g (float[N, 4] images, int64[N, 4] counts) => (float[N, 4] logits)
<float[4, 4] "stem/w", float[4, 4] "block_0/fc/w", float[4, 4] "block_1/fc/w", float[4, 4] "head/w", float[1,
    4] "probe/w",
 float[4] "block_1/norm/scale" = {1, 2, 3, 4},
 float scale = {0.5}, int8 zero = {0}> {
    x = MatMul (images, "stem/w")
    "block_09/x" = MatMul (x, "block_0/fc/w")
    "block_09/x/quantized" = QuantizeLinear ("block_09/x", scale, zero)
    "block_09/x/dequantized" = DequantizeLinear ("block_09/x/quantized", scale, zero)
    "block_1/fc/w/quantized" = QuantizeLinear ("block_1/fc/w", scale, zero)
    "block_1/fc/w/dequantized" = DequantizeLinear ("block_1/fc/w/quantized", scale, zero)
    y = MatMul ("block_09/x/dequantized", "block_1/fc/w/dequantized")
    constant = MatMul ("probe/w", "head/w")
    relu = Relu ("block_09/x")
    normed = Mul (y, "block_1/norm/scale")
    n = Cast <to = 7> (y)
    sum = Add (n, counts)
    back = Cast <to = 1> (sum)
    z = Add (back, constant)
    logits = MatMul (z, "head/w")
}"""


@pytest.fixture
def proto():
    model = onnx.parser.parse_model(GRAPH)
    rng = np.random.default_rng(0)
    for name, shape in (
        ("stem/w", (4, 4)),
        ("block_0/fc/w", (4, 4)),
        ("block_1/fc/w", (4, 4)),
        ("head/w", (4, 4)),
        ("probe/w", (1, 4)),
    ):
        model.graph.initializer.append(
            onnx.numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name)
        )
    return onnx.shape_inference.infer_shapes(model)


@pytest.fixture
def graph(proto):
    return ir.from_proto(proto).graph


def by_output(found):
    return {node.outputs[0].name: value for node, value in found.items()}


def test_linears_and_their_names(graph):
    assert by_output(linear_layers(graph)) == {
        "x": Layer("stem", "stem"),
        "block_09/x": Layer("block_00", "fc"),
        "y": Layer("block_01", "fc"),  # behind its pair
        "logits": Layer("head", "head"),
    }
    nodes = {node.outputs[0].name: node for node in graph}
    assert linear_weight(nodes["constant"]) is None and linear_weight(nodes["z"]) is None
    assert weight_name(linear_weight(nodes["y"])) == "block_1/fc/w"


def test_a_pair_stands_where_what_it_quantizes_does(graph):
    """An activation's says nothing by its name, a weight's is its weight's."""
    assert by_output(node_blocks(graph)) == {
        "x": None,
        **dict.fromkeys(("block_09/x", "block_09/x/quantized", "block_09/x/dequantized", "relu"), "block_00"),
        **dict.fromkeys(
            ("block_1/fc/w/quantized", "block_1/fc/w/dequantized", "y", "normed", "n", "sum", "back"), "block_01"
        ),
        "constant": None,
        "z": "block_01",  # the latest of those that feed it
        "logits": None,
    }


def test_a_nodes_own_name_goes_before_its_weights_and_what_feeds_it(graph):
    nodes = {node.outputs[0].name: node for node in graph}
    nodes["relu"].name, nodes["normed"].name, nodes["x"].name = (
        "Transformer/encoderblock_5/Relu",
        "Transformer/encoderblock_6/Mul",
        "stem",
    )
    blocks = by_output(node_blocks(graph))
    assert (blocks["relu"], blocks["normed"], blocks["x"], blocks["y"]) == ("block_05", "block_06", None, "block_01")


def test_names_by_which_a_pattern_may_mean_a_node(graph):
    for node in graph:
        node.name = f"node of {node.outputs[0].name}"
    names = by_output(names_by_node(graph, node_blocks(graph)))
    assert names["y"] == {"node of y", "y", "block_01", "block_01/fc", "block_1/fc/w"}
    assert names["normed"] == {"node of normed", "normed", "block_01", "block_01/norm", "block_1/norm/scale"}
    assert names["logits"] == {"node of logits", "logits", "head", "head/head", "head/w"}
    assert names["z"] == {"node of z", "z", "block_01"}


def test_activations_are_the_floats_that_depend_on_the_input(graph):
    """Not integers, not what is constant; the inputs first."""
    expected = ["images", "x", "block_09/x", "block_09/x/dequantized", "y", "relu", "normed", "back", "z", "logits"]
    assert activations(graph) == expected


def test_a_model_is_its_graph_and_the_files_of_its_weights(proto, tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        model = onnx.ModelProto()
        model.CopyFrom(proto)
        onnx.save(
            model, tmp_path / folder / "m.onnx", save_as_external_data=True, location="m.onnx.data", size_threshold=0
        )
    plain = tmp_path / "plain.onnx"
    onnx.save(proto, plain)
    assert hash_model(plain) == hashlib.sha256(hashlib.sha256(plain.read_bytes()).hexdigest().encode()).hexdigest()
    first, data = tmp_path / "one" / "m.onnx", tmp_path / "one" / "m.onnx.data"
    whole = hashlib.sha256(hashlib.sha256(first.read_bytes()).hexdigest().encode())
    whole.update(hashlib.sha256(data.read_bytes()).hexdigest().encode())  # once, however many weights lie in it
    assert hash_model(first) == hash_model(tmp_path / "two" / "m.onnx") == whole.hexdigest()
    data.write_bytes(data.read_bytes()[:-1] + b"\x7f")
    assert hash_model(first) != hash_model(tmp_path / "two" / "m.onnx")


def external(tmp_path):
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    (tmp_path / "w.data").write_bytes(array.tobytes())
    return array, ir.ExternalTensor(
        "w.data", 0, array.nbytes, ir.DataType.FLOAT, shape=ir.Shape((2, 3)), name="w", base_dir=tmp_path
    )


def test_a_weight_is_let_go_of_once_it_is_read(tmp_path):
    array, tensor = external(tmp_path)
    assert read_weight(tensor, lambda weight: weight.sum()) == array.sum() and tensor.raw is None
    mine = tensor.numpy()  # a view of the mapping, which others' reading must not take away
    assert read_weight(tensor, np.sum) == array.sum() and tensor.raw is not None and np.array_equal(mine, array)
    assert read_weight(ir.tensor(array, name="w"), np.sum) == array.sum()


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_what_ends_the_reading_of_a_weight_is_told_as_it_is(tmp_path, error):
    """Its traceback still holds the weight: to let go of that too was another error, and Ctrl-C a traceback."""

    def read(weight):
        raise error

    with pytest.raises(error):
        read_weight(external(tmp_path)[1], read)


def test_a_weight_that_is_computed_when_it_is_read(tmp_path):
    array, tensor = external(tmp_path)
    calls = []
    made = derived(
        tensor, ir.DataType.FLOAT16, lambda weight: calls.append(1) or (weight / 4).astype(np.float16), "w/half"
    )
    assert (made.name, made.dtype, tuple(made.shape), calls) == ("w/half", ir.DataType.FLOAT16, (2, 3), [])
    assert np.array_equal(made.numpy(), (array / 4).astype(np.float16)) and calls == [1] and tensor.raw is None


def test_a_registered_weight(graph):
    value = initializer(graph, ir.tensor(np.zeros((2, 3), np.float16), name="new"))
    assert graph.initializers["new"] is value and value.is_initializer()
    assert (value.dtype, tuple(value.shape)) == (ir.DataType.FLOAT16, (2, 3))


def test_what_only_moves_holds_the_numbers_of_what_it_moves():
    """Also through two of them; a part of a tensor has another range, and a sum has other numbers."""
    text = """<ir_version: 10, opset_import: ["" : 20]>
    g (float[N, 4] x) => (float[N, 4] y) <int64[2] shape = {-1, 2}, int64[1] zero = {0}, int64[1] one = {1}> {
        a = Reshape (x, shape) b = Transpose <perm = [1, 0]> (a) c = Slice (b, zero, one) d = Relu (b)
        e = Identity (d) y = Reshape (e, shape) }"""
    graph = ir.from_proto(onnx.parser.parse_model(text)).graph
    assert moved(graph) == {"a": "x", "b": "x", "e": "d", "y": "d"}
