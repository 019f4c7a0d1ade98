"""events.jsonl, and what people read."""

import contextlib
import io
import json
import sys

import pytest

from vit_convert.core import progress as module
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
    assert captured.err == 'a "quoted"\nline with ü\nwarning: careful\n'


def test_quiet_prints_nothing_and_still_records(tmp_path, capsys):
    progress = Progress(tmp_path / "events.jsonl", quiet=True)
    progress.say("one")
    progress.warn("two")
    with progress.bar("three", total=2) as advance:
        advance(1)
    assert capsys.readouterr() == ("", "")
    assert len((tmp_path / "events.jsonl").read_text().splitlines()) == 2


SECONDS = [
    (0.44, "0.4 s"),
    (9.94, "9.9 s"),
    (10, "10 s"),
    (12.3, "12 s"),
    (119.4, "119 s"),
    (120, "2 min 0 s"),
    (200.9, "3 min 20 s"),
]


@pytest.mark.parametrize(("seconds", "text"), SECONDS)
def test_seconds(seconds, text):
    assert human_seconds(seconds) == text


BYTES = [
    (812, "812 B"),
    (1023, "1023 B"),
    (1024, "1.0 KiB"),
    (3 * 2**20 + 2**17, "3.1 MiB"),
    (2**30, "1.00 GiB"),
    (5 * 2**30, "5.00 GiB"),
]


@pytest.mark.parametrize(("count", "text"), BYTES)
def test_bytes(count, text):
    assert human_bytes(count) == text


def test_the_time_is_in_milliseconds(tmp_path, monkeypatch):
    monkeypatch.setattr(module.time, "time", lambda: 1234.56789)
    Progress(tmp_path / "events.jsonl").event("x")
    assert json.loads((tmp_path / "events.jsonl").read_text()) == {"time": 1234.568, "event": "x"}


def test_an_event_of_which_a_part_was_written_takes_no_other_with_it(tmp_path, monkeypatch):
    """On a disk that was full in between: the next line begins on a line of its own."""
    path, progress, room = tmp_path / "events.jsonl", Progress(tmp_path / "events.jsonl"), [5]

    def narrow(file, mode, buffering):
        stream = open(file, mode, buffering=buffering)  # noqa: SIM115

        class Narrow:
            def write(self, data):
                return stream.write(data[: room.pop()] if room else data)

        assert buffering == 0  # else the file's end would tell of it too late
        return contextlib.nullcontext(Narrow())

    monkeypatch.setattr(module, "open", narrow, raising=False)
    for kind in ("torn", "whole", "last"):
        progress.event(kind)
    torn, *lines = path.read_text().splitlines()
    assert len(torn) == 5 and [json.loads(line)["event"] for line in lines] == ["whole", "last"]


def test_an_event_that_cannot_be_written_is_lost(tmp_path):
    Progress(tmp_path / "no" / "events.jsonl").event("x")
    Progress(None).event("x")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def drawn(monkeypatch, total, terminal, **options):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress(**options).bar("Ranges", total=total) as advance:
        advance(1)
    return terminal.getvalue()


def test_a_bar(monkeypatch):
    """How far it is where that is known, and gone at the end."""
    half, open_ended = (drawn(monkeypatch, total, Terminal()) for total in (2, None))
    assert "Ranges" in half and " 50%" in half and "Ranges" in open_ended and "%" not in open_ended
    for text in (half, open_ended):
        assert text.endswith("\x1b[1A\x1b[2K")  # up, and the line erased
    # the time that is left, beside the time that went
    assert half.count(":--") + half.count(":00") > open_ended.count(":00") > 0


@pytest.mark.parametrize("total", [2, None])
def test_no_bar_where_nobody_looks(monkeypatch, total):
    assert "Ranges" not in drawn(monkeypatch, total, io.StringIO())
    assert drawn(monkeypatch, total, Terminal(), quiet=True) == ""
