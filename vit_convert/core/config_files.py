"""Finds config files by name, and runs them."""

import contextlib
import importlib.machinery
import inspect
import os
import pathlib
import re
import types
from collections.abc import Iterator, Sequence
from typing import Any

from vit_convert.core.config import default_config
from vit_convert.core.errors import ConvertError, UsageError, nearest
from vit_convert.core.overrides import dotted_keys
from vit_convert.core.user_code import explain, where


def split_argument(given: str) -> tuple[str, str]:
    """Splits a config's name at ":"; the rest is get_config()'s argument, as in big_vision's configs.

    Args:
        given: for example "vit.py:B/16" or "vit_b32".

    Returns:
        The file's name, and the argument or "".

    Example:
        >>> split_argument("configs/vit.py:B/16")
        ('configs/vit.py', 'B/16')
    """
    if os.path.isfile(given):
        return given, ""
    name, _, argument = given.partition(":")
    return name, argument


def find_config(given: str) -> str:
    """Finds a config file: at the path given, then in `./configs/`, then among those that come with the project.

    Args:
        given: a path, or a bare name: "vit_b32.py", "vit_b32".

    Returns:
        The path of an existing file.

    Raises:
        UsageError: no such file; the message names the nearest ones.
    """
    package = pathlib.Path(__file__).parents[1]
    folders = [pathlib.Path(), pathlib.Path("configs"), package.parent / "configs", package / "configs"]
    for folder in folders:
        for name in (given, f"{given}.py"):
            if os.path.isfile(folder / name):  # also False for an impossible file name
                return os.fspath(folder / name)
    names = sorted({path.name for folder in folders[1:] if folder.is_dir() for path in folder.glob("*.py")})
    raise UsageError(
        f"--config={given}: no such file here or in configs/.{nearest(given, names)}",
        fix=f"Available configs: {', '.join(names)}",
    )


def split_config(words: Sequence[str]) -> tuple[str, list[str]]:
    """Takes `--config=FILE` or `--config FILE` out of a command line; returns the file ("" for none) and the remaining
    words.

    Example:
        >>> split_config(["--config", "vit.py:B/16", "--force"])
        ('vit.py:B/16', ['--force'])
    """
    path, others = "", []
    left = iter(words)
    for word in left:
        if match := re.fullmatch(r"--?config=(.*)", word):
            path = match[1]
        elif re.fullmatch(r"--?config", word):
            path = next(left, "")
        else:
            others.append(word)
    return path, others


def load_config(path: str, argument: str = "") -> Any:
    """Runs a config file.

    Args:
        path: of the file.
        argument: for get_config(); "" for none.

    Returns:
        What get_config() returned.

    Raises:
        UsageError: the file fails (the message quotes its error), or its get_config() takes no argument.
    """
    module = load_file(path)
    with _errors_of(path):
        if argument and not inspect.signature(module.get_config).parameters:
            raise UsageError(f"--config={path}:{argument}: its get_config() takes no argument", fix=f"--config={path}")
        return module.get_config(argument) if argument else module.get_config()


def load_file(path: str) -> Any:
    """Runs a user's Python file and returns its module, which is not importable by name.

    Raises:
        UsageError: the file fails; the message quotes its error.
    """
    loader = importlib.machinery.SourceFileLoader(
        "vit_convert_user_config", path
    )  # a config is Python, whatever its file's extension
    module = types.ModuleType(loader.name)
    module.__file__ = path
    with _errors_of(path):
        loader.exec_module(module)
    return module


@contextlib.contextmanager
def _errors_of(path: str) -> Iterator[None]:
    try:
        yield
    except ConvertError:
        raise
    except (Exception, SystemExit) as e:
        missing = " PYTHONPATH names folders to import from." if isinstance(e, ImportError) else ""
        raise UsageError(f"{path}: {_explain(e)}", fix=f"--debug shows the whole traceback.{missing}") from e


def _explain(e: BaseException) -> str:
    """The error in one line; for an unknown key of a locked config, the nearest valid ones."""
    if match := re.match(r'(?:\'|")?Key "?(\w+)"? does not exist', str(e)):
        return (
            "unknown key "
            f"{match[1]!r}.{nearest(match[1], [key.split('.')[-1] for key in dotted_keys(default_config())])}{where(e)}"
        )
    return explain(e)
