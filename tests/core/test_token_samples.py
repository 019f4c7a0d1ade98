"""Texts that no one wrote: tokens where a tokenizer puts them, for every use of special tokens."""

import itertools

import numpy as np
import pytest

from vit_convert.core.signature import Tensor
from vit_convert.core.token_samples import sample_texts

# a start, an end and what fills up; -1 for none; the last two are one
SPECIAL = [*itertools.product((-1, 0, 8), (-1, 9), (-1, 5)), (0, 9, 9), (-1, 9, 9)]


@pytest.mark.parametrize(("start", "end", "pad"), [row for row in SPECIAL if row[2] >= 0])
def test_where_each_token_stands(start, end, pad):
    tensor = Tensor("tokens", "int32", ("batch", 12), below=10, start=start, end=end, pad=pad)
    found = sample_texts(tensor, 200, np.random.default_rng(3))
    assert found.dtype == np.int32 and found.shape == (200, 12)
    lengths = set()
    for text in found.tolist():
        if start >= 0:
            assert text.pop(0) == start
        words = list(itertools.takewhile(lambda token: token not in (end, pad), text))
        rest = text[len(words) :]
        if end >= 0:
            assert rest.pop(0) == end
        assert set(rest) <= {pad}
        assert words and not {*words} & {start, end, pad} and min(words) >= 0 and max(words) < 10
        lengths.add(len(words))
    longest = 12 - (start >= 0) - (end >= 0)
    assert lengths == set(range(1, longest + 1))  # from one word to as many as there is room for


def test_all_words_and_no_others_are_drawn():
    tensor = Tensor("tokens", "int64", ("batch", 8), below=10, start=2, end=5, pad=0)
    found = sample_texts(tensor, 400, np.random.default_rng(0))
    assert found.dtype == np.int64 and set(np.unique(found)) == set(range(10))
    words, counts = np.unique(found, return_counts=True)
    plain = counts[~np.isin(words, (0, 2, 5))]
    assert plain.max() < 1.3 * plain.min()  # 200 of each on average, one in a hundred is 36 off


def test_one_seed_one_text():
    tensor = Tensor("tokens", "int32", ("batch", 6), below=30, pad=0)
    first, second, other = (sample_texts(tensor, 4, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert (first == second).all() and (first != other).any()
