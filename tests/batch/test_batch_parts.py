"""The small parts of a batch, value by value: conditions, sweeps, what a job is estimated at, memory of the machine."""

import pathlib
import types

import numpy as np
import pytest

from vit_convert.batch import machine
from vit_convert.batch.estimate import Corrected, Estimate, estimate, is_here
from vit_convert.batch.job import Job
from vit_convert.batch.sweep import Hyper, settings_of_flags, settings_of_hyper
from vit_convert.batch.where import Where
from vit_convert.core.errors import UsageError

# --- conditions -------------------------------------------------------------------------------------------------------


def holds(text, **row):
    return Where(text, ["a", "b", *row]).holds(row)


@pytest.mark.parametrize("word", ["==", "!=", "<", "<=", ">", ">=", "in", "not in"])
def test_comparisons_are_pythons(word):
    for a in (1, 2, 3):
        right = "(2, 5)" if "in" in word else "2"
        assert holds(f"a {word} {right}", a=a) is eval(f"{a} {word} {right}")


@pytest.mark.parametrize("sign", ["+", "-", "*", "/", "%"])
def test_arithmetic_is_pythons(sign):
    assert holds(f"a {sign} b == {eval(f'7 {sign} 4')}", a=7, b=4)
    assert not holds(f"a {sign} b == {eval(f'7 {sign} 4')}", a=7, b=5)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a < 3", False), ("a > 3", False), ("3 <= a", False), ("a >= a", False), ("a in b", False),
        ("a not in b", True), ("a in (None, 1)", True), ("a not in (None, 1)", False), ("a == None", True),
        ("1 < 2 < a", False), ("3 in a", False), ("3 not in a", True), ("a", False), ("not a", True),
        ("a == None and b == None", True), ("a == 1 or b == None", True), ("a == 1 or b == 1", False),
        ("-2 == 0 - 2", True),
        ("1 < 2 > 3", False), ("1 < 2 == 2", True),
    ],
)  # fmt: skip
def test_empty_cells(text, expected):
    assert holds(text) is expected
    assert holds(text, a=None) is expected


@pytest.mark.parametrize(
    "text", ["not " * 2000 + "a", f"{'1' * 400} / 3 == a", "'x' + 'y' == a", "a + 1 == 2", "-b == 1"]
)
def test_what_cannot_be_told_is_one_message(text):
    with pytest.raises(UsageError, match="--where="):
        holds(text, a=None, b="text")


# --- sweeps -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], [{}]),
        (["config.precision=fp16"], [{"precision": "fp16"}]),
        (
            ["config.precision=fp16,int8", "config.input=uint8, float32"],
            [{"precision": p, "input": i} for p in ("fp16", "int8") for i in ("uint8", "float32")],
        ),
        (["config.precision=fp16,int8;fp32"], [{"precision": "fp16,int8"}, {"precision": "fp32"}]),
        (["config.image_size=(224,384),160"], [{"image_size": "(224,384)"}, {"image_size": "160"}]),
        (["config.keep_fp32=[a,b],[c]"], [{"keep_fp32": "[a,b]"}, {"keep_fp32": "[c]"}]),
        (["config.precision=fp16,fp16"], [{"precision": "fp16"}]),
    ],
)
def test_what_flags_sweep(words, expected):
    assert settings_of_flags(words) == expected


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["config.precision"], "config.precision has no values"),
        (["config.precision="], "config.precision has no values"),
        (["config.precision= "], "config.precision has no values"),
        (["config.name=a,b"], "config.name is not a key that can be swept"),
        (["config.checkpoint=a,b"], "config.checkpoint is not a key that can be swept"),
        (["config.precision=fp16", "config.precision=int8"], "config.precision swept twice"),
        (["config.precisoin=fp16"], "precisoin"),
    ],
)
def test_what_is_no_sweep(words, said):
    with pytest.raises(UsageError, match=said):
        settings_of_flags(words)


def test_what_a_get_hyper_may_call():
    hyper = Hyper()
    assert hyper.sweep("a", [1, 2]) == [{"a": 1}, {"a": 2}]
    assert hyper.fixed("a", 1) == [{"a": 1}] and hyper.fixed("a", 1, length=3) == [{"a": 1}] * 3
    a, b, one = hyper.sweep("a", [1, 2]), hyper.sweep("b", [3, 4]), hyper.fixed("c", 5)
    assert hyper.product([a, b]) == [{"a": x, "b": y} for x in (1, 2) for y in (3, 4)]
    assert hyper.product([]) == [{}]
    assert hyper.zipit([a, b, one]) == [{"a": 1, "b": 3, "c": 5}, {"a": 2, "b": 4, "c": 5}]
    assert hyper.zipit([]) == [] and hyper.chainit([a, one]) == [{"a": 1}, {"a": 2}, {"c": 5}]
    with pytest.raises(ValueError, match="zipit of parts of 2, 3 values"):
        hyper.zipit([a, hyper.sweep("b", [1, 2, 3])])


def test_what_a_get_hyper_returns():
    found = settings_of_hyper([{"image_size": 224}, {"config.precision": "fp16", "check.rtol": 0.5}], "c.py")
    assert found == [{"image_size": "224"}, {"precision": "fp16", "check.rtol": "0.5"}]
    assert settings_of_hyper([], "c.py") == [{}]
    for made in (None, {"image_size": 224}, [1], "text"):
        with pytest.raises(UsageError, match=r"c\.py: get_hyper\(\) returned"):
            settings_of_hyper(made, "c.py")


