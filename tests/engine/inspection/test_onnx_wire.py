"""The reader without onnx against the onnx package, on graphs of every kind that we write, and on damaged files."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from vit_convert.core.errors import BuildError
from vit_convert.engine.inspection.onnx_wire import DTYPES, Value, read_graph


def as_onnx_has_it(value):
    tensor = value.type.tensor_type
    sides = [side.dim_value if side.HasField("dim_value") else side.dim_param or "?" for side in tensor.shape.dim]
    return Value(DTYPES[tensor.elem_type], tuple(sides) if tensor.HasField("shape") else None)


def compare_with_onnx(path):
    proto = onnx.load(path, load_external_data=False)
    graph, found = proto.graph, read_graph(path)
    assert found.opsets == {opset.domain: opset.version for opset in proto.opset_import}
    assert found.metadata == {prop.key: prop.value for prop in proto.metadata_props}
    assert [(n.name, n.op, n.domain, list(n.inputs), list(n.outputs)) for n in found.nodes] == [
        (n.name, n.op_type, n.domain, list(n.input), list(n.output)) for n in graph.node
    ]
    for ours, theirs in zip(found.nodes, graph.node):
        for attribute in theirs.attribute:
            value = helper.get_attribute_value(attribute)
            if isinstance(value, int | float | bytes):
                assert ours.attributes[attribute.name] == (value.decode() if isinstance(value, bytes) else value)
            elif attribute.type == onnx.AttributeProto.INTS:
                assert ours.attributes[attribute.name] == list(value)
    for value in (*graph.value_info, *graph.input, *graph.output):
        assert found.value(value.name) == as_onnx_has_it(value), value.name
    for tensor in graph.initializer:
        assert found.value(tensor.name) == Value(DTYPES[tensor.data_type], tuple(tensor.dims)), tensor.name
        if tensor.HasField("raw_data"):
            assert found.constants[tensor.name] == tensor.raw_data
    assert found.weights == {tensor.name for tensor in graph.initializer}
    assert [*found.inputs, *found.outputs] == [value.name for value in (*graph.input, *graph.output)]


def test_a_bundles_graphs(bundle_path):
    graphs = sorted(bundle_path.rglob("*.onnx"))
    assert len(graphs) > 1
    for path in graphs:
        compare_with_onnx(path)


def test_every_type_and_attribute(tmp_path):
    """A model of ours has few of them."""
    types = [kind for name, kind in TensorProto.DataType.items() if kind in DTYPES and name != "STRING"]
    ends = [helper.make_tensor_value_info(f"x{kind}", kind, ["n", None, 3]) for kind in types]
    node = helper.make_node(
        "Thing", ["x1"], ["y"], name="a", domain="mine", number=-3, part=0.25, word="grüße", list=[1, -2, 1 << 40]
    )
    weight = numpy_helper.from_array(np.arange(6, dtype=np.float16).reshape(2, 3), "w")
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph([node], "g", ends, [output], [weight])
    function = helper.make_function("ours", "F", ["a"], ["b"], [], [helper.make_opsetid("", 20)])
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("mine", 1), helper.make_opsetid("ours", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, functions=[function]), tmp_path / "all.onnx")
    compare_with_onnx(tmp_path / "all.onnx")
    found = read_graph(tmp_path / "all.onnx")
    assert found.functions == {("ours", "F")} and found.value("y") == Value("float32", None)


def test_types_are_called_as_onnx_and_ml_dtypes_call_them():
    for kind, name in DTYPES.items():
        if kind not in (TensorProto.STRING, TensorProto.UINT4, TensorProto.INT4, TensorProto.FLOAT4E2M1):
            assert name == helper.tensor_dtype_to_np_dtype(kind).name
    packed = {"uint4": TensorProto.UINT4, "int4": TensorProto.INT4, "float4_e2m1": TensorProto.FLOAT4E2M1}
    assert {name: DTYPES[kind] for name, kind in packed.items()} == {name: name for name in packed}
    assert max(DTYPES) == 23 and len(DTYPES) == 23


def test_fields_that_nothing_asks_for_are_passed(tmp_path):
    """Of each wire type: a later version of ONNX may add some, of 8 and 4 bytes too."""
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"], name="r")], "g", ends[:1], ends[1:])
    plain = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]).SerializeToString()
    number = bytes([0xC0, 0x06])  # the tag of field 104, wire type 0
    unknown = [
        bytes([0xC0, 0x06, 0x96, 0x01]),
        bytes([0xC1, 0x06, *range(8)]),
        bytes([0xC2, 0x06, 3, *b"abc"]),
        bytes([0xC5, 0x06, *range(4)]),
    ]
    path = tmp_path / "m.onnx"
    path.write_bytes(plain)
    expected = read_graph(path)
    for more in unknown:
        path.write_bytes(more + plain)
        assert read_graph(path) == expected
        path.write_bytes(plain + more[:-1])  # cut short
        with pytest.raises(BuildError, match="not an ONNX file"):
            read_graph(path)
    path.write_bytes(plain + number + b"\xff" * 9 + b"\x01")  # a number of 64 bits, and one of more
    assert read_graph(path) == expected
    path.write_bytes(plain + number + b"\xff" * 11)
    with pytest.raises(BuildError, match="not an ONNX file"):
        read_graph(path)
    path.write_bytes(plain + bytes([0xC3, 0x06]))  # a group, which ONNX has never had
    with pytest.raises(BuildError, match="wire type 3"):
        read_graph(path)


@pytest.mark.parametrize(
    ("value", "sizes", "expected"),
    [
        (Value("float32", ("batch", 3, 5)), {"batch": 7}, 7 * 3 * 5 * 4),
        (Value("float16", ("batch", 3)), {}, 6),
        (Value("int4", (5,)), {}, 3),
        (Value("bool", ()), {}, 1),
        (Value("int64", (2, 2)), {}, 32),
        (Value("float32", None), {}, 0),
    ],
)
def test_bytes(value, sizes, expected):
    assert value.num_bytes(sizes) == expected


def test_what_is_no_graph(tmp_path, bundle_path):
    path = tmp_path / "bad.onnx"
    with pytest.raises(BuildError, match="cannot be read"):
        read_graph(path)
    whole = (bundle_path / "model.onnx").read_bytes()
    for content in (b"", b"not a protobuf at all", whole[: len(whole) // 2], b"\x08\x07", b"\xff" * 40):
        path.write_bytes(content)
        with pytest.raises(BuildError, match=r"bad\.onnx: (not an ONNX file|holds no graph|cannot be read)"):
            read_graph(path)
