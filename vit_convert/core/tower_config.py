"""Keys for one tower of a pair: `config.image.*` and `config.text.*` override the common keys of the same names."""

import re
from typing import Any

import ml_collections
from ml_collections import config_dict

from vit_convert.core.errors import UsageError
from vit_convert.core.pair import TOWERS
from vit_convert.core.renamed import Config

_OF_BOTH = (
    "name",
    "checkpoint",
    "family",
    "families",
    "variant",
    "model",
    "normalize",
    "target",
    "tokenizer",
    "text_length",
    "engine.backend",
)
_OF_IMAGES = ("image_size", "posemb_grid", "preprocess", "layout", "input", "num_classes")
_DATA = (
    "calibration.data",
    "evaluation.data",
    "evaluation.num_images",
)  # common keys that name images, not prompts
_ZERO_SHOT = ("evaluation.prompts", "evaluation.templates")  # the text tower's


def tower_keys(config: ml_collections.ConfigDict, tower: str) -> Config:
    """The keys that can be set for one tower, each empty, so that the common one applies.

    Args:
        config: the common keys with their defaults.
        tower: "image" or "text".

    Returns:
        A group of placeholders.
    """
    left_out = {*_OF_BOTH, *(_OF_IMAGES if tower == "text" else _ZERO_SHOT)}
    return _emptied(config, "", left_out - {"checkpoint"} if tower == "text" else left_out)  # of towers in two files


def _emptied(config: ml_collections.ConfigDict, path: str, left_out: set[str]) -> Config:
    group = Config()
    for key in config:
        value, dotted = config[key], f"{path}{key}"
        if isinstance(value, ml_collections.ConfigDict):
            group[key] = _emptied(value, f"{dotted}.", left_out)
        elif dotted not in left_out:
            group[key] = config_dict.placeholder(object if value is None else type(value))
    return group


def given_keys(config: ml_collections.ConfigDict, tower: str) -> dict[str, Any]:
    """The values that a config sets for one tower only, by dotted key.

    Args:
        config: the full config.
        tower: "image" or "text".

    Example:
        >>> from vit_convert.config import default_config
        >>> config = default_config()
        >>> config.text.batch.max = 1024
        >>> given_keys(config, "text")
        {'batch.max': 1024}
    """
    return _given(config[tower], "")


def _given(group: ml_collections.ConfigDict, path: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key in group:
        value = group[key]
        if isinstance(value, ml_collections.ConfigDict):
            found |= _given(value, f"{path}{key}.")
        elif value is not None:
            found[f"{path}{key}"] = value
    return found


def tower_config(
    config: ml_collections.ConfigDict, tower: str, defaults: ml_collections.ConfigDict
) -> ml_collections.ConfigDict:
    """The config for converting one tower of a pair as a model of its own.

    Args:
        config: the full config of the pair.
        tower: "image" or "text".
        defaults: of all keys; the values are written into it.

    Returns:
        A full config, its values not checked yet: the common ones, overridden by the tower's. The common
        `calibration.data` and `evaluation.data` are images, so they apply to the image tower only.

    Raises:
        UsageError: a value of the tower does not have its key's type.
    """
    others = {*_OF_IMAGES, *_DATA} if tower == "text" else {*_ZERO_SHOT, "tokenizer", "text_length"}
    for key, value in _given(config, "").items():
        if key.partition(".")[0] not in TOWERS and key not in others:
            _set(defaults, key, value)
    for key, value in given_keys(config, tower).items():
        try:
            _set(defaults, key, value)
        except TypeError as e:
            raise UsageError(f"config.{key}={value!r}: {e}") from e
    defaults.name = tower
    file = config.text.checkpoint or config.checkpoint if tower == "text" else config.checkpoint
    defaults.checkpoint = _named(file, tower, alone=bool(config.text.checkpoint))
    return defaults


def _named(checkpoint: str, tower: str, *, alone: bool) -> str:
    """The tower named in a file's path, or in an address, which may end in a sum.

    Args:
        checkpoint: the path or address.
        tower: "image" or "text".
        alone: each tower has a file of its own, whose path may name it.

    Raises:
        UsageError: the path of such a file names the other tower.
    """
    address, mark, fragment = checkpoint.partition("#") if "://" in checkpoint else (checkpoint, "", "")
    named = re.search(r":(img|image|txt|text)$", address)
    if named is None or not alone:
        return f"{address}:{'img' if tower == 'image' else 'txt'}{mark}{fragment}"
    if (named[1] in ("img", "image")) != (tower == "image"):
        key = "text.checkpoint" if tower == "text" else "checkpoint"
        raise UsageError(
            f"config.{key}={checkpoint}: the {tower} tower's file belongs there, and it names the other tower",
            fix="config.checkpoint is the image tower's file, config.text.checkpoint the text tower's.",
        )
    return checkpoint


def _set(config: ml_collections.ConfigDict, dotted: str, value: Any) -> None:
    *groups, key = dotted.split(".")
    for group in groups:
        config = config[group]
    if isinstance(config[key], float) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    config[key] = tuple(value) if isinstance(value, list) else value
