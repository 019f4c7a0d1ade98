"""Indices of 32 bits are not widened before a Gather."""

import numpy as np
import pytest
from export_graphs import declined, graph, ops, run

from vit_convert.export.rules.gather import GatherByInt32
from vit_convert.export.rules.rule import apply_rule

WORDS = """g (int32[n, 3] tokens) => (float[n, 3, 2] y) <float[4, 2] table = {0, 1, 2, 3, 4, 5, 6, 7}> {
    wide = Cast <to = 7> (tokens) y = Gather <axis = 0> (table, wide) }"""


@pytest.mark.parametrize("opset", [17, 20])
def test_int32_indices_are_taken_as_they_are(opset):
    model = graph(WORDS, opset)
    assert apply_rule(GatherByInt32(), model).applied == 1 and ops(model) == ["Gather"]
    (found,) = run(model, {"tokens": np.array([[3, 0, 1]], np.int32)})
    np.testing.assert_array_equal(found, [[[6, 7], [0, 1], [2, 3]]])


def test_other_indices_are_declined():
    assert declined(WORDS.replace("int32[n, 3]", "float[n, 3]"), GatherByInt32()) == "the index is FLOAT, not INT32"


def test_other_casts_do_not_match():
    assert declined(WORDS.replace("int32[n, 3]", "int64[n, 3]").replace("to = 7", "to = 6"), GatherByInt32()) == ""
