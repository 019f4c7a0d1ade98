"""What a person sees while a file comes."""

import contextlib

import pytest
from replies import ADDRESS, DATA, NAME, Reply, part_of, whole

from vit_convert.checkpoint import fetch as fetching
from vit_convert.checkpoint.fetch import fetch
from vit_convert.core.progress import Progress


@pytest.fixture
def part(tmp_path):
    return tmp_path / f"{NAME}.part"


class Telling(Progress):
    def __init__(self):
        super().__init__(quiet=True)
        self.said, self.steps, self.totals = [], [], []

    def say(self, text):
        self.said.append(text)

    def bar(self, label, total=None):
        self.totals.append((label, total))
        return contextlib.nullcontext(self.steps.append)


@pytest.mark.parametrize("told", [True, False])
def test_what_is_shown(server, tmp_path, part, monkeypatch, told):
    monkeypatch.setattr(fetching, "_CHUNK_BYTES", 6000)
    server.replies = [whole() if told else Reply()]
    shown = Telling()
    fetch(ADDRESS, tmp_path, progress=shown)
    size = " (10.0 KiB)" if told else ""
    assert shown.said == [f"fetching {ADDRESS}{size} into {tmp_path}/"]
    assert shown.totals == [(f"fetching {NAME}", len(DATA) if told else None)] and shown.steps == [0, 6000, 4240]
    (tmp_path / NAME).unlink()
    part.write_bytes(DATA[:240])
    server.replies = [part_of(240)]
    fetch(ADDRESS, tmp_path, progress=(shown := Telling()))
    assert shown.said[0].endswith(f"into {tmp_path}/, continued") and shown.steps == [240, 6000, 4000]
