"""Sweeps: every job in several settings, by flags or by a config's get_hyper()."""

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from vit_convert.batch.draft import known_key, text_of
from vit_convert.core.errors import UsageError

Setting = Mapping[str, Any]  # key to value
_FIX = "For example --sweep config.precision=fp16,int8; values that contain a comma are separated by ';'."


def settings_of_flags(words: Sequence[str]) -> list[dict[str, str]]:
    """Every combination of the `--sweep` flags.

    Args:
        words: each "config.key=a,b", or "config.key=a;b,c" where a value holds commas.

    Returns:
        One {key: value} per combination, with the last word varying fastest; [{}] without words.

    Raises:
        UsageError: a word has another form, a key is unknown, or a key occurs twice.

    Example:
        >>> settings_of_flags(["config.precision=fp16,int8"])
        [{'precision': 'fp16'}, {'precision': 'int8'}]
    """
    axes: dict[str, list[str]] = {}
    for word in words:
        given, equals, values = word.partition("=")
        key = known_key(given, f"--sweep={word}") if equals else ""
        if not key or not values.strip() or key in ("name", "checkpoint", *axes):
            fixed = key in ("name", "checkpoint")
            why = "swept twice" if key in axes else "is not a key that can be swept" if fixed else "has no values"
            raise UsageError(f"--sweep={word}: {given} {why}", fix=_FIX)
        axes[key] = _split(values)
    return [dict(zip(axes, values)) for values in itertools.product(*axes.values())]


def _split(values: str) -> list[str]:
    """Splits at ";", or if there is none at commas outside brackets."""
    parts = values.split(";") if ";" in values else re.findall(r"(?:\([^)]*\)|\[[^]]*\]|[^,([])+", values)
    return list(dict.fromkeys(part.strip() for part in parts))


class Hyper:
    """The argument of a config's `get_hyper(hyper)`, with the functions that public JAX configs call there.

    Example:
        >>> hyper = Hyper()
        >>> hyper.product([hyper.sweep("image_size", [224, 384]), hyper.fixed("precision", "fp16", length=1)])
        [{'image_size': 224, 'precision': 'fp16'}, {'image_size': 384, 'precision': 'fp16'}]
    """

    def sweep(self, name: str, values: Sequence[Any]) -> list[Setting]:
        """One key with several values."""
        return [{name: value} for value in values]

    def fixed(self, name: str, value: Any, length: int = 1) -> list[Setting]:
        """One key with one value, `length` times."""
        return [{name: value}] * length

    def product(self, parts: Sequence[Sequence[Setting]]) -> list[Setting]:
        """Every combination."""
        return [_merged(combination) for combination in itertools.product(*parts)]

    def zipit(self, parts: Sequence[Sequence[Setting]]) -> list[Setting]:
        """The first of each, the second of each, …; parts with one value are repeated."""
        length = max(map(len, parts), default=0)
        if not all(len(part) in (1, length) for part in parts):
            raise ValueError(f"zipit of parts of {', '.join(str(len(part)) for part in parts)} values")
        return [_merged(part[i % len(part)] for part in parts) for i in range(length)]

    def chainit(self, parts: Sequence[Sequence[Setting]]) -> list[Setting]:
        """One after the other."""
        return [setting for part in parts for setting in part]


def settings_of_hyper(made: Any, origin: str) -> list[dict[str, str]]:
    """The result of get_hyper() as settings.

    Raises:
        UsageError: it is not a list of {key: value}, or names an unknown key.
    """
    if not isinstance(made, list | tuple) or not all(isinstance(setting, Mapping) for setting in made):
        raise UsageError(
            f"{origin}: get_hyper() returned {made!r}",
            fix="It returns hyper.sweep(…), hyper.product([…]) and the like.",
        )
    return [{known_key(key, origin): text_of(value) for key, value in setting.items()} for setting in made] or [{}]


def _merged(settings: Any) -> Setting:
    return {key: value for setting in settings for key, value in setting.items()}
