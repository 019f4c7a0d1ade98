"""Every record of the package: frozen, built by the names of its fields, and empty where a file lacks a key.

Records are found by importing their rooms, so that a new one is held to the same.
"""

import dataclasses
import importlib
import json
import pkgutil
import typing

import vit_convert
from vit_convert.core.record import Record, RecordError

ROOMS = ("core", "report", "batch", "engine")
# Built by the places of their fields, in rooms of results; subclasses have their base's form.
BY_PLACE = {"Measured", "PairResult", "RuleCount", "SimilarityCheck"}
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
# Keys without which there is no such record; others that cannot be empty refuse it by themselves.
NEEDED = {
    "PairFacts": {"similarity": "sigmoid"},
    "PairResult": {"similarity": "sigmoid"},
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


def empty(kind):
    """The record of a file that lacks all but what it needs; None of one that refuses that."""
    try:
        return kind.from_dict(NEEDED.get(kind.__name__, {}))
    except RecordError:
        return None


EMPTY = {kind: found for kind in RECORDS if (found := empty(kind)) is not None}


def test_there_are_many():
    assert len(EMPTY) > 80 and len(RECORDS) - len(EMPTY) < 10


def test_all_are_frozen_and_those_of_results_built_by_names():
    own = [kind for kind in RECORDS if "__dataclass_params__" in vars(kind)]
    assert own == RECORDS  # another's fields would be its base's
    assert [kind for kind in RECORDS if not vars(kind)["__dataclass_params__"].frozen] == []
    results = [kind for kind in RECORDS if kind.__module__.endswith(("_results", "_record", "report.record"))]
    assert {
        kind.__name__ for kind in results if not all(field.kw_only for field in dataclasses.fields(kind))
    } == BY_PLACE


def test_what_a_file_lacks_is_empty():
    for kind, found in EMPTY.items():
        needed = NEEDED.get(kind.__name__, {})
        for field in dataclasses.fields(kind):
            place, value = (kind.__name__, field.name), getattr(found, field.name)
            if place in NOT_EMPTY:
                assert value == NOT_EMPTY[place], place
            elif field.name not in needed:
                assert not value or value == type(value).from_dict({}), place
                assert type(value) is bool or typing.get_type_hints(kind)[field.name] is not bool, place


def test_empty_ones_are_written_and_read_again():
    for kind, found in EMPTY.items():
        written = json.loads(json.dumps(found.to_dict()))
        assert kind.from_dict(written) == found and kind.problems(written) == [], kind
