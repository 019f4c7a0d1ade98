"""Tokenizers of each kind from tiny files, held against the published algorithms written out, and files that are
none."""

import gzip
import itertools
import json
import re
import sys

import numpy as np
import pytest

from vit_convert.core.errors import CalibrationError, UsageError
from vit_convert.text.prompting import Prompting
from vit_convert.text.tokenizer import _damage, open_tokenizer
from vit_convert.text.tokens import read_tokens, tokens_of

pytest.importorskip("tokenizers", reason="the extra `text` is not installed")
sentencepiece = pytest.importorskip("sentencepiece", reason="the extra `text` is not installed")

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "photo", "of", "cat", "##s", "##al", "##og", ",", "e", "##s", "uber"]
BERT = Prompting("bert", 6, len(WORDS), start=2, end=-1, pad=0, lower=True, sticky_end=False)
MERGES = [
    ("c", "a"),
    ("ca", "t</w>"),
    ("a", "t</w>"),
    ("o", "f</w>"),
    ("p", "h"),
    ("ph", "o"),
    ("t", "o</w>"),
    ("pho", "to</w>"),
]
CLIP_WORDS = 512 + len(MERGES) + 2
CLIP = Prompting("clip", 8, CLIP_WORDS, start=CLIP_WORDS - 2, end=CLIP_WORDS - 1, pad=0, lower=True, sticky_end=True)
PROMPTS = ["A photo of CATS, catal", "cat's  phot0\tof é", "dog", "", "photo " * 9, "à la"]


@pytest.fixture(scope="module")
def siglip(tmp_path_factory):
    """A SentencePiece model of a few sentences, with the ids that T5's vocabularies have: 0 pads, 1 ends, 2 is
    unknown."""
    folder = tmp_path_factory.mktemp("pieces")
    text = folder / "text.txt"
    text.write_text("a photo of a cat\na photo of a dog\ntwo dogs and one cat in a photo\n" * 20)
    options = {
        "vocab_size": 40,
        "pad_id": 0,
        "eos_id": 1,
        "unk_id": 2,
        "bos_id": -1,
        "minloglevel": 2,
        "num_threads": 1,
    }
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "spiece"), hard_vocab_limit=False, **options
    )
    return folder / "spiece.model"


def prompting(siglip, **changes):
    size = sentencepiece.SentencePieceProcessor(model_file=str(siglip)).get_piece_size()
    rule = {"length": 8, "vocabulary": size, "start": -1, "end": 1, "pad": 1, "lower": True, "sticky_end": True}
    return Prompting(**{"tokenizer": "sentencepiece", **rule, **changes})


def wordpiece_by_hand(text):
    """BERT's: lower, accents off, split at spaces and punctuation, then the longest piece first."""
    ids = []
    for word in re.findall(r"\w+|[^\w\s]", text.lower().replace("é", "e").replace("à", "a")):
        found, rest, front = [], word, ""
        while rest:
            piece = next((front + rest[:n] for n in range(len(rest), 0, -1) if front + rest[:n] in WORDS), None)
            if piece is None:
                found = [1]
                break
            # a word listed twice has its last line's number
            last = max(i for i, known in enumerate(WORDS) if known == piece)
            found, rest, front = [*found, last], rest[len(piece) - len(front) :], "##"
        ids += found
    return ids


