"""Opens a tokenizer's files with the library for its kind: `sentencepiece`, or Hugging Face's `tokenizers`."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from vit_convert.core.errors import CalibrationError, UsageError
from vit_convert.text.files import read_bytes, read_lines
from vit_convert.text.prompting import Prompting

# The files that a folder is searched for; the first match wins.
_FILES = {
    "sentencepiece": ("spiece.model", "tokenizer.model", "sentencepiece.model", "tokenizer.json"),
    "bert": ("vocab.txt", "tokenizer.json"),
    "clip": ("merges.txt", "bpe_simple_vocab_16e6.txt.gz", "tokenizer.json"),
}
# Names of the tokens before and after a text; a `tokenizer.json` of a SentencePiece model uses T5's or Gemma's.
_MARKS = {
    "bert": (("[CLS]",), ("[SEP]",)),
    "clip": (("<|startoftext|>",), ("<|endoftext|>",)),
    "sentencepiece": (("<bos>", "<s>"), ("<eos>", "</s>")),
}
_MERGES = 49152 - 256 - 2  # openai/CLIP reads this many lines of its file and no more
# openai/CLIP's pattern
_PIECES = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_LONGEST_WORD = 100  # characters; BERT's own limit: a longer word becomes [UNK]
_BELONGS = "Give the tokenizer that belongs to the checkpoint."
# By kind, what is said about a file of another kind.
_GIVE = {
    "sentencepiece": "Give the checkpoint's SentencePiece .model, or a tokenizer.json of it.",
    "bert": "Give BERT's vocab.txt, one token a line, or a tokenizer.json of it.",
    "clip": "Give CLIP's merges.txt or bpe_simple_vocab_16e6.txt.gz, a pair a line, or a tokenizer.json of them.",
}

Encode = Callable[[list[str]], list[list[int]]]


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Maps prompts to token ids, as a text tower's training did.

    Attributes:
        prompting: the rule.
        encode: maps prompts to the ids of their words, without start and end.
    """

    prompting: Prompting
    encode: Encode

    def __call__(self, prompts: Sequence[str]) -> np.ndarray:
        """Token ids int32 [prompts, length]."""
        rows = [self.prompting.fit(ids) for ids in self.encode([self.prompting.lowered(prompt) for prompt in prompts])]
        return np.array(rows, np.int32).reshape(len(rows), self.prompting.length)


def open_tokenizer(path: str | os.PathLike[str], prompting: Prompting) -> Tokenizer:
    """Opens a tokenizer's files.

    Args:
        path: a SentencePiece `.model`; BERT's `vocab.txt`; CLIP's `merges.txt` (with `vocab.json`, if that lies beside
            it) or `bpe_simple_vocab_16e6.txt.gz`; a `tokenizer.json` of any kind; or a folder that holds one of them.
        prompting: the rule of the text tower.

    Returns:
        The Tokenizer.

    Raises:
        CalibrationError: a file is missing, damaged, or not of the kind that the text tower was trained with.
        UsageError: the library that reads it is not installed.
    """
    path = _file_in(pathlib.Path(path), prompting.tokenizer)
    if path.suffix == ".json":
        return _from_json(path, prompting)
    return {"sentencepiece": _from_sentencepiece, "bert": _from_vocabulary, "clip": _from_merges}[prompting.tokenizer](
        path, prompting
    )


def tokenizer_files(path: str | os.PathLike[str], prompting: Prompting) -> list[pathlib.Path]:
    """The files that `open_tokenizer` reads, with the one to pass to it first.

    Args:
        path: as `open_tokenizer` takes it.
        prompting: the rule of the text tower.

    Raises:
        CalibrationError: it is a folder that holds none.
    """
    found = _file_in(pathlib.Path(path), prompting.tokenizer)
    beside = found.with_name("vocab.json")
    return [found, beside] if found.name == "merges.txt" and beside.is_file() else [found]


def _file_in(path: pathlib.Path, kind: str) -> pathlib.Path:
    if not path.is_dir():
        return path.with_name("merges.txt") if path.name == "vocab.json" else path
    for name in _FILES[kind]:
        if (path / name).is_file():
            return path / name
    raise CalibrationError(
        f"tokenizer {path}: holds no file of a {kind} tokenizer", fix=f"It is one of {', '.join(_FILES[kind])}."
    )


def _from_sentencepiece(path: pathlib.Path, prompting: Prompting) -> Tokenizer:
    try:
        import sentencepiece
    except ImportError as e:
        raise _not_installed(path, "sentencepiece") from e
    content = read_bytes(path, "tokenizer")
    with _damage(path, "a SentencePiece model", prompting):
        if not content:
            raise ValueError("empty")
        model = sentencepiece.SentencePieceProcessor(model_proto=content)
        marks = model.bos_id(), model.eos_id()
    return _checked(path, prompting, lambda prompts: model.encode(prompts, out_type=int), marks)


def _from_vocabulary(path: pathlib.Path, prompting: Prompting) -> Tokenizer:
    library, lines = _tokenizers(path), read_lines(path, "tokenizer", fix=_GIVE[prompting.tokenizer])
    vocabulary = {word: i for i, word in enumerate(lines)}
    if "[UNK]" not in vocabulary:
        raise CalibrationError(f"tokenizer {path}: no [UNK] in it", fix=_GIVE[prompting.tokenizer])
    with _damage(path, "a WordPiece vocabulary", prompting):
        words = library.models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=_LONGEST_WORD)
        made = library.Tokenizer(words)
        made.normalizer = library.normalizers.BertNormalizer(lowercase=prompting.lower)
        made.pre_tokenizer = library.pre_tokenizers.BertPreTokenizer()
    return _of_library(path, prompting, made)


