"""Records: what is written is read again, files of other versions too, and what has another form is refused by name."""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from vit_convert.core.bundle import read_json, write_json
from vit_convert.core.record import Record, RecordError, optional, section


@dataclasses.dataclass(frozen=True)
class Part(Record):
    """A record within another."""

    name: str
    size: tuple[int, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Whole(Record):
    """One field of each kind."""

    count: int
    rate: float
    on: bool
    words: tuple[str, ...]
    parts: tuple[Part, ...]
    by_name: Mapping[str, Part]
    anything: Mapping[str, Any]
    unknown: float | None
    missing: str | None = optional()
    one: Part | None = section()
    later: int = 7


PART = {"name": "a", "size": [2, 3]}
FULL = {
    "count": 3,
    "rate": 0.5,
    "on": True,
    "words": ["a", "b"],
    "parts": [PART],
    "by_name": {"x": PART},
    "anything": {"k": [1, {"l": None}]},
    "unknown": None,
    "missing": "m",
    "one": PART,
    "later": 8,
}


def test_what_is_written_is_read_again():
    found = Whole.from_dict(FULL)
    assert found.to_dict() == FULL and Whole.problems(FULL) == []
    assert (found.parts[0].size, found.by_name["x"].name, found.one) == ((2, 3), "a", Part("a", (2, 3)))
    assert Whole.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_what_an_earlier_version_lacked_is_empty_and_what_a_later_one_adds_is_passed_over():
    found = Whole.from_dict({"later one": 1})
    assert found == Whole(
        count=0, rate=0.0, on=False, words=(), parts=(), by_name={}, anything={}, unknown=None, missing=None, one=None
    )
    assert found.later == 7 and "missing" not in found.to_dict() and found.to_dict()["one"] == {}
    assert Whole.from_dict(found.to_dict()) == found and Whole.problems(found.to_dict()) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"count": "3"}, "Whole.count: '3' is not of type int"),
        ({"count": True}, "Whole.count: True is not of type int"),
        ({"count": 2.5}, "Whole.count: 2.5 is not of type int"),
        ({"on": 1}, "Whole.on: 1 is not of type bool"),
        ({"rate": "x"}, "Whole.rate: 'x' is no"),
        ({"words": "ab"}, "Whole.words: 'ab' is no"),
        ({"parts": [PART, {**PART, "size": [1]}]}, r"Whole.parts\[1\].size: 1 values, expected 2"),
        ({"by_name": {"x": 3}}, "Whole.by_name.x: 3 is not of type mapping"),
        ({"one": [1]}, r"Whole.one: \[1\] is not of type mapping"),
        ({"missing": 3}, "Whole.missing: 3 is not of type str"),
    ],
)
def test_another_form_is_refused_by_name(change, said):
    with pytest.raises(RecordError, match=said):
        Whole.from_dict({**FULL, **change})
    assert len(Whole.problems({**FULL, **change})) == 1


def test_what_has_so_many_values_cannot_be_missing():
    """(1, 2) of a later version's file that has another name for it, which () would stand for, breaks its readers."""
    with pytest.raises(RecordError, match=r"^Whole.parts\[0\].size: missing$"):
        Whole.from_dict({**FULL, "parts": [{"name": "a"}]})


def test_problems_name_keys_that_are_missing_or_unknown():
    value = {key: part for key, part in FULL.items() if key not in ("count", "missing")}
    assert Whole.problems({**value, "parts": [{**PART, "new": 1}]}) == [
        "Whole.count: missing",
        "Whole.parts[0].new: no such key",
    ]


def test_numbers_of_numpy_and_those_that_are_not_finite(tmp_path):
    found = dataclasses.replace(Whole.from_dict(FULL), count=np.int64(3), rate=np.float32(0.5), unknown=math.inf)
    assert found.to_dict()["count"] == 3 and type(found.to_dict()["rate"]) is float
    write_json(tmp_path / "a.json", {"record": dataclasses.replace(found, rate=math.nan)})
    read = read_json(tmp_path / "a.json")["record"]
    assert read["rate"] is None and math.isnan(Whole.from_dict(read).rate)  # JSON has no other way to say it


def test_part_of():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Larger(Part):
        more: int

    assert Part.part_of(Larger(name="a", size=(1, 2), more=3)) == Part("a", (1, 2))


def test_what_is_wrong_behind_an_empty_section_is_found_too():
    assert [line for line in Whole.problems({**FULL, "one": {}, "later": "x"}) if "later" in line]


@pytest.mark.parametrize("wrong", [{"count": {"a": 1}}, {"by_name": 3}, {"words": {"a": "b"}}])
def test_a_mapping_where_none_belongs_and_none_where_one_does_are_named(wrong):
    (key,) = wrong
    (problem,) = Whole.problems({**FULL, **wrong})
    assert f".{key}" in problem
