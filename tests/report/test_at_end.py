"""The page that commands leave: of the report that is there, not drawn twice, and no reason to fail."""

import errno
import json
import os
import pathlib

import pytest
from test_page import report

from vit_convert.core.bundle import Bundle
from vit_convert.core.progress import Progress
from vit_convert.report import at_end, page
from vit_convert.report.at_end import write_at_end


@pytest.fixture
def drawn(monkeypatch, pages):
    """Names of the reports of each page, which are not really drawn."""
    found = []

    def render(reports, pairs):
        found.append([one["name"] for one in (*pairs, *reports)])
        return "<!doctype html>"

    monkeypatch.setattr(page, "render", render)
    return found


@pytest.fixture
def leave(tmp_path):
    """Writes a report as a command does, and ends the command."""

    def write(wanted=True, **more):
        (tmp_path / "report.json").write_text(json.dumps(report(**more)))
        return write_at_end(Bundle(tmp_path), Progress(quiet=True), wanted=wanted)

    return write


def test_a_page_is_drawn_once_for_each_report(leave, drawn, tmp_path):
    assert leave() and len(drawn) == 1
    fresh = [{"name": "export", "status": "fresh", "seconds": 0.1, "peak_rss_mib": 1.0}]
    assert leave(date="2027-01-01", stages=fresh) and len(drawn) == 1  # nothing was found out
    assert leave(accuracy={"jax": 12.5}) and len(drawn) == 2
    assert (tmp_path / "report.html").read_text().endswith("<!doctype html>")
    assert leave(accuracy={"jax": 12.5}, stages=[{**fresh[0], "status": "failed"}]) and len(drawn) == 3


def test_a_page_of_another_report_does_not_stay(leave, drawn, monkeypatch, tmp_path):
    leave()
    assert leave(wanted=False) and (tmp_path / "report.html").exists()  # it is of this report
    assert not leave(wanted=False, accuracy={"jax": 12.5}) and not (tmp_path / "report.html").exists()
    leave()
    monkeypatch.setattr(at_end, "_NEEDED", ("no_such_module",))
    assert not leave(accuracy={"jax": 12.5}) and not (tmp_path / "report.html").exists()
    leave()
    (tmp_path / "report.json").unlink()
    assert not write_at_end(Bundle(tmp_path), Progress(quiet=True))


def test_a_page_that_cannot_be_drawn_is_no_failure(leave, pages, monkeypatch, tmp_path):
    def fail(reports, pairs):
        raise KeyError("no such figure")

    monkeypatch.setattr(page, "render", fail)
    assert not leave() and not (tmp_path / "report.html").exists()


def test_a_pair_is_shown_tower_by_tower(drawn, tmp_path):
    (tmp_path / "report.json").write_text('{"name": "clip", "towers": {}}')
    for tower in ("image", "text"):
        (tmp_path / tower).mkdir()
        (tmp_path / tower / "report.json").write_text(json.dumps(report(tower)))
    assert write_at_end(Bundle(tmp_path), Progress(quiet=True)) and drawn == [["clip", "clip/image", "clip/text"]]
    assert (tmp_path / "report.html").is_file()
    (tmp_path / "text" / "report.json").unlink()  # as of a conversion that failed between them
    (tmp_path / "report.json").write_text('{"name": "clip", "towers": {}, "checks": {"fp16": {"top1": 50.0}}}')
    assert write_at_end(Bundle(tmp_path), Progress(quiet=True)) and drawn[1:] == [["clip", "clip/image"]]


def test_a_zoo_is_compared_in_a_table():
    from vit_convert.report.page import render

    text = render([report(f"model {number}", status="failed" if number == 7 else "done") for number in range(40)])
    assert text.count("<svg") == 0 and text.count("<section>") == 0 and text.count("<tr><td>model ") == 40
    assert text.count('<td class="bad">failed') == 1 and "model 0 and 39 more" in text


def test_a_folder_that_became_read_only_is_no_reason_to_fail(leave, drawn, tmp_path, monkeypatch):
    """The old page cannot be taken away: the command ends by what it has to say itself."""

    def refuse(self, missing_ok=False):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), os.fspath(self))

    assert leave()
    monkeypatch.setattr(pathlib.Path, "unlink", refuse)
    assert not leave(checkpoint={"path": "other.npz"}) and len(drawn) == 1
