"""`--config.key=value` on a command line, written as absl writes flags, for all our programs."""

import re
import shlex
from collections.abc import Sequence
from typing import Any

import ml_collections
from absl import flags

from vit_convert.core.errors import UsageError, nearest
from vit_convert.core.renamed import current

_OVERRIDE = re.compile(r"--?(?P<no>no)?config\.(?P<key>[^=]*)(?P<value>=.*)?", re.DOTALL)
_BOOLEANS = ("true", "t", "1", "false", "f", "0")  # absl's


def dotted_keys(config: ml_collections.ConfigDict, prefix: str = "") -> list[str]:
    """Every key of a config, prefixed by its groups: "batch.max"."""
    keys: list[str] = []
    for key in config:
        value = config[key]
        nested = isinstance(value, ml_collections.ConfigDict)
        keys += dotted_keys(value, f"{prefix}{key}.") if nested else [f"{prefix}{key}"]
    return keys


def split_overrides(words: Sequence[str], config: ml_collections.ConfigDict) -> tuple[list[str], list[str]]:
    """Takes the overrides out of a command line.

    Args:
        words: the command line, without the program's name. A value follows its key after "=" or as the next word; a
            switch is written `--config.taps`, `--noconfig.taps` or `--config.taps=false`.
        config: says which keys exist, and which are switches.

    Returns:
        The overrides, each as "--config.key=value", and the remaining words.

    Raises:
        UsageError: an unknown key, a key without a value, or `no` before a key that is not a switch.
    """
    known = {key: _value(config, key) for key in dotted_keys(config)}
    overrides: list[str] = []
    rest: list[str] = []
    left = list(words)
    while left:
        word = left.pop(0)
        match = _OVERRIDE.fullmatch(word)
        if match is None:
            rest.append(word)
            continue
        key, value = current(match["key"]), match["value"]
        if key not in known:
            raise UsageError(f"{word.split('=')[0]}: unknown key.{nearest(key, known)}", fix="--help lists the keys.")
        is_switch = isinstance(known[key], bool)
        if match["no"] and (value is not None or not is_switch):
            what = (
                "takes no value"
                if is_switch
                else f"only a switch can be turned off this way, and {key} holds {known[key]!r}"
            )
            raise UsageError(f"{word}: {what}", fix=f"Write --config.{key}=VALUE.")
        if value is None and is_switch:
            if left and left[0].lower() in _BOOLEANS:
                raise UsageError(
                    f"{word} {left[0]}: a switch takes its value after '='", fix=f"Write {word}={left[0]}."
                )
            value = "=false" if match["no"] else "=true"
        elif value is None:
            if not left or left[0].startswith("--"):
                raise UsageError(f"{word}: no value given", fix=f"Write --config.{key}=VALUE.")
            value = f"={left.pop(0)}"
        overrides.append(f"--config.{key}{value}")
    return overrides, rest


def apply_overrides(config: ml_collections.ConfigDict, overrides: Sequence[str]) -> ml_collections.ConfigDict:
    """Sets what `split_overrides` returned.

    Args:
        config: the full config; values are set in place, since copying it would copy a user's own model.
        overrides: "--config.key=value" words.

    Returns:
        The same config, its values not checked yet.

    Raises:
        UsageError: a value that is not of its key's type.
    """
    from ml_collections import config_flags

    values = flags.FlagValues()
    words = ["", *overrides]
    holder = config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=words)
    try:
        values(words)
        return holder.value
    except (flags.Error, TypeError, ValueError, MemoryError, RecursionError) as e:
        # the last two for a value that nests too deeply
        raise UsageError(f"{shlex.join(overrides)}: {e}", fix="--help lists the keys and their defaults.") from e


def _value(config: ml_collections.ConfigDict, dotted: str) -> Any:
    value: Any = config
    for part in dotted.split("."):
        value = value[part]
    return value
