"""Every record of the package: frozen, built by the names of its fields, and empty where a file lacks a key.

Records are found by importing their rooms, so that a new one is held to the same.
"""

import dataclasses
import importlib
import json
import pkgutil
import typing

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
    return kind.from_dict(NEEDED.get(kind.__name__, {}))


def test_there_are_many():
    assert len(RECORDS) > 80 and {kind.__name__ for kind in RECORDS} > BY_PLACE


def test_all_are_frozen_and_built_by_names():
    own = [kind for kind in RECORDS if "__dataclass_params__" in vars(kind)]
    assert own == RECORDS  # another's fields would be its base's
    assert [kind for kind in RECORDS if not vars(kind)["__dataclass_params__"].frozen] == []
    assert {
        kind.__name__ for kind in RECORDS if not all(field.kw_only for field in dataclasses.fields(kind))
    } == BY_PLACE


def test_what_a_file_lacks_is_empty():
    for kind in RECORDS:
        found, needed = empty(kind), NEEDED.get(kind.__name__, {})
        for field in dataclasses.fields(kind):
            place, value = (kind.__name__, field.name), getattr(found, field.name)
            if place in NOT_EMPTY:
                assert value == NOT_EMPTY[place], place
            elif field.name not in needed:
                assert not value or value == type(value).from_dict({}), place
                assert type(value) is bool or typing.get_type_hints(kind)[field.name] is not bool, place


def test_empty_ones_are_written_and_read_again():
    for kind in RECORDS:
        found = json.loads(json.dumps(empty(kind).to_dict()))
        assert kind.from_dict(found) == empty(kind) and kind.problems(found) == []
