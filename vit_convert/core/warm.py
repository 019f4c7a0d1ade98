"""What a process keeps from one conversion to the next: results that depend on a model's architecture but not on its
weights."""

import collections
import gc
import threading
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

Made = TypeVar("Made")

_LIMIT = 256  # entries; a model's compiled parts, shapes and graphs take about ten
_kept: collections.OrderedDict[Hashable, Any] | None = None
_settled = False
_lock = threading.RLock()  # reentrant, because making one entry may ask for another


def keep(on: bool = True) -> None:
    """Starts keeping, or with False forgets everything. A single conversion keeps nothing, to save memory."""
    global _kept
    _kept = collections.OrderedDict() if on else None


def keeps() -> bool:
    """Whether this process keeps results."""
    return _kept is not None


def settle() -> None:
    """Excludes the objects that exist now from later garbage collections, once per process: imports and compiled
    programs hold a million objects, and searching them took a tenth of the time of a small conversion. Call it after a
    collection."""
    global _settled
    if not _settled:
        gc.freeze()
        _settled = True


def shared(key: Hashable, make: Callable[[], Made]) -> Made:
    """What `make` returns, or has returned for an equal key if this process keeps results; the least recently used are
    dropped first.

    Args:
        key: what the result is and everything that it depends on; if it cannot be hashed, as with a user's module,
            nothing is kept.
        make: computes the result, which must not be modified and must hold no weights.

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
