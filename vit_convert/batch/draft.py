"""A job in preparation: what a source asks for, before sweeps multiply it and names become unique."""

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from vit_convert.core.config import default_config
from vit_convert.core.errors import UsageError, nearest
from vit_convert.core.overrides import dotted_keys
from vit_convert.core.renamed import current


@dataclasses.dataclass(frozen=True)
class Draft:
    """One conversion that a source asks for.

    Attributes:
        origin: where, for messages.
        stem: from which its name is made.
        named: whether the user gave that name, so that it must not be changed.
        checkpoint: a path or an address; "" if the config file gives it.
        values: of config keys, as they are written on a command line.
    """

    origin: str
    stem: str
    named: bool = False
    checkpoint: str = ""
    values: Mapping[str, str] = dataclasses.field(default_factory=dict)


def draft_of(row: Mapping[str, Any], origin: str, *, stem: str = "") -> Draft:
    """Reads one row of a table or one job of a Python file.

    Args:
        row: `name`, `checkpoint`, and any config key with or without `config.` before it. Empty values are ignored.
        origin: its place, for messages.
        stem: the name of a row without `name` and `checkpoint`.

    Raises:
        UsageError: a key that the config does not have.
    """
    given = {str(key): value for key, value in row.items() if value is not None and value != ""}
    name, checkpoint = (text_of(given.pop(key, given.pop(f"config.{key}", ""))) for key in ("name", "checkpoint"))
    values = {known_key(key, origin): text_of(value) for key, value in given.items()}
    return Draft(origin, clean(name or stem_of(checkpoint) or stem), bool(name), checkpoint, values)


def known_key(given: str, origin: str) -> str:
    """A config key without its `config.`.

    Raises:
        UsageError: there is no such key.
    """
    key = current(given.removeprefix("config."))
    if key not in _known():
        raise UsageError(
            f"{origin}: {given}: unknown key.{nearest(key, _known())}",
            fix="python -m vit_convert --help lists the keys.",
        )
    return key


@functools.cache
def _known() -> Sequence[str]:
    return dotted_keys(default_config())


def text_of(value: Any) -> str:
    """A value in the form that follows "--config.key="."""
    if isinstance(value, bool):
        return str(value).lower()
    return repr(tuple(value)) if isinstance(value, list | tuple) else str(value)


def stem_of(checkpoint: str) -> str:
    """The name of a file or an address without folder, extension and #sha256.

    Example:
        >>> stem_of("gs://vit_models/augreg/Ti_16-res_384.npz#sha256=00")
        'Ti_16-res_384'
    """
    name = checkpoint.partition("#")[0].rstrip("/").rpartition("/")[2]
    return clean(re.sub(r"\.(npz|safetensors|msgpack)(?=:|$)", "", name))


def clean(text: str) -> str:
    """A text reduced to what a bundle's name may contain.

    Example:
        >>> clean("a b/c:img")
        'a_b_c_img'
    """
    return re.sub(r"^[^\w]+", "", re.sub(r"[^\w.+-]+", "_", text))
