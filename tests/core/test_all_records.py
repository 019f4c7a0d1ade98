"""Every record of the package: frozen, built by the names of its fields, and empty where a file lacks a key.

Records are found by importing their rooms, so that a new one is held to the same.
"""

import dataclasses
import importlib
import json
import pkgutil
import typing

import pytest

import vit_convert
from vit_convert.core.record import Record

ROOMS = ("core", "report", "batch", "engine")
# Built by the places of their fields somewhere in the package; subclasses have their base's form.
BY_PLACE = {
    "BatchRecord", "Checked", "Commit", "EngineOutcome", "Figures", "Finding", "ImageRange", "Measured", "Outcome",
    "PairFacts", "PairResult", "Ranking", "RuleCount", "SimilarityCheck", "StoredFile", "_Beat",
}  # fmt: skip
# What a key that a file lacks stands for, where that is not empty: of a conversion that never got further, of a version
# that ran calibration on the processor alone, of a lock's file that is damaged.
NOT_EMPTY = {
    ("Calibration", "device"): "cpu",
    ("CalibrateResult", "device"): "cpu",
    ("EngineOutcome", "status"): "failed",
    ("EngineOutcome", "exit_code"): 1,
    ("Outcome", "status"): "pending",
    ("Holder", "host"): "?",
    ("Holder", "command"): "?",
    ("Holder", "since"): "?",
}
# Keys without which there is no such record.
NEEDED = {
    **dict.fromkeys(("PairFacts", "PairResult"), {"similarity": "sigmoid"}),
    "ImageRange": {"smallest": [1, 2], "optimal": [2, 3], "largest": [3, 4]},
}


def every_record():
    for module in pkgutil.walk_packages(vit_convert.__path__, "vit_convert."):
        if module.name.split(".")[1] in ROOMS and not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    found, new = set(), [Record]
    while new:
        new = [kind for parent in new for kind in parent.__subclasses__() if kind not in found]
        found |= set(new)
    return sorted(
        (kind for kind in found if kind.__module__.startswith("vit_convert.")), key=lambda kind: kind.__qualname__
    )


RECORDS = every_record()
each_record = pytest.mark.parametrize("kind", RECORDS, ids=lambda kind: kind.__name__)


def test_there_are_many():
    assert len(RECORDS) > 80 and {kind.__name__ for kind in RECORDS} > BY_PLACE


@each_record
def test_it_is_frozen_and_built_by_names(kind):
    assert "__dataclass_params__" in vars(kind), "its fields are its base's"
    assert vars(kind)["__dataclass_params__"].frozen
    assert all(field.kw_only for field in dataclasses.fields(kind)) == (kind.__name__ not in BY_PLACE)


@each_record
def test_what_a_file_lacks_is_empty(kind):
    found = kind.from_dict(needed := NEEDED.get(kind.__name__, {}))
    for field in dataclasses.fields(kind):
        value = getattr(found, field.name)
        if field.name in needed:
            continue
        if expected := NOT_EMPTY.get((kind.__name__, field.name)):
            assert value == expected
        else:
            assert not value or value == type(value).from_dict({}), field.name
            assert type(value) is bool or typing.get_type_hints(kind)[field.name] is not bool, field.name


@each_record
def test_an_empty_one_is_written_and_read_again(kind):
    empty = kind.from_dict(NEEDED.get(kind.__name__, {}))
    found = json.loads(json.dumps(empty.to_dict()))
    assert kind.from_dict(found) == empty and kind.problems(found) == []