def bpe_by_hand(text):
    """CLIP's: lower, words by its pattern, then the merge of the lowest rank until there is none (openai/CLIP
    simple_tokenizer.py)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {byte: chr(byte) for byte in printable}
    letters |= {byte: chr(256 + i) for i, byte in enumerate(byte for byte in range(256) if byte not in printable)}
    order = [letters[byte] for byte in printable] + [letters[byte] for byte in range(256) if byte not in printable]
    pieces = [*order, *(letter + "</w>" for letter in order), *("".join(merge) for merge in MERGES)]
    ids = []
    for word in re.findall(r"'s|'t|'re|'ve|'m|'ll|'d|[^\W\d_]+|\d|[^\s\w]+", text.lower()):
        parts = [letters[byte] for byte in word.encode()]
        parts[-1] += "</w>"
        while ranked := [(MERGES.index(pair), i) for i, pair in enumerate(itertools.pairwise(parts)) if pair in MERGES]:
            rank, i = min(ranked)
            parts[i : i + 2] = ["".join(MERGES[rank])]
        ids += [pieces.index(part) for part in parts]
    return ids


def test_wordpiece(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    # LiT: [CLS] in front, nothing behind, zeros
    expected = [([2, *wordpiece_by_hand(prompt)] + [0] * 6)[:6] for prompt in PROMPTS]
    assert expected[0] == [2, 4, 5, 6, 7, 13] and expected[2] == [2, 1, 0, 0, 0, 0]
    for given in (path, tmp_path):
        ids = open_tokenizer(given, BERT)(PROMPTS)
        assert ids.dtype == np.int32 and ids.tolist() == expected


@pytest.mark.parametrize("form", ["merges.txt", "merges.txt.gz", "with vocab.json", "tokenizer.json"])
def test_clips_byte_pairs(tmp_path, form):
    lines = "\n".join(["#version: 0.2", *(" ".join(merge) for merge in MERGES)]) + "\n"
    (tmp_path / "merges.txt").write_text(lines, encoding="utf-8")
    path = tmp_path / "merges.txt"
    if form == "merges.txt.gz":
        path = tmp_path / "bpe.txt.gz"
        path.write_bytes(gzip.compress(lines.encode()))
    elif form == "with vocab.json":
        # the ids of a file that has them are taken, and not those that merges would give
        known = open_tokenizer(path, CLIP).encode
        assert known(["cat"]) == [[512 + 1]]
        shifted = {
            "<|startoftext|>": CLIP_WORDS - 2,
            "<|endoftext|>": CLIP_WORDS - 1,
            "cat</w>": 7,
            "c": 1,
            "ca": 2,
            "a": 3,
            "t</w>": 4,
        }
        (tmp_path / "vocab.json").write_text(
            json.dumps(
                shifted
                | {"".join(m): 20 + i for i, m in enumerate(MERGES) if i > 1}
                | dict(zip("tofph", range(40, 45)))
                | {"f</w>": 46, "o</w>": 47}
            )
        )
        assert open_tokenizer(tmp_path, CLIP).encode(["cat"]) == [[7]]
        return
    elif form == "tokenizer.json":
        import tokenizers

        options = {"end_of_word_suffix": "</w>", "unk_token": "<|endoftext|>"}
        from vit_convert.text.tokenizer import _ids_of_merges

        made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=_ids_of_merges(MERGES), merges=MERGES, **options))
        made.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
            [
                tokenizers.pre_tokenizers.Split(
                    tokenizers.Regex(r"'s|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"), "removed", invert=True
                ),
                tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        marks = {"special_tokens": [("<|startoftext|>", CLIP.start), ("<|endoftext|>", CLIP.end)]}
        made.post_processor = tokenizers.processors.TemplateProcessing(
            "<|startoftext|> $A <|endoftext|>", **marks
        )  # which the rule puts there already
        made.enable_padding(length=30)  # which is not ours
        made.enable_truncation(2)
        path = tmp_path / "tokenizer.json"
        made.save(str(path))
    start, end = CLIP.start, CLIP.end
    expected = []
    for prompt in PROMPTS:
        ids = [start, *bpe_by_hand(prompt), end]
        expected.append([*ids[:7], end] if len(ids) > 8 else ids + [0] * (8 - len(ids)))  # clip.tokenize(truncate=True)
    assert open_tokenizer(path, CLIP)(PROMPTS).tolist() == expected
    assert expected[2][:5] == [start, ord("d") - 33, ord("o") - 33, 256 + ord("g") - 33, end] and expected[4][-2:] == [
        512 + 7,
        end,
    ]


def test_sentencepiece_with_a_sticky_end(siglip):
    rule, model = prompting(siglip), sentencepiece.SentencePieceProcessor(model_file=str(siglip))
    ids = open_tokenizer(siglip, rule)(["A PHOTO of a cat", "a photo of a dog and a cat and two dogs"])
    short, long = (model.encode(text) for text in ("a photo of a cat", "a photo of a dog and a cat and two dogs"))
    assert len(short) < 8 < len(long)
    assert ids.tolist() == [(short + [1] * 8)[:8], [*long[:7], 1]]  # big_vision's eos="sticky", pad_value=1
    gemma = open_tokenizer(siglip, prompting(siglip, pad=0))(["a cat"])  # SigLIP 2: one end, then zeros
    words = model.encode("a cat")
    assert gemma.tolist() == [[*words, 1, *[0] * (7 - len(words))]]
    tips = open_tokenizer(siglip, prompting(siglip, end=-1, pad=0, sticky_end=False))(
        ["a cat", "a photo of a dog and a cat and two dogs"]
    )
    assert tips.tolist() == [(words + [0] * 8)[:8], long[:8]]


def test_letters_are_lowered_as_each_familys_training_did(siglip):
    assert prompting(siglip).lowered("EIN ÄFFCHEN") == "ein Äffchen"  # tf.strings.lower knows ASCII alone
    assert CLIP.lowered("EIN ÄFFCHEN") == "ein äffchen"
    assert prompting(siglip, lower=False).lowered("Cat") == "Cat"  # LiT's SentencePiece towers


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "not a SentencePiece model"),
        (b"\x0a\xff garbage", "not a SentencePiece model"),
        (b"\0" * 4096, "not a SentencePiece model"),
    ],
)
def test_damaged_sentencepiece_models(tmp_path, siglip, content, said):
    path = tmp_path / "spiece.model"
    path.write_bytes(content)
    with pytest.raises(CalibrationError, match=said) as raised:
        open_tokenizer(path, prompting(siglip))
    assert "SentencePiece .model" in raised.value.fix


def test_what_to_give_is_said_of_a_file_of_another_kind(tmp_path, siglip):
    """A SentencePiece model is no text that could be saved as UTF-8, nor a vocabulary a list of merges."""
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    for path, rule, fix in (
        (siglip, CLIP, "merges.txt"),
        (siglip, BERT, "vocab.txt"),
        (tmp_path / "vocab.txt", CLIP, "merges.txt"),
        (tmp_path / "vocab.txt", prompting(siglip), "SentencePiece .model"),
    ):
        with pytest.raises(CalibrationError) as raised:
            open_tokenizer(path, rule)
        assert fix in raised.value.fix and "UTF-8" not in raised.value.fix


@pytest.mark.parametrize(
    ("name", "content", "rule", "said"),
    [
        ("vocab.txt", b"[PAD]\n[CLS]\n", BERT, r"no \[UNK\]"),
        ("vocab.txt", b"\xff\xfe", BERT, "not text"),
        ("vocab.txt", b"[PAD]\n[UNK]\n[CLS]\n", BERT, "has id 2 for the start of a text, the model 1"),
        ("merges.txt", b"", CLIP, "is not a pair of pieces"),
        ("merges.txt", b"#version: 0.2\na b\na b c\n", CLIP, "'a b c' is not a pair"),
        ("merges.txt", b"zz yy\n", CLIP, "not CLIP's merges"),
        ("tokenizer.json", b"{", CLIP, "not a tokenizer.json"),
        ("tokenizer.json", b"[1]", BERT, "not a tokenizer.json"),
        ("merges.gz", b"\x1f\x8b\x08 cut", CLIP, "merges.gz"),
    ],
)
def test_damaged_files_of_tokenizers(tmp_path, name, content, rule, said):
    (tmp_path / name).write_bytes(content)
    changed = Prompting(**{**rule.to_dict(), "start": 1}) if "the model 1" in said else rule
    with pytest.raises(CalibrationError, match=said) as raised:
        open_tokenizer(tmp_path / name, changed)
    assert raised.value.exit_code == 6


def test_a_tokenizer_of_another_model_is_refused(tmp_path, siglip):
    with pytest.raises(CalibrationError, match="for the end of a text, the model 3"):
        open_tokenizer(siglip, prompting(siglip, end=3))
    with pytest.raises(CalibrationError, match="the model has 5 tokens"):
        open_tokenizer(siglip, prompting(siglip, vocabulary=5))(["two dogs in a photo"])
    largest = max(sentencepiece.SentencePieceProcessor(model_file=str(siglip)).encode("two dogs in a photo"))
    open_tokenizer(siglip, prompting(siglip, vocabulary=largest + 1))(["two dogs in a photo"])
    with pytest.raises(CalibrationError, match=f"gives the id {largest}, the model has {largest} tokens"):
        open_tokenizer(siglip, prompting(siglip, vocabulary=largest))(["two dogs in a photo"])
    with pytest.raises(CalibrationError, match="holds no file of a clip tokenizer"):
        open_tokenizer(tmp_path, CLIP)
    with pytest.raises(CalibrationError, match="No such file"):
        open_tokenizer(tmp_path / "spiece.model", prompting(siglip))


def test_of_clips_own_file_as_much_is_read_as_the_model_knows(tmp_path):
    """Its list goes on; the published model's marks are 49406 and 49407."""
    letters = [chr(code) for code in (*range(33, 127), *range(161, 173), *range(174, 256))]
    pairs = [f"{first} {second}" for first in letters for second in (*letters, *(f"{x}</w>" for x in letters))]
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *pairs[:50_000]]), encoding="utf-8")
    published = {"vocabulary": 49408, "start": 49406, "end": 49407}
    assert open_tokenizer(tmp_path, Prompting(**{**CLIP.to_dict(), **published})).encode(["!!"]) == [[512 + 188]]


