"""What the machine says of itself, or does not."""

import gc
import os
import pathlib
import platform
import types

import pytest

from vit_convert.core import host

CPUINFO = (
    "processor\t: 0\nvendor_id\t: X\nmodel name\t: Some CPU: fast\nmodel\t\t: 7\n\nprocessor\t: 1\nmodel name\t: B\n"
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [(CPUINFO, "Some CPU: fast"), ("processor\t: 0\nmodel\t: 7\n", "by Python"), (None, "by Python")],
)
def test_the_name_of_the_processor(monkeypatch, tmp_path, text, expected):
    file = tmp_path / "cpuinfo"
    if text is not None:
        file.write_text(text)
    asked = []
    monkeypatch.setattr(platform, "processor", lambda: "by Python")
    monkeypatch.setattr(
        host, "pathlib", types.SimpleNamespace(Path=lambda path: asked.append(path) or pathlib.Path(file))
    )
    assert host.cpu_model() == expected and asked == ["/proc/cpuinfo"]


def test_only_cores_that_this_process_may_use_count(monkeypatch):
    """A container or a scheduler may give it two of a hundred."""
    monkeypatch.setattr(os, "sched_getaffinity", {0: {3, 7, 11}}.__getitem__, raising=False)  # 0 is this process
    assert host.num_cores() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    for told, expected in ((6, 6), (None, 1)):
        monkeypatch.setattr(os, "cpu_count", lambda told=told: told)
        assert host.num_cores() == expected


class Library:
    """Of C, that counts."""

    def __init__(self, **names):
        self.__dict__.update(names)


@pytest.mark.parametrize(("options", "collected"), [({}, 1), ({"collect": True}, 1), ({"collect": False}, 0)])
def test_memory_goes_back(monkeypatch, options, collected):
    calls, trimmed = [], []
    monkeypatch.setattr(gc, "collect", lambda: calls.append(1))
    monkeypatch.setattr(host.ctypes, "CDLL", {None: Library(malloc_trim=trimmed.append)}.__getitem__)
    host.give_memory_back(**options)
    assert (len(calls), trimmed) == (collected, [0])  # 0: keep no more than there has to be
    monkeypatch.setattr(host.ctypes, "CDLL", {None: Library()}.__getitem__)
    host.give_memory_back(**options)  # musl's has none
