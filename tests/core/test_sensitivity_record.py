"""Whether what an earlier run measured holds for this one."""

import dataclasses

import pytest

from vit_convert.core.sensitivity_record import Measured, SensitivityRecord

RECORD = SensitivityRecord.from_dict(
    {
        "precision": "int8",
        "rest": "fp16",
        "source": "evaluation images",
        "num_images": 48,
        "scan_images": 24,
        "labelled": True,
        "key": {"graph": "abc"},
        "units": {"block_00/fc1": {"sites": ["block_00/fc1"], "num_weights": 4}},
    }
)
# A value before, and one after, each of the record's in any order: neither is the same case.
OTHERS = {
    "precision": ("fp8", "int9"),
    "rest": ("fp15", "fp32"),
    "source": ("calibration images", "seeded noise"),
    "num_images": (47, 49),
    "scan_images": (23, 25),
    "labelled": (False,),
    "key": ({"graph": "abd"}, {"graph": "abc", "seed": 1}, {}),
    "units": ({}, {**RECORD.units, "block_00/fc2": RECORD.units["block_00/fc1"]}),
}


def test_the_same_case_whatever_was_measured_of_it():
    row = Measured.from_dict({"quantized": ["block_00/fc1"], "error": 0.1})
    more = dataclasses.replace(RECORD, measured=(row,), judged=(row, row))
    assert RECORD.same_case(more) and more.same_case(RECORD) and RECORD.same_case(RECORD)


@pytest.mark.parametrize("field", OTHERS)
def test_another_case(field):
    for value in OTHERS[field]:
        other = dataclasses.replace(RECORD, **{field: value})
        assert RECORD.same_case(other) is False and other.same_case(RECORD) is False


def test_every_field_tells_cases_apart_but_the_measurements():
    assert {field.name for field in dataclasses.fields(RECORD)} == {*OTHERS, "measured", "judged"}
