"""Token ids of prompts against transformers' tokenizers, from the same tiny files."""

import pytest

from vit_convert.text.prompting import Prompting
from vit_convert.text.tokenizer import open_tokenizer

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
sentencepiece = pytest.importorskip("sentencepiece", reason="the extra `text` is not installed")

PROMPTS = ["a photo of a cat", "Two DOGS and one cat in a photo of a photo of a dog", "cat", "it's   a dog's photo"]
LENGTH = 10


def test_siglips(tmp_path):
    """transformers takes punctuation out as well, as the evaluation of the paper did; the first three have none."""
    (tmp_path / "text.txt").write_text("a photo of a cat\na photo of a dog\ntwo dogs and one cat in a photo\n" * 20)
    options = {"vocab_size": 40, "pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, "hard_vocab_limit": False}
    place = str(tmp_path / "spiece")
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"), model_prefix=place, minloglevel=2, num_threads=1, **options
    )
    theirs = transformers.SiglipTokenizer(f"{place}.model")
    expected = theirs(PROMPTS[:3], padding="max_length", truncation=True, max_length=LENGTH)["input_ids"]
    rule = Prompting("sentencepiece", LENGTH, 1000, start=-1, end=1, pad=1, lower=True, sticky_end=True)
    assert open_tokenizer(f"{place}.model", rule)(PROMPTS[:3]).tolist() == expected


def test_clips(tmp_path):
    merges = ["c a", "ca t</w>", "d o", "do g", "p h", "ph o", "t o</w>", "pho to</w>"]
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    size = 512 + len(merges) + 2
    rule = Prompting("clip", LENGTH, size, start=size - 2, end=size - 1, pad=0, lower=True, sticky_end=True)
    ours = open_tokenizer(tmp_path / "merges.txt", rule)
    from vit_convert.text.tokenizer import _ids_of_merges

    pairs = [tuple(merge.split()) for merge in merges]
    theirs = transformers.CLIPTokenizer(vocab=_ids_of_merges(pairs), merges=pairs)
    for prompt, row in zip(PROMPTS, ours(PROMPTS).tolist()):
        expected = theirs(prompt, truncation=True, max_length=LENGTH)["input_ids"]
        assert row == expected + [0] * (LENGTH - len(expected))


def test_berts(tmp_path):
    """LiT leaves BERT's last mark out."""
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "a",
        "photo",
        "of",
        "cat",
        "dog",
        "##s",
        "'",
        "s",
        "it",
        "two",
    ]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    rule = Prompting("bert", LENGTH, len(words), start=2, end=-1, pad=0, lower=True, sticky_end=False)
    theirs = transformers.BertTokenizer(vocab={word: i for i, word in enumerate(words)})
    expected = [
        ([2, *theirs(prompt, add_special_tokens=False)["input_ids"]] + [0] * LENGTH)[:LENGTH] for prompt in PROMPTS
    ]
    assert open_tokenizer(tmp_path / "vocab.txt", rule)(PROMPTS).tolist() == expected
