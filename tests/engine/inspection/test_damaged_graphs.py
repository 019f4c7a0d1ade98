"""Inspection of files that no exporter would write: read or refused, never a traceback and never a hang."""

import onnx
import pytest
from graphs_by_hand import graph, node
from onnx import helper

from vit_convert.core.errors import BuildError
from vit_convert.engine.inspection.estimate import estimate
from vit_convert.engine.inspection.findings import findings
from vit_convert.engine.inspection.fusions import fusions
from vit_convert.engine.inspection.onnx_wire import read_graph


@pytest.mark.parametrize(
    "op",
    ["QuantizeLinear", "DequantizeLinear", "LayerNormalization", "Attention", "Conv", "Einsum", "ReduceMean", "Softmax",
     "Erf", "Tanh", "Sqrt", "MatMul", "Reshape", "Identity", "Constant"],
)  # fmt: skip
def test_nodes_without_inputs_or_outputs(op):
    for inputs, outputs in (("", ""), ("x", ""), ("", "y")):
        found = graph(node(op, inputs, outputs))
        for target in ("trt8", "rtx"):
            findings(found, target)
            fusions(found, target)
        estimate(found, {})


def test_a_graph_that_leads_in_a_circle_is_left():
    circle = [node("Identity", "b", "a"), node("Identity", "a", "b"), node("Softmax", "a", "p"), node("Sqrt", "b", "r")]
    assert fusions(graph(*circle), "rtx") == []
    onward = [node("MatMul", "q k", "r"), node("Softmax", "r", "p"), node("Identity", "p", "p")]
    assert fusions(graph(*onward), "rtx") == []


def test_a_file_with_any_byte_changed_is_read_or_refused(tmp_path):
    """A tag that says that a number follows where a message belongs, among all others."""
    x, y = (helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", 2]) for name in "xy")
    made = helper.make_node("mine", ["x", "w"], ["y"], name="n", a=1, b=0.5, c="t", d=[1, 2])
    weight = helper.make_tensor("w", onnx.TensorProto.INT8, [2], b"\1\2", raw=True)
    small = helper.make_graph([made], "g", [x], [y], [weight])
    function = helper.make_function("m", "F", ["a"], ["b"], [], [helper.make_opsetid("", 20)])
    model = helper.make_model(small, functions=[function], opset_imports=[helper.make_opsetid("", 17)])
    helper.set_model_props(model, {"key": "value"})
    whole, path, refused = model.SerializeToString(), tmp_path / "m.onnx", 0
    for place in range(len(whole)):
        for change in (1, 2, 7, 8, 16, 128):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ change]) + whole[place + 1 :])
            try:
                found = read_graph(path)
            except BuildError:
                refused += 1
                continue
            findings(found, "trt8")
            estimate(found, {"n": 3})
    assert 0 < refused < 6 * len(whole)
