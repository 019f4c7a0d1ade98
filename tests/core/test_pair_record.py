"""`pair.json`: what it may say, and what is refused of it."""

import numpy as np
import pytest

from vit_convert.core.errors import UsageError
from vit_convert.core.pair import PairFacts, is_pair, read_pair, wrong_ids

GOOD = '{"logit_scale": 100.0, "logit_bias": null, "similarity": "softmax", "text": {}}'


@pytest.mark.parametrize(
    ("content", "bias", "similarity"),
    [(GOOD, None, "softmax"), (GOOD.replace("null", "-10.5").replace("softmax", "sigmoid"), -10.5, "sigmoid")],
)
def test_what_it_says(tmp_path, content, bias, similarity):
    assert not is_pair(tmp_path)
    (tmp_path / "pair.json").write_text(content)
    assert is_pair(tmp_path)
    found = read_pair(tmp_path)
    assert found == PairFacts(100.0, bias, similarity, {}) and (found.classes, found.templates) == (0, 0)
    (tmp_path / "pair.json").write_text(content.replace("{}", '{}, "classes": 3, "templates": 2'))
    assert (read_pair(tmp_path).classes, read_pair(tmp_path).templates) == (3, 2)


@pytest.mark.parametrize("key", ["logit_scale", "logit_bias", "similarity", "text"])
def test_keys_that_are_missing(tmp_path, key):
    (tmp_path / "pair.json").write_text(GOOD.replace(f'"{key}"', '"other"'))
    with pytest.raises(UsageError, match=rf"pair\.json: not the record of a pair \({key} not in it\)"):
        read_pair(tmp_path)


@pytest.mark.parametrize(
    ("old", "new"),
    [("100.0", "NaN"), ("100.0", "Infinity"), ("100.0", '"many"'), ("null", "NaN"), ("null", "-Infinity"),
     ("softmax", "cosine"), ("{}", "7")],
)  # fmt: skip
def test_values_that_are_none(tmp_path, old, new):
    (tmp_path / "pair.json").write_text(GOOD.replace(old, new))
    with pytest.raises(UsageError, match=r"pair\.json"):
        read_pair(tmp_path)


@pytest.mark.parametrize("content", [None, "", "[]", "7", "{}", '"text"', "[" * 100_000, '{"logit_scale": 1'])
def test_files_that_are_none(tmp_path, content):
    if content is not None:
        (tmp_path / "pair.json").write_text(content)
    with pytest.raises(UsageError, match=r"pair\.json"):
        read_pair(tmp_path)


@pytest.mark.parametrize(
    ("ids", "rule", "said"),
    [
        (np.zeros((0, 300), np.int64), {"length": 300}, ""),
        (np.full((2, 300), 8), {"length": 300}, ""),
        (np.full((2, 299), 8), {"length": 300}, "ids [2, 299], the model takes [texts, 300]"),
        (np.full(3, 8), {}, "ids [3], the model takes [texts, 3]"),
        (np.full((2, 3), 9), {}, "ids 9 to 9, the model has 9 tokens"),
        (np.full((2, 3), -1), {}, "ids -1 to -1, the model has 9 tokens"),
        (np.full((2, 3), 8), {"tokenizer": "clip", "end": 8}, ""),
        (np.array([[8, 1, 1], [1, 1, 1]]), {"tokenizer": "clip", "end": 8}, "text 1 has no end token (8), at which"),
        (np.array([[1, 1, 1], [8, 1, 1]]), {"tokenizer": "clip", "end": 0}, "text 0 has no end token (0), at which"),
        (np.full((2, 3), 1), {"tokenizer": "clip", "end": -1}, ""),
        (np.full((2, 3), 1), {"tokenizer": "clip"}, ""),
        (np.full((2, 3), 1), {"tokenizer": "wordpiece", "end": 8}, ""),  # it pools elsewhere
    ],
)
def test_ids_that_a_text_tower_takes(ids, rule, said):
    found = wrong_ids(ids, {"length": 3, "vocabulary": 9, **rule})
    assert found.startswith(said) and bool(found) is bool(said)
