"""Prompts, classes and templates as people write them, and ids in an .npy."""

import dataclasses

import numpy as np
import pytest

from vit_convert.core.errors import CalibrationError, UsageError
from vit_convert.text import files
from vit_convert.text.prompting import Prompting
from vit_convert.text.prompts import filled, read_classes, read_prompts, read_templates
from vit_convert.text.tokens import fingerprint, read_tokens

RULE = Prompting("clip", 4, 50, start=48, end=49, pad=0, lower=True, sticky_end=True)
ANY = dataclasses.replace(RULE, tokenizer="sentencepiece")  # of a model that does without an end


def test_prompts_are_lines(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa cat \r\n\r\n  ein Äffchen\n".encode())
    assert read_prompts(path) == ["a cat", "ein Äffchen"]


def test_classes_are_lines_in_the_order_of_their_numbers(tmp_path):
    path = tmp_path / "classes.txt"
    path.write_text("cat\nguinea pig\n")
    assert read_classes(path) == ["cat", "guinea pig"]
    for text, said in (
        ("cat\n\ndog\n", "line 2 is empty"),
        ("cat\ndog\ncat\n", "line 3 is 'cat' for a second time"),
        ("", "no line in it"),
    ):
        path.write_text(text)
        with pytest.raises(CalibrationError, match=said):
            read_classes(path)


def test_templates_are_filled_class_by_class(tmp_path):
    (tmp_path / "templates.txt").write_text("a {}.\n{} and {}\n")
    templates = read_templates([str(tmp_path / "templates.txt"), "the {}"])
    assert filled(["cat", "dog"], templates) == ["a cat.", "cat and cat", "the cat", "a dog.", "dog and dog", "the dog"]
    assert read_templates(()) == ["{}"]
    with pytest.raises(UsageError, match=r"template 'a photo': no \{\} in it"):
        read_templates(["a photo"])
    with pytest.raises(UsageError, match="at most 4,194,304 prompts"):
        filled(["x"] * 5000, ["{}"] * 1000)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\xff\xfe\x00", "not text"),
        (b"a" * 20000, "line 1 is not a line of text"),
        (b"a\0b", "not a line of text"),
        (b"\n\n", "no line in it"),
    ],
)
def test_files_that_are_no_prompts(tmp_path, content, said):
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    with pytest.raises(CalibrationError, match=said) as raised:
        read_prompts(path)
    assert raised.value.exit_code == 6


def test_files_that_are_too_large_or_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LARGEST_BYTES", 10)
    (tmp_path / "large.txt").write_bytes(b"a\n" * 6)
    for path, said in (
        (tmp_path / "large.txt", "more than 10 bytes"),
        (tmp_path / "none.txt", "No such file"),
        (tmp_path, "a folder"),
    ):
        with pytest.raises(CalibrationError, match=said):
            read_prompts(path)


def test_a_small_file_that_inflates_to_a_large_one(tmp_path):
    import gzip

    (tmp_path / "bomb.gz").write_bytes(gzip.compress(bytes(files.LARGEST_BYTES + 1)))
    with pytest.raises(CalibrationError, match="more than"):
        files.read_bytes(tmp_path / "bomb.gz", "tokenizer")


def test_ids_in_an_npy(tmp_path):
    path = tmp_path / "ids.npy"
    for ids in (
        np.arange(8, dtype=np.uint16).reshape(2, 4),
        np.asfortranarray(np.arange(8, dtype=np.int64).reshape(2, 4)),
    ):
        np.save(path, ids)
        found = read_tokens(path, ANY)
        assert found.dtype == np.int32 and found.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        (np.zeros((2, 5), np.int32), r"int32 \[2, 5\], needed are integers \[prompts, 4\]"),
        (np.zeros((2, 4), np.float32), "float32"),
        (np.zeros((0, 4), np.int32), r"\[0, 4\]"),
        (np.full((1, 4), 50), "ids 50 to 50, the model has 50 tokens"),
        (np.full((1, 4), -1), "ids -1"),
        (np.array([{}]), "object"),
    ],
)
def test_ids_that_are_not_the_models(tmp_path, ids, said):
    np.save(tmp_path / "ids.npy", ids, allow_pickle=True)
    with pytest.raises(CalibrationError, match=said):
        read_tokens(tmp_path / "ids.npy", RULE)


