"""Renamed config keys and programs: old names still work, and a line on stderr gives the new one."""

import functools
import importlib
import sys
from typing import Any, NoReturn

import ml_collections

_RENAMED = {"spellings": "lowerings", "spelling": "lowering", "int8_spelling": "int8_lowering"}
_PROGRAMS = {"vit_convert.checkpoint.random": "vit_convert.families.random"}


def current(key: str) -> str:
    """The current name of a key; the first use of an old name prints a line with the new one on stderr.

    Args:
        key: with or without the groups before it: "engine.spelling", "spelling".

    Example:
        >>> current("engine.lowering")
        'engine.lowering'
    """
    group, dot, last = key.rpartition(".")
    if last not in _RENAMED:
        return key
    _say("config key", last, _RENAMED[last])
    return group + dot + _RENAMED[last]


@functools.cache
def _say(what: str, old: str, new: str) -> None:
    print(f"note: {what} {old!r} is called {new!r} now", file=sys.stderr)


def run_program(old: str) -> NoReturn:
    """Runs a program of the package that was started under its old name, and exits.

    Args:
        old: the module that `python -m` was given.
    """
    new = _PROGRAMS[old]
    _say("program", old, new)
    sys.exit(importlib.import_module(new).main(sys.argv))


class Config(ml_collections.ConfigDict):
    """A ConfigDict that also accepts the old names of keys, so that old config files keep working."""

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(current(key) if isinstance(key, str) else key, value)

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(current(key) if isinstance(key, str) else key)
