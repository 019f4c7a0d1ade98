"""Rows are gathered by indices of 32 bits as they come."""

import numpy as np
import pytest
from export_graphs import declined, graph, ops, run

from vit_convert.export.rules.gather import GatherByInt32
from vit_convert.export.rules.rule import apply_rule

TABLE = np.arange(24, dtype=np.float32).reshape(4, 6)


def gathered(index="int32", to=7, attributes=""):
    """From a table [4, 6]; 7 is ONNX's number for int64, 6 for int32."""
    return f"""g (float[4, 6] x, {index}[2] i) => (float[a, b] y) {{
        w = Cast <to = {to}> (i) y = Gather {attributes} (x, w) }}"""


@pytest.mark.parametrize("opset", [17, 20])
@pytest.mark.parametrize(("attributes", "axis"), [("", 0), ("<axis = 0>", 0), ("<axis = 1>", 1), ("<axis = -1>", 1)])
def test_the_cast_goes_and_the_axis_stays(opset, attributes, axis):
    model = graph(gathered(attributes=attributes), opset)
    assert apply_rule(GatherByInt32(), model).applied == 1 and ops(model) == ["Gather"]
    index = np.array([3, 1], np.int32)
    (rows,) = run(model, {"x": TABLE, "i": index})
    np.testing.assert_array_equal(rows, np.take(TABLE, index, axis))


@pytest.mark.parametrize(("index", "why"), [("uint8", "the index is UINT8, not INT32"), ("int16", "INT16, not INT32")])
def test_other_indices_keep_their_cast(index, why):
    assert why in declined(gathered(index), GatherByInt32())


def test_a_cast_to_another_type_is_nothing_to_report():
    assert declined(gathered("int64", to=6), GatherByInt32()) == ""
    assert declined(gathered("int32", to=6), GatherByInt32()) == ""