def test_what_a_library_says_of_a_damaged_file_is_cut_to_a_line():
    whole = r"x: not a model that can be read \(ValueError: one\)$"
    with pytest.raises(CalibrationError, match=whole), _damage("x", "a model", BERT):
        raise ValueError("one\ntwo")
    with pytest.raises(CalibrationError, match=rf"\(ValueError: {'y' * 200}\)$"), _damage("x", "a model", BERT):
        raise ValueError("y" * 300)
    with pytest.raises(KeyboardInterrupt), _damage("x", "a model", BERT):
        raise KeyboardInterrupt


def test_without_the_libraries_ids_still_work(tmp_path, monkeypatch, siglip):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    ids = np.arange(16).reshape(2, 8)
    ids[:, 5] = CLIP.end
    np.save(tmp_path / "ids.npy", ids)
    assert read_tokens(tmp_path / "ids.npy", CLIP).tolist() == ids.tolist()
    for rule, library in (
        (CLIP, "tokenizers"),
        (Prompting(**{**CLIP.to_dict(), "tokenizer": "sentencepiece"}), "sentencepiece"),
    ):
        with pytest.raises(UsageError, match=f"{library} is not installed") as raised:
            tokens_of(["a cat"], rule, str(siglip))
        assert raised.value.exit_code == 2 and "vit_convert[text]" in raised.value.fix
    with pytest.raises(UsageError, match=r"config\.tokenizer is empty, and 1 prompts"):
        tokens_of(["a cat"], CLIP, "")
