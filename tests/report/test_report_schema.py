"""The schema of report.json, held against files that conversions and GPU hosts wrote, of this version and of earlier
ones, and against its documentation."""

import dataclasses
import inspect
import json
import pathlib
import re
import typing

import pytest

from vit_convert.core.bundle import Bundle, write_json
from vit_convert.core.engine_results import Verification
from vit_convert.core.record import Record
from vit_convert.report.record import PairReport, Report, read, read_report, update, write

ROOT = pathlib.Path(__file__).resolve().parents[2]
EARLIER = sorted((ROOT / "benchmarks" / "results").glob("h200-report-*.json"))


def records(kind=Report):
    """All records that a report is made of."""
    found = {kind}
    for hint in typing.get_type_hints(kind).values():
        for part in (hint, *typing.get_args(hint), *(p for a in typing.get_args(hint) for p in typing.get_args(a))):
            if isinstance(part, type) and issubclass(part, Record) and part not in found:
                found |= records(part)
    return found


def test_every_key_is_documented():
    kinds = records() | records(PairReport)
    assert len(kinds) > 35
    for kind in kinds:
        own = set(typing.get_type_hints(kind)) - {
            name for base in kind.__bases__ for name in typing.get_type_hints(base)
        }
        said = set(re.findall(r"^    (\w+): ", inspect.getdoc(kind) or "", re.MULTILINE))
        assert said == own, kind


def test_the_page_has_every_section():
    page = (ROOT / "docs" / "bundle.md").read_text()
    of_a_model, of_a_pair = page.split("## report.json")[1].split("### Of a pair")
    for table, kind in ((of_a_model, Report), (of_a_pair, PairReport)):
        for field in dataclasses.fields(kind):
            assert re.search(rf"^\|[^|]*`{field.name}`", table, re.MULTILINE), field.name


@pytest.mark.parametrize("path", EARLIER, ids=lambda path: path.name)
def test_reports_of_earlier_versions_are_read(path):
    found = json.loads(path.read_text())
    report = Report.from_dict(found)
    assert report.name == found["name"] and report.checkpoint.num_params == found["checkpoint"]["num_params"]
    assert [row.precision for row in report.engines] == [row["precision"] for row in found["engines"]]
    assert len(report.benchmark) == len(found["benchmark"]) > 0
    assert report.benchmark[0].images_per_second == found["benchmark"][0]["images_per_second"]
    assert report.checks["int8"].cosine == found["checks"]["int8"]["cosine"]
    assert Report.problems(report.to_dict()) == []


def test_there_are_earlier_reports():
    assert EARLIER


def test_a_damaged_report_is_none(tmp_path):
    bundle = Bundle(tmp_path)
    for text in ("", "[]", '{"checks": 3}', '{"engines": [1]}'):
        bundle.report.write_text(text)
        assert read_report(bundle) is None
    bundle.report.write_text("{}")
    assert read_report(bundle) == Report.from_dict({})


def test_an_update_changes_nothing_else(tmp_path):
    """What another version wrote, and this one does not know, stays as it was."""
    bundle = Bundle(tmp_path)
    old = {"name": "b", "of a later version": [1], "checks": {"fp32": {"passed": True, "new": 2}}, "verify": {}}
    write_json(bundle.report, old)
    verify = Verification.from_dict({"passed": True})
    update(bundle, lambda report: dataclasses.replace(report, verify=verify), Report)
    assert json.loads(bundle.report.read_text()) == {**old, "verify": verify.to_dict()}
    update(bundle, lambda report: dataclasses.replace(report, verify=None), Report)
    assert json.loads(bundle.report.read_text()) == {key: old[key] for key in old if key != "verify"}


def test_a_missing_report_is_begun(tmp_path):
    bundle = Bundle(tmp_path / "b")
    bundle.require_writable()
    update(bundle, lambda report: dataclasses.replace(report, status="done"), Report)
    found = json.loads(bundle.report.read_text())
    assert (found["name"], found["status"]) == ("b", "done") and Report.problems(found) == []
    write(bundle, Report.from_dict({"name": "c"}))
    assert read_report(bundle) == Report.from_dict({"name": "c"})


def test_a_report_of_the_other_kind_is_none(tmp_path):
    bundle = Bundle(tmp_path)
    write_json(bundle.report, {"name": "b", "pair": {"logit_scale": 1.0, "similarity": "nearest"}})
    assert read(bundle, PairReport) is None
