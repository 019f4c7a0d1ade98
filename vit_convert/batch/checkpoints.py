"""Checkpoints by globs, folders, lists and addresses."""

import glob
import os
import pathlib
from collections.abc import Iterator, Sequence

from vit_convert.batch.draft import Draft, clean, stem_of
from vit_convert.checkpoint.fetch import is_address
from vit_convert.core.errors import UsageError

_ENDINGS = (".npz", ".safetensors", ".msgpack")
_LIST_ENDINGS = (".txt", ".list")
_FIX = "Give files, globs in quotes, folders, addresses, or a .txt file with one of these per line."


def drafts_of_checkpoints(words: Sequence[str]) -> list[Draft]:
    """The checkpoints that `--checkpoints` names.

    Args:
        words: each a file, a glob (`**` for any folders), a folder (all checkpoints below it), a `gs://` or `https://`
            address, or a `.txt` file with one of these per line; several may be separated by commas in one word.

    Returns:
        One draft per checkpoint, in order; a file that is named twice counts once. Below a glob or a folder, names are
        made from the whole path from there on, so that they do not change when files are added.

    Raises:
        UsageError: a glob or a folder without checkpoints, or a list that cannot be read.
    """
    parts = [part for word in words for part in ([word] if os.path.exists(word) else word.split(",")) if part.strip()]
    found = [draft for part in parts for draft in _expand(part.strip(), part.strip(), lists=True)]
    return list({draft.checkpoint: draft for draft in reversed(found)}.values())[::-1]


def _expand(word: str, origin: str, *, lists: bool) -> Iterator[Draft]:
    if is_address(word):
        if "*" in word:
            raise UsageError(
                f"{origin}: an address cannot hold a *", fix="gsutil ls lists them; give the list as a .txt file."
            )
        yield Draft(word, stem_of(word), checkpoint=word)
    elif os.path.isdir(word):
        yield from _below(pathlib.Path(word), "**/*", origin, _ENDINGS)
    elif os.path.isfile(word) and word.endswith(_LIST_ENDINGS) and lists:
        for number, line in enumerate(_lines(word), 1):
            if line.strip() and not line.lstrip().startswith("#"):
                yield from _expand(line.strip(), f"{word}:{number}", lists=False)
    elif not os.path.exists(word) and glob.has_magic(word):
        root, pattern = _split_glob(word)
        yield from _below(root, pattern, origin, ("",))
    else:  # even one that does not exist: its conversion will report that, and the others continue
        yield Draft(word, stem_of(word), checkpoint=word)


def _split_glob(word: str) -> tuple[pathlib.Path, str]:
    """The folder before the first wildcard, and the pattern from there on."""
    parts = pathlib.PurePath(word).parts
    first = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    return pathlib.Path(*parts[:first]), os.path.join(*parts[first:])


def _below(root: pathlib.Path, pattern: str, origin: str, endings: tuple[str, ...]) -> Iterator[Draft]:
    names = sorted(glob.glob(pattern, root_dir=root, recursive=True))
    # a link that leads nowhere is a job that fails with its name: left out, nobody would miss it
    names = [
        name for name in names if name.endswith(endings) and ((root / name).is_file() or not (root / name).exists())
    ]
    if not names:
        raise UsageError(f"--checkpoints={origin}: no checkpoint there", fix=_FIX)
    for name in names:
        path = os.fspath(root / name)
        folder = clean(os.path.dirname(name))
        yield Draft(path, f"{folder}_{stem_of(name)}" if folder else stem_of(name), checkpoint=path)


def _lines(path: str) -> list[str]:
    try:
        return pathlib.Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as e:
        raise UsageError(f"--checkpoints={path}: cannot be read ({e})", fix=_FIX) from e
