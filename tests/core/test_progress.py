"""events.jsonl, and what people read."""

import json

import pytest

from vit_convert.core.progress import Progress, human_bytes, human_seconds


def test_events_are_json_lines(tmp_path, capsys):
    progress = Progress(tmp_path / "events.jsonl")
    progress.event("start", stage="export", path=tmp_path)
    progress.say('a "quoted"\nline with ü')
    progress.warn("careful")
    lines = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [line["event"] for line in lines] == ["start", "message", "warning"]
    assert lines[0]["stage"] == "export"
    assert lines[1]["text"] == 'a "quoted"\nline with ü'
    assert all(abs(line["time"] - lines[0]["time"]) < 60 for line in lines)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "warning: careful" in captured.err


def test_quiet_prints_nothing_and_still_records(tmp_path, capsys):
    progress = Progress(tmp_path / "events.jsonl", quiet=True)
    progress.say("one")
    progress.warn("two")
    with progress.bar("three", total=2) as advance:
        advance(1)
    assert capsys.readouterr() == ("", "")
    assert len((tmp_path / "events.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize(("seconds", "text"), [(0.44, "0.4 s"), (12.3, "12 s"), (200, "3 min 20 s")])
def test_seconds(seconds, text):
    assert human_seconds(seconds) == text


@pytest.mark.parametrize(("count", "text"), [(812, "812 B"), (3 * 2**20 + 2**17, "3.1 MiB"), (5 * 2**30, "5.00 GiB")])
def test_bytes(count, text):
    assert human_bytes(count) == text
