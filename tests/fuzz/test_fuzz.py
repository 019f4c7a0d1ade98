"""The fuzzers' corpora replayed, which hold what each once found; and a few seconds of fuzzing of each target."""

import io
import pathlib
import subprocess
import sys
import tracemalloc
import zipfile

import fuzz_targets
import pytest
from fuzz_targets import TARGETS, attempt, bound

HERE = pathlib.Path(__file__).parent
SEEDS = sorted(path.relative_to(HERE / "corpus") for path in (HERE / "corpus").rglob("*") if path.is_file())
# Those that are sound, or nearly so: a reader that refuses everything would pass all the rest.
ACCEPTED = {
    "npz": {"stored", "deflated", "member", "member2", "fortran", "scalar"},
    "safetensors": {"header", "empty", "file"},
    "msgpack": {"file", "cut", "values"},
    "tables": {"csv", "tsv", "txt", "folder", "zip", "unlabelled"},
    "calibration_cache": {"sound"},
    "precision_plan": {"sound"},
    "image_arrays": {"stored", "deflated", "images", "labels"},
    "archive": {"stored", "deflated"},
    "text": {"ids", "prompts", "words", "merges", "json", "pieces"},
}


@pytest.fixture
def traced():
    tracemalloc.start()
    yield
    tracemalloc.stop()


@pytest.mark.parametrize("seed", SEEDS, ids=str)
def test_corpus(seed, traced):
    name = seed.parts[0]
    found = attempt(TARGETS[name], (HERE / "corpus" / seed).read_bytes())
    assert name not in ACCEPTED or found.refused == (seed.name not in ACCEPTED[name])


def test_every_target_has_a_corpus():
    assert {seed.parts[0] for seed in SEEDS} == set(TARGETS)


def test_the_bound_and_the_kind_of_failure_are_seen(traced):
    with pytest.raises(AssertionError, match="bytes allocated to read 1"):
        attempt(lambda data, folder: len(bytes(bound(1) + 1)), b"x")
    with pytest.raises(ZeroDivisionError):
        attempt(lambda data, folder: 1 // 0, b"")


@pytest.mark.parametrize("target", ["npz", "image_arrays"])
def test_a_header_that_inflates_to_gigabytes_is_not_inflated(target, traced, monkeypatch):
    """64 MiB of blanks in a header of npy version 2.0: 64 KiB of file."""
    monkeypatch.setattr(fuzz_targets, "_TEMPORARY", None)
    header = io.BytesIO()
    with zipfile.ZipFile(header, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("images.npy", b"\x93NUMPY\2\0" + (64 << 20).to_bytes(4, "little") + b" " * (64 << 20))
    assert len(header.getvalue()) < 1 << 17
    assert attempt(TARGETS[target], b"z" + header.getvalue()).refused


@pytest.mark.parametrize("target", sorted(TARGETS))
def test_a_few_seconds_of_fuzzing(target, tmp_path):
    """From one seed, so that it finds the same on every machine: what is new is found by longer runs of run.py."""
    pytest.importorskip("atheris")
    limits = ["--seconds=3", "--runs=3000", "--seed=1"]
    command = [sys.executable, HERE / "run.py", f"--target={target}", *limits, f"--findings={tmp_path}"]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + "\n".join(path.read_text() for path in tmp_path.glob("*.txt"))
