"""Which constants are the mask under which a token attends to itself and those before it."""

import numpy as np
import onnx_ir as ir
import pytest

from vit_convert.export.passes.attention_plugin import _is_causal

LATER = np.triu(np.full((1, 1, 5, 5), -1e4, np.float32), 1)


@pytest.mark.parametrize(
    ("mask", "causal"),
    [
        (LATER, True),
        (np.where(LATER < 0, -np.inf, 0).astype(np.float32), True),
        (np.triu(LATER, 2), False),  # the next token is seen
        (LATER - np.eye(5, dtype=np.float32) * 1e4, False),  # a token does not see itself
        (LATER + np.tril(np.full((5, 5), -1e4, np.float32), -1), False),
        (LATER.transpose(0, 1, 3, 2).copy(), False),
        (LATER * 1e-4, False),  # which only makes later tokens less likely
        (LATER[:, :, :4], False),
        (LATER[0], False),
        (np.concatenate([LATER, LATER]), False),
        (np.concatenate([LATER, LATER], axis=1), False),
        (np.zeros((1, 1, 5, 5), np.float32), False),
        (None, False),
    ],
)
def test_what_is_a_causal_mask(mask, causal):
    value = ir.Value(name="mask", const_value=None if mask is None else ir.tensor(mask))
    assert _is_causal(value) is causal and _is_causal(None) is False