def test_a_text_without_an_end_where_its_embedding_is_taken_there(tmp_path):
    """Of nothing the embedding is 0 / 0; a tower that pools elsewhere does without."""
    np.save(tmp_path / "ids.npy", [[48, 3, 49, 0], [48, 3, 4, 5]])
    with pytest.raises(CalibrationError, match=r"text 1 has no end token \(49\)"):
        read_tokens(tmp_path / "ids.npy", RULE)
    assert read_tokens(tmp_path / "ids.npy", ANY).shape == (2, 4)


def test_ids_of_many_prompts_and_of_none(tmp_path):
    ids = np.random.default_rng(0).integers(0, 50, (100, 4), np.int32)
    np.save(tmp_path / "ids.npy", ids)
    np.testing.assert_array_equal(read_tokens(tmp_path / "ids.npy", ANY), ids)
    with pytest.raises(CalibrationError, match=r"tokens .*none\.npy: No such file or directory$"):
        read_tokens(tmp_path / "none.npy", ANY)


@pytest.mark.parametrize("cut", [0, 5, 100, -1])
def test_an_npy_that_is_cut(tmp_path, cut):
    np.save(tmp_path / "ids.npy", np.ones((3, 4), np.int32))
    content = (tmp_path / "ids.npy").read_bytes()
    (tmp_path / "ids.npy").write_bytes(content[:cut])
    with pytest.raises(CalibrationError, match=r"ids\.npy"):
        read_tokens(tmp_path / "ids.npy", RULE)


def test_the_fingerprint_changes_with_the_content(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    before = fingerprint(tmp_path / "a.txt")
    assert fingerprint(tmp_path / "a.txt") == before
    (tmp_path / "a.txt").write_text("b")
    assert fingerprint(tmp_path / "a.txt") != before
    with pytest.raises(CalibrationError, match="No such file"):
        fingerprint(tmp_path / "none")


REFUSED = [{"tokenizer": "nltk"}, {"length": 1}, {"pad": -1}, {"end": 50}, {"start": -2}, {"end": -2}, {"pad": 50}]


@pytest.mark.parametrize("change", REFUSED)
def test_rules_that_are_not_offered(change):
    with pytest.raises(UsageError, match="not offered"):
        Prompting(**{**RULE.to_dict(), **change})


@pytest.mark.parametrize("change", [{"start": -1, "end": -1}, {"length": 2}, {"pad": 49}, {"start": 0}])
def test_rules_that_are(change):
    assert Prompting(**{**RULE.to_dict(), **change}).to_dict() == {**RULE.to_dict(), **change}


@pytest.mark.parametrize(
    ("change", "ids", "fitted"),
    [
        ({}, [], [48, 49, 0, 0]),
        ({}, [5], [48, 5, 49, 0]),
        ({}, [5, 6], [48, 5, 6, 49]),
        ({}, [5, 6, 7], [48, 5, 6, 49]),  # one too many: the last makes room for the end
        ({}, [5, 6, 7, 8, 9], [48, 5, 6, 49]),
        ({"length": 5}, [5, 6, 7, 8], [48, 5, 6, 7, 49]),
        ({"sticky_end": False}, [5, 6], [48, 5, 6, 49]),
        ({"sticky_end": False}, [5, 6, 7], [48, 5, 6, 7]),
        ({"end": -1}, [5], [48, 5, 0, 0]),
        ({"end": -1}, [5, 6, 7, 8], [48, 5, 6, 7]),
        ({"start": -1}, [5, 6, 7], [5, 6, 7, 49]),
        ({"start": -1}, [5, 6, 7, 8], [5, 6, 7, 49]),
        ({"start": -1, "end": -1}, [], [0, 0, 0, 0]),
        ({"start": 0, "end": 0, "pad": 3}, [5], [0, 5, 0, 3]),
    ],
)
def test_prompts_are_brought_to_the_models_length(change, ids, fitted):
    assert Prompting(**{**RULE.to_dict(), **change}).fit(ids) == fitted


@pytest.mark.parametrize(
    ("tokenizer", "lower", "lowered"),
    [
        ("sentencepiece", True, "ein Äu\u0308"),
        ("clip", True, "ein ä\xfc"),
        ("bert", True, "ein ä\xfc"),
        ("clip", False, "EIN ÄU\u0308"),
    ],
)
def test_letters(tokenizer, lower, lowered):
    """SentencePiece lowers ASCII alone; the others bring letters and their accents together first."""
    rule = Prompting(**{**RULE.to_dict(), "tokenizer": tokenizer, "lower": lower})
    assert rule.lowered("EIN ÄU\u0308") == lowered


def test_a_rule_is_read_back():
    assert Prompting.from_dict({**RULE.to_dict(), "similarity": "softmax"}) == RULE == Prompting.of(RULE)
