"""Lengths of texts as people write them, and texts that are cut."""

import numpy as np
import pytest

from vit_convert.core.errors import UsageError
from vit_convert.core.image_size import ImageRange
from vit_convert.core.signature import Tensor
from vit_convert.core.text_length import (
    TextRange,
    optimal_of,
    parse_text_length,
    shortened,
    sides_of,
    varies,
    wrong_lengths,
)

RANGE = TextRange((8,), (16,), (77,))


@pytest.mark.parametrize(
    ("written", "read"),
    [
        (None, None),
        ("", None),
        (32, 32),
        (" 32 ", 32),
        ("dynamic:8..77@16", RANGE),
        ("dynamic: 8 .. 77 @ 16", RANGE),
        ("dynamic:8..77", TextRange((8,), (77,), (77,))),
        ("dynamic:2..3", TextRange((2,), (3,), (3,))),
    ],
)
def test_reads(written, read):
    assert parse_text_length(written) == read


@pytest.mark.parametrize(
    "written",
    [True, 1, 0, -8, 7.5, "8..77", "32@16", "dynamic:77", "dynamic:77..8", "dynamic:8..8", "dynamic:1..8",
     "dynamic:8..77@4", "dynamic:8..77@78", "dynamic:8..99999", 99999, (8, 77), "dynamic:8..77@"],
)  # fmt: skip
def test_refuses(written):
    with pytest.raises(UsageError, match="text_length"):
        parse_text_length(written)


def test_three_lengths_are_checked_each_once():
    assert RANGE.sizes() == [(16,), (8,), (77,)]
    assert TextRange((8,), (77,), (77,)).sizes() == [(77,), (8,)]
    assert TextRange.from_dict(RANGE.to_dict()) == RANGE


def test_sides_by_the_name_that_a_signature_has():
    images = ImageRange((32, 48), (64, 64), (96, 128))
    assert sides_of(images, "largest") == {"height": 96, "width": 128} and optimal_of(images) == (64, 64)
    assert sides_of(RANGE, "smallest") == {"length": 8} and optimal_of(RANGE) == (16,)
    assert sides_of((), "largest") == {} and optimal_of((32, 32)) == (32, 32)
    assert varies(images) and varies(RANGE) and not varies(()) and not varies((32, 32))


def test_texts_of_other_lengths_are_named():
    said = wrong_lengths(RANGE, {"tokens": np.ones((2, 7))})
    assert said == "tokens [2, 7]: texts of 7 tokens, the model takes 8 to 77"
    assert "80 tokens" in wrong_lengths(RANGE, {"tokens": np.ones((2, 80))}) and wrong_lengths(RANGE, {"t": np.ones(8)})
    assert not any(wrong_lengths(RANGE, {"tokens": np.ones((2, length))}) for length in (8, 9, 77))
    assert not wrong_lengths((), {"tokens": np.ones((2, 99))})


def test_a_text_that_is_cut_keeps_its_end():
    tokens = np.array([[8, 1, 2, 3, 9], [8, 1, 9, 9, 9], [8, 1, 2, 9, 0], [8, 9, 0, 0, 0]])
    ends = Tensor("tokens", "int32", ("batch", 5), below=10, start=8, end=9, pad=0)
    assert shortened(ends, tokens, 3).tolist() == [[8, 1, 9], [8, 1, 9], [8, 1, 9], [8, 9, 0]]
    endless = Tensor("tokens", "int32", ("batch", 5), below=10, pad=0)
    assert shortened(endless, tokens, 2).tolist() == [[8, 1], [8, 1], [8, 1], [8, 9]]
    assert shortened(ends, tokens, 5).tolist() == tokens.tolist()