def _from_merges(path: pathlib.Path, prompting: Prompting) -> Tokenizer:
    library, lines = _tokenizers(path), read_lines(path, "tokenizer", fix=_GIVE[prompting.tokenizer])
    lines = lines[1:] if lines and "#version" in lines[0] else lines
    merges = [tuple(line.split(" ")) for line in lines[:_MERGES] if line]
    if wrong := next((merge for merge in merges if len(merge) != 2 or not all(merge)), () if merges else ("",)):
        raise CalibrationError(
            f"tokenizer {path}: {' '.join(wrong)[:80]!r} is not a pair of pieces",
            fix=_GIVE[prompting.tokenizer],
        )
    beside = path.with_name("vocab.json")
    vocabulary = _read_ids(beside) if beside.is_file() else _ids_of_merges(merges)
    with _damage(path, "CLIP's merges", prompting):
        options = {
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "</w>",
            "fuse_unk": False,
            "unk_token": "<|endoftext|>",
        }
        made = library.Tokenizer(library.models.BPE(vocab=vocabulary, merges=merges, **options))
        normalizers, pre = library.normalizers, library.pre_tokenizers
        spaces = normalizers.Replace(library.Regex(r"\s+"), " ")
        made.normalizer = normalizers.Sequence(
            [normalizers.NFC(), spaces, *([normalizers.Lowercase()] if prompting.lower else [])]
        )
        pieces = pre.Split(library.Regex(_PIECES), behavior="removed", invert=True)
        made.pre_tokenizer = pre.Sequence([pieces, pre.ByteLevel(add_prefix_space=False, use_regex=False)])
    return _of_library(path, prompting, made)


def _from_json(path: pathlib.Path, prompting: Prompting) -> Tokenizer:
    library, content = _tokenizers(path), read_bytes(path, "tokenizer")
    with _damage(path, "a tokenizer.json", prompting):
        made = library.Tokenizer.from_str(content.decode("utf-8"))
        made.no_padding()
        made.no_truncation()
    return _of_library(path, prompting, made)


def _ids_of_merges(merges: Sequence[tuple[str, ...]]) -> dict[str, int]:
    """CLIP's vocabulary: the 256 bytes as printable characters, the same again for word ends, the results of the
    merges, and the start and end marks."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = range(256, 256 + 256 - len(printable))  # stand-ins for bytes that are not printable characters
    letters = [chr(code) for code in (*printable, *others)]
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(merge) for merge in merges)]
    return {piece: i for i, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}


def _read_ids(path: pathlib.Path) -> dict[str, int]:
    try:
        found = json.loads(read_bytes(path, "tokenizer"))
    except (ValueError, RecursionError) as e:
        raise CalibrationError(f"tokenizer {path}: not JSON ({e})") from e
    if not isinstance(found, dict) or not all(type(i) is int and 0 <= i < 1 << 31 for i in found.values()):
        raise CalibrationError(f"tokenizer {path}: does not map pieces to ids", fix='It holds {"piece": id, …}.')
    return found


def _tokenizers(path: pathlib.Path) -> Any:
    try:
        import tokenizers
    except ImportError as e:
        raise _not_installed(path, "tokenizers") from e
    return tokenizers


def _not_installed(path: pathlib.Path, library: str) -> UsageError:
    fix = "pip install 'vit_convert[text]', or give token ids in an .npy."
    return UsageError(f"tokenizer {path}: {library} is not installed", fix=fix)


def _of_library(path: pathlib.Path, prompting: Prompting, made: Any) -> Tokenizer:
    def encode(prompts: list[str]) -> list[list[int]]:
        with _damage(path, "a tokenizer", prompting):
            return [found.ids for found in made.encode_batch(prompts, add_special_tokens=False)]

    marks = [[made.token_to_id(name) for name in names] for names in _MARKS[prompting.tokenizer]]
    begin, end = (next((i for i in ids if i is not None), -1) for ids in marks)
    return _checked(path, prompting, encode, (begin, end))


def _checked(path: pathlib.Path, prompting: Prompting, encode: Encode, marks: tuple[int, int]) -> Tokenizer:
    """Refuses a tokenizer whose special tokens are not those that the model was trained with: it is another model's."""
    for wanted, found, name in zip((prompting.start, prompting.end), marks, ("start", "end")):
        if wanted >= 0 and found != wanted:
            has = f"id {found}" if found >= 0 else "no token"
            raise CalibrationError(
                f"tokenizer {path}: has {has} for the {name} of a text, the model {wanted}", fix=_BELONGS
            )

    def bounded(prompts: list[str]) -> list[list[int]]:
        ids = encode(prompts)
        largest = max((i for row in ids for i in row), default=0)
        if largest >= prompting.vocabulary:
            known = f"the model has {prompting.vocabulary:,} tokens"
            raise CalibrationError(f"tokenizer {path}: gives the id {largest}, {known}", fix=_BELONGS)
        return ids

    return Tokenizer(prompting, bounded)


@contextmanager
def _damage(path: pathlib.Path, what: str, prompting: Prompting) -> Iterator[None]:
    """Turns whatever a library raises for a damaged file into one kind of error; Rust panics do not derive from
    Exception."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, MemoryError, GeneratorExit, CalibrationError):
        raise
    except BaseException as e:
        said = str(e).partition("\n")[0][:200]
        raise CalibrationError(
            f"tokenizer {path}: not {what} that can be read ({type(e).__name__}: {said})",
            fix=_GIVE[prompting.tokenizer],
        ) from e
