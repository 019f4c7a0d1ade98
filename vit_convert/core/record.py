"""Records: frozen dataclasses stored as JSON objects, so that one place defines what a file holds, with types.

Every file of a bundle that another stage, host or version reads is a `Record`. Numbers are written as they are; a
number that is not finite is null in JSON (see `write_json`) and NaN when it is read again.
"""

import dataclasses
import functools
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

_Self = TypeVar("_Self", bound="Record")
_LEFT_OUT, _SECTION = "left out while None", "{} while None"
_ZEROS: dict[Any, Any] = {str: "", int: 0, float: 0.0, bool: False}


class RecordError(ValueError):
    """A value does not have the form of a record; the message names the key."""


def optional() -> Any:
    """A field that is missing in JSON while it is None; other fields are always present."""
    return dataclasses.field(default=None, metadata={_LEFT_OUT: True})


def section() -> Any:
    """A field that is a record or None; None is {} in JSON."""
    return dataclasses.field(default=None, metadata={_SECTION: True})


@dataclasses.dataclass(frozen=True)
class Record:
    """The base of all records; subclasses are frozen dataclasses whose fields are JSON's own types, records, or tuples
    and mappings of these.

    Example:
        >>> @dataclasses.dataclass(frozen=True)
        ... class Size(Record):
        ...     height: int
        ...     width: int
        ...     note: str | None = optional()
        >>> Size.from_dict({"height": 4, "width": 6, "of another version": True})
        Size(height=4, width=6, note=None)
        >>> Size(4, 6).to_dict()
        {'height': 4, 'width': 6}
    """

    def to_dict(self) -> dict[str, Any]:
        """The record as plain JSON values: dicts, lists, strings and numbers."""
        found = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None:
                found[field.name] = _plain(value)
            elif not field.metadata.get(_LEFT_OUT):
                found[field.name] = {} if field.metadata.get(_SECTION) else None
        return found

    @classmethod
    def from_dict(cls: type[_Self], value: Mapping[str, Any]) -> _Self:
        """Reads a record that this or another version wrote.

        Args:
            value: plain JSON values. Unknown keys are ignored; a missing field gets its default, or else an empty
                value: 0, "", (), {} or None.

        Raises:
            RecordError: a value does not have its field's type, or a field of a fixed number of values is missing.
        """
        return typing.cast(_Self, _read(cls, value, cls.__name__))

    @classmethod
    def part_of(cls: type[_Self], whole: Any) -> _Self:
        """A record with fields taken from a larger record, or from any object that has them."""
        return cls(**{field.name: getattr(whole, field.name) for field in dataclasses.fields(cls)})

    @classmethod
    def problems(cls, value: Any) -> list[str]:
        """How a value deviates from this version's form, in words: wrong types, missing keys and unknown keys."""
        return list(_problems(cls, value, cls.__name__))


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageResult(Record):
    """What a stage returns, as the manifest keeps it.

    Attributes:
        summary: one line for people.
    """

    summary: str


@functools.cache
def _hints(record: type) -> dict[str, Any]:
    return typing.get_type_hints(record)


def _plain(value: Any) -> Any:
    if isinstance(value, Record):
        return value.to_dict()
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(part) for part in value]
    return value.tolist() if hasattr(value, "tolist") else value  # numpy's


def _is_record(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Record)


def _is_union(kind: Any) -> bool:
    return typing.get_origin(kind) in (typing.Union, types.UnionType)


def _read(kind: Any, value: Any, where: str) -> Any:
    """Converts a JSON value to a field's type."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if _is_union(kind):
        return _read_union(parts, value, where)
    if _is_record(kind):
        return _read_record(kind, _require(value, Mapping, where), where)
    if origin is tuple:
        items = _require(value, list | tuple, where)
        kinds = [parts[0]] * len(items) if parts[-1] is Ellipsis else parts
        if len(kinds) != len(items):
            raise RecordError(f"{where}: {len(items)} values, expected {len(kinds)}")
        return tuple(_read(part, item, f"{where}[{i}]") for i, (part, item) in enumerate(zip(kinds, items)))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        items = _require(value, Mapping, where)
        return {str(key): _read(parts[1], item, f"{where}.{key}") for key, item in items.items()}
    if kind is float and value is None:
        return float("nan")  # JSON has no other way to say it
    return _require(value, (int, float) if kind is float else kind, where)


def _read_union(parts: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in parts:
        return None
    errors = []
    for part in parts:
        try:
            return _read(part, value, where)
        except RecordError as e:
            errors.append(e)
    raise errors[0]


def _read_record(kind: Any, value: Mapping[str, Any], where: str) -> Any:
    hints, found = _hints(kind), {}
    for field in dataclasses.fields(kind):
        if field.metadata.get(_SECTION) and not value.get(field.name):
            continue
        if field.name in value:
            found[field.name] = _read(hints[field.name], value[field.name], f"{where}.{field.name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            found[field.name] = _empty(hints[field.name], f"{where}.{field.name}")
    return kind(**found)


def _empty(kind: Any, where: str) -> Any:
    """The value of a field that a file lacks."""
    origin = typing.get_origin(kind)
    if origin is tuple:
        if typing.get_args(kind)[-1] is not Ellipsis:
            raise RecordError(f"{where}: missing")  # so many values, which nothing stands for
        return ()
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return {}
    return _read_record(kind, {}, where) if _is_record(kind) else _ZEROS.get(kind)


def _require(value: Any, kinds: Any, where: str) -> Any:
    if not isinstance(value, kinds) or (isinstance(value, bool) and kinds in (int, (int, float))):
        name = getattr(kinds, "__name__", str(kinds)).lower()
        raise RecordError(f"{where}: {value!r:.60} is not of type {name}")
    return value


def _problems(kind: Any, value: Any, where: str) -> Iterator[str]:
    """See `Record.problems`; follows records through tuples, mappings and unions."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if _is_union(kind):
        if value is not None or type(None) not in parts:
            found = [list(_problems(part, value, where)) for part in parts if part is not type(None)]
            yield from min(found, key=len)
    elif _is_record(kind) and isinstance(value, Mapping):
        fields = {field.name: field for field in dataclasses.fields(kind)}
        yield from (f"{where}.{key}: no such key" for key in value if key not in fields)
        for name, field in fields.items():
            if field.metadata.get(_SECTION) and value.get(name) == {}:
                continue
            if name in value:
                yield from _problems(_hints(kind)[name], value[name], f"{where}.{name}")
            elif not field.metadata.get(_LEFT_OUT):
                yield f"{where}.{name}: missing"
    elif origin is tuple and isinstance(value, list) and parts[-1] is Ellipsis:
        for i, item in enumerate(value):
            yield from _problems(parts[0], item, f"{where}[{i}]")
    elif isinstance(origin, type) and issubclass(origin, Mapping) and isinstance(value, Mapping):
        for key, item in value.items():
            yield from _problems(parts[1], item, f"{where}.{key}")
    else:
        try:
            _read(kind, value, where)
        except RecordError as e:
            yield str(e)