# --- estimates --------------------------------------------------------------------------------------------------------


def job(path, *words):
    return Job("x", str(path), words)


def test_estimates_grow_as_measured(tmp_path):
    """docs/benchmarks.md: 437 MiB and 1 s, and 4.7 bytes and 38 ns a parameter; 7.5 bytes more to quantize, and
    2.3 ns an image."""
    path = tmp_path / "m.npz"
    np.savez(path, a=np.zeros((1000, 1000), np.float16), b=np.zeros(48_576, np.int8))
    plain = estimate(job(path))
    assert (plain.num_params, plain.kind, plain.known) == (1_048_576, (1_048_576, "fp16"), True)
    assert plain.memory_mib == pytest.approx(437 + 4.7) and plain.seconds == pytest.approx(1 + 0.0398, abs=1e-3)
    for precision in ("int8", "fp16,int8", "fp8", "auto"):
        found = estimate(job(path, f"--config.precision={precision}"))
        assert found.memory_mib == pytest.approx(437 + 4.7 + 7.5) and found.kind[1] == precision
        assert found.seconds == pytest.approx(1 + 0.0398 + 2.3e-9 * 512 * 1_048_576, rel=1e-3)
    fewer = estimate(job(path, "--config.precision=int8", "--config.calibration.num_images=64"))
    assert fewer.seconds == pytest.approx(1 + 0.0398 + 2.3e-9 * 64 * 1_048_576, rel=1e-3)
    for words in (("--config.precision=fp16,fp32",), ("--config.precision=int8", "--config.precision=fp32")):
        assert estimate(job(path, *words)).memory_mib == plain.memory_mib  # the last of two counts
    assert estimate(job(path, "--config.xprecision=int8", "--config.precision_plan=int8")).kind == plain.kind


def test_a_part_of_a_file_and_addresses_are_looked_for_where_they_may_lie(tmp_path):
    path = tmp_path / "m.npz"
    np.savez(path, a=np.zeros(10, np.float32))
    folders = [str(tmp_path / "none"), str(tmp_path)]
    for checkpoint in (f"{path}:img", "m.npz:img", "m.npz", "gs://bucket/folder/m.npz", "gs://bucket/m.npz#5:img"):
        found = estimate(job(checkpoint), folders)
        assert (found.known, found.num_params) == (True, 10), checkpoint
        assert is_here(job(checkpoint), folders), checkpoint
    assert not estimate(job("gs://bucket/m.npz")).known and not is_here(job("gs://bucket/m.npz"))
    assert is_here(job("")) and is_here(job("gone.npz"))  # a path says by itself that it is not there


def test_estimates_learn_from_what_was_measured():
    small, large = (Estimate((count, "fp16"), count, 1.0, mib, True) for count, mib in ((1, 100.0), (2, 400.0)))
    found = Corrected()
    assert (found.memory_mib(small), found.memory_mib(large)) == (100.0, 400.0)
    found.learn(small, 0.0)  # nothing was measured
    assert found.memory_mib(small) == 100.0
    found.learn(small, 50.0)
    assert found.memory_mib(small) == pytest.approx(55.0) and found.memory_mib(large) == 400.0
    found.learn(small, 150.0)
    found.learn(small, 120.0)  # the highest counts
    assert found.memory_mib(small) == pytest.approx(165.0) and found.memory_mib(large) == pytest.approx(600.0)
    found.learn(large, 400.0)
    assert found.memory_mib(large) == pytest.approx(440.0)


# --- the machine ------------------------------------------------------------------------------------------------------


@pytest.fixture
def files(monkeypatch):
    """What /proc and /sys say; other files are not there."""
    told = {}

    def read_text(path):
        if str(path) not in told:
            raise FileNotFoundError(str(path))
        return told[str(path)]

    monkeypatch.setattr(pathlib.Path, "read_text", read_text)
    return told


V2 = "/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"
V1 = "/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"


def test_free_memory_is_what_system_and_container_leave(files):
    assert machine.free_memory_gib() == 8.0  # nothing tells
    files["/proc/meminfo"] = "MemTotal: 33554432 kB\nMemAvailable:   16777216 kB\nMemAvailableX: 1 kB\n"
    assert machine.free_memory_gib() == pytest.approx(0.9 * 16)
    files |= dict(zip(V2, ("max\n", "5")))
    assert machine.free_memory_gib() == pytest.approx(0.9 * 16)
    files |= dict(zip(V1, (f"{12 << 30}", f"{8 << 30}\n")))
    assert machine.free_memory_gib() == pytest.approx(0.9 * 4)
    files |= dict(zip(V2, (f"{7 << 30}", f"{5 << 30}")))  # the newer kind first
    assert machine.free_memory_gib() == pytest.approx(0.9 * 2)
    files |= dict(zip(V2, ("5", "7")))  # more than allowed is used for a moment
    assert machine.free_memory_gib() == 0.0
    files["/proc/meminfo"] = "MemTotal: 1 kB\n"
    assert machine.free_memory_gib() == 0.0


def test_memory_of_a_process(files, monkeypatch):
    monkeypatch.setattr(machine, "os", types.SimpleNamespace(sysconf=lambda name: {"SC_PAGE_SIZE": 65_536}[name]))
    files |= {"/proc/7/statm": "900 32 5 1", "/proc/8/statm": "", "/proc/9/statm": "a b c"}
    assert [machine.rss_mib(pid) for pid in (7, 8, 9, 10)] == [2.0, 0.0, 0.0, 0.0]
