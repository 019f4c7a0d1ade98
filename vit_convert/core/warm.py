"""What a process keeps from one conversion to the next: what a model's architecture decides and its weights do not."""

import collections
import threading
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

Made = TypeVar("Made")

_LIMIT = 256  # a model's compiled parts, its shapes and its graphs are some ten of them
_kept: collections.OrderedDict[Hashable, Any] | None = None
_lock = threading.RLock()  # what is kept may be made of what is kept


def keep(on: bool = True) -> None:
    """Begins to keep, or with False forgets it all. A single conversion keeps nothing: its memory counts for more."""
    global _kept
    _kept = collections.OrderedDict() if on else None


def keeps() -> bool:
    """Whether this process keeps anything."""
    return _kept is not None


def shared(key: Hashable, make: Callable[[], Made]) -> Made:
    """What `make` returns, or returned for an equal key if the process keeps it; the least recently used go first.

    Args:
        key: everything that the result depends on, and what it is; of one that cannot be hashed, as a user's module may
            be, nothing is kept.
        make: makes it; what it returns may not be changed, and holds no weights.

    Example:
        >>> shared(("sum", 1, 2), lambda: 1 + 2)
        3
    """
    if _kept is None or not _hashable(key):
        return make()
    with _lock:
        if key not in _kept:
            _kept[key] = make()
            while len(_kept) > _LIMIT:
                _kept.popitem(last=False)
        _kept.move_to_end(key)
        return _kept[key]


def _hashable(key: Hashable) -> bool:
    try:
        hash(key)
    except TypeError:
        return False
    return True
