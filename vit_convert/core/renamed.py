"""Config keys that were renamed: the old name is still read, and one line on stderr gives the new one."""

import functools
import sys
from typing import Any

import ml_collections

_RENAMED = {"spellings": "lowerings", "spelling": "lowering", "int8_spelling": "int8_lowering"}


def current(key: str) -> str:
    """The name that a key has today; the first use of an old name prints a line with the new one on stderr.

    Args:
        key: with or without the groups before it: "engine.spelling", "spelling".

    Example:
        >>> current("engine.lowering")
        'engine.lowering'
    """
    group, dot, last = key.rpartition(".")
    if last not in _RENAMED:
        return key
    _say(last, _RENAMED[last])
    return group + dot + _RENAMED[last]


@functools.cache
def _say(old: str, new: str) -> None:
    print(f"note: config key {old!r} is called {new!r} now", file=sys.stderr)


class Config(ml_collections.ConfigDict):
    """A ConfigDict that also takes keys by their old names, so that old config files keep working."""

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(current(key) if isinstance(key, str) else key, value)

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(current(key) if isinstance(key, str) else key)
